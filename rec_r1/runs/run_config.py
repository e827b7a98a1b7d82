"""The recipe in a run's config.yaml: its paths are absolute, so that it can be read from any working directory.

This module also decides which settings, and which facts of run.json, may change when a run is resumed.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rec_r1.config import Recipe, UserError, comparable
from rec_r1.config.redaction import except_literals, put_back, take_out
from rec_r1.runs import processes

# These settings may change on resume. None of them changes a reward or a prompt.
MAY_CHANGE = (
    "output_dir",  # A run may be moved.
    "baselines",
    "task.path",  # The data may be moved. Their fingerprint is compared, see `runs.begin`.
    "retriever.index",
    # Of a retriever, also of one that is a parameter of another. What changes a ranking is in the fingerprint.
    "retriever.params.url",  # A server may be moved.
    "retriever.params.batch_size",  # A server may refuse a request that is too large.
    "retriever.params.timeout",
    "retriever.params.retries",
    "retriever.params.connections",
    "retriever.params.breaker_failures",
    "retriever.params.breaker_seconds",
    "retriever.params.requests_per_second",
    "retriever.params.keep_alive",
    "retriever.params.ca_certs",
    "retriever.cache",
    "retriever.max_error_rate",
    "retriever.error_steps",
    "evaluation.every_steps",  # Metrics and the number of queries may not: they decide which policy is the best.
    "evaluation.batch_size",
    "evaluation.mismatch_below",
    "evaluation.transcript_hits",
    "grpo.max_steps",  # A run may be made longer.
    "grpo.num_train_epochs",
    "grpo.save_total_limit",
    "grpo.disable_tqdm",
    "grpo.report_to",
    "grpo.run_name",
    "grpo.project",
    "grpo.log_level",
    "grpo.log_completions",
    "grpo.num_completions_to_print",
    "grpo.dataloader_num_workers",
    "grpo.dataloader_pin_memory",
    "grpo.push_to_hub",
    "grpo.hub_",
    "grpo.vllm_server_",
    "grpo.vllm_gpu_memory_utilization",
)
# The facts of run.json that may not change. Runs of older versions may lack some of them.
FACTS_THAT_STAY = ("retriever_fingerprint", "data_fingerprint", "model_source", "processes", "sharding", "dtype")
# The beginning of the name of a parameter of any retriever: that of the recipe, one inside it, or that for titles.
_ANY_RETRIEVER = re.compile(r"(?:retriever|grounding)\.params\.(?:.+\.params\.)?")
# A retriever's parameters that may be a path, also where the retriever is a parameter of another one.
_PATHS_OF_RETRIEVER = ("model", "existing", "pretrained", "written_file", "ca_certs")
# The trainer's options that may be a path.
_PATHS_OF_TRAINER = ("deepspeed", "fsdp_config", "accelerator_config", "logging_dir", "chat_template_path")


def absolute(recipe: Recipe) -> Recipe:
    """``recipe`` with every relative path made absolute.

    A setting that may be a name or a path, such as model.name or an encoder, is a path where such a file or folder
    exists.
    """
    task, retriever, baselines = recipe.task, recipe.retriever, recipe.baselines
    path = task.path if task.path is None or task.path.startswith("hub:") else _full(task.path)
    params = {k: _full_if_exists(v) if k == "categories" else v for k, v in task.params.items()}
    cache = dataclasses.replace(retriever.cache, disk=retriever.cache.disk and _full(retriever.cache.disk))
    return dataclasses.replace(
        recipe,
        output_dir=_full(recipe.output_dir),
        model=dataclasses.replace(recipe.model, name=_full_if_exists(recipe.model.name)),
        task=dataclasses.replace(task, path=path, params=params),
        retriever=dataclasses.replace(
            retriever,
            index=retriever.index and _full(retriever.index),
            params=_absolute_params(retriever.kind, retriever.params),
            cache=cache,
        ),
        grounding=dataclasses.replace(
            recipe.grounding, params=_absolute_params(recipe.grounding.kind, recipe.grounding.params)
        ),
        warm_start=dataclasses.replace(recipe.warm_start, sft=_trainer_paths(recipe.warm_start.sft)),
        baselines=dataclasses.replace(
            baselines,
            rollouts=baselines.rollouts and _full(baselines.rollouts),
            outputs=baselines.outputs and _full(baselines.outputs),
            sft=_trainer_paths(baselines.sft),
            reward_weighted_sft=_trainer_paths(baselines.reward_weighted_sft),
            dpo=_trainer_paths(baselines.dpo),
            rloo=_trainer_paths(baselines.rloo),
        ),
        grpo=_trainer_paths(recipe.grpo),
    )


def _full(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100  Links are kept, because a link may point to data that were moved.


def _full_if_exists(value: Any) -> Any:
    return _full(value) if isinstance(value, str) and value and Path(value).exists() else value


def _trainer_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's options with absolute paths."""
    return {k: _full_if_exists(v) if k in _PATHS_OF_TRAINER else v for k, v in options.items()}


def _absolute_params(kind: str | None, params: Mapping[str, Any]) -> dict[str, Any]:
    """A retriever's parameters with absolute paths. The query of an engine stays as it is."""
    found: dict[str, Any] = except_literals(_retriever_paths, {"kind": kind, "params": dict(params)})["params"]
    return found


def _retriever_paths(value: Any) -> Any:
    """A retriever's parameters, or a value among them, with absolute paths."""
    if isinstance(value, Mapping):
        return {k: _full_if_exists(v) if k in _PATHS_OF_RETRIEVER else _retriever_paths(v) for k, v in value.items()}
    return [_retriever_paths(item) for item in value] if isinstance(value, list | tuple) else value


def changes(before: Recipe, now: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """Each setting that differs between two recipes, as (setting, value before, value now).

    Mappings are compared key by key at every depth, and the query of an engine as a whole. Two spellings of one path
    are equal, and so are a `grpo` option that is missing and one that has its default value.
    """
    one, other = (take_out(comparable(absolute(recipe))) for recipe in (before, now))
    for section in one:
        for key, *values in differences(section, one[section], other[section]):
            was, is_now = map(put_back, values)
            written = is_now if was is None else was  # The value in the recipe that sets it, where only one does.
            if section != "grpo" or None not in (was, is_now) or written != _default(key.removeprefix("grpo.")):
                yield key, was, is_now


def _default(option: str) -> Any:
    """The value of a `grpo` option that a recipe does not set."""
    from trl import GRPOConfig

    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)} | {"logging_steps": 1}
    return defaults.get(option)


def refuse_other_processes(folder: Path, before: Any) -> None:
    """Raise UserError where a run that is resumed was trained by another number of processes than it is now.

    A checkpoint holds the random state of each process. So only the same number of processes continues a run exactly,
    although `prompts_per_step` gives the steps the same size on any number.

    folder: the run's folder, for the message.
    before: the number of processes that the run recorded. Anything but an int = not known, and nothing is refused.
    """
    now = processes.launched()
    if isinstance(before, int) and before != now:
        raise UserError(
            f"--resume: {folder} was trained with --num_processes={before}, and this launch has {now}: launch it with "
            f"--num_processes={before}, or start a new run with output_dir=FOLDER"
        )


def may_change(key: str) -> bool:
    """Whether a setting may change when a run is resumed. ``key``: its dotted name."""
    key = _ANY_RETRIEVER.sub("retriever.params.", key, count=1)
    return any(key == free or key.startswith((f"{free}.", free if free.endswith("_") else "\0")) for free in MAY_CHANGE)


def differences(key: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Each difference between two values of a setting, as (dotted name, value, other value).

    key: the dotted name of the setting. Mappings are compared key by key at every depth, and so are lists of as many
        mappings.
    one, other: its two values.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        for name in dict.fromkeys([*one, *other]):
            yield from differences(f"{key}.{name}", one.get(name), other.get(name))
    elif _are_mappings(one) and _are_mappings(other) and len(one) == len(other):
        for place, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(f"{key}[{place}]", *pair)
    elif one != other:
        yield key, one, other


def _are_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def facts_that_stay(info: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of run.json that may not change when a run is resumed, and that are equal on all machines.

    The model's folder is compared by its name, which says which model and version it is. Its cache may be moved.
    """
    return {k: Path(str(info.get(k))).name if k == "model_source" else info.get(k) for k in FACTS_THAT_STAY}


def refuse_changed_facts(before: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Raise UserError where one of FACTS_THAT_STAY has changed: retriever, data, model, processes, sharding or dtype.

    before: the facts of the run that is resumed, from run.json. Empty for a new run.
    info: its facts now.
    """
    was, now = facts_that_stay(before), facts_that_stay(info)
    for key in FACTS_THAT_STAY:
        if key in before and was[key] != now[key]:
            fix = f"set model.dtype={before[key]}" if key == "dtype" else "restore it"
            raise UserError(
                f"--resume: {key} was {before[key]!r} and is now {info.get(key)!r}: {fix}, or start a new run with "
                "output_dir=FOLDER"
            )
