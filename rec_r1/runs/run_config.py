"""The recipe that a run's config.yaml keeps: with absolute paths, so that it can be read from any folder; and what may
differ from it when the run is resumed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rec_r1.config import Recipe, comparable

# These may change on resume; none changes a reward or a prompt.
MAY_CHANGE = (
    "output_dir",  # a run may be moved
    "baselines",
    "task.path",  # where the data lie: what they are is compared, see `runs.begin`
    "retriever.index",
    "retriever.params.url",  # a server may move: its fingerprint is compared
    "retriever.params.timeout",
    "retriever.params.retries",
    "retriever.params.connections",
    "retriever.params.breaker_failures",
    "retriever.params.breaker_seconds",
    "retriever.cache",
    "retriever.max_error_rate",
    "retriever.error_steps",
    "evaluation.every_steps",  # not the metrics nor the number of queries: these decide which policy is the best
    "evaluation.batch_size",
    "evaluation.mismatch_below",
    "evaluation.transcript_hits",
    "grpo.max_steps",  # a run may be made longer
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
# Keys of a backend's parameters that may name a file or a folder; those of a backend within another one too.
_PARAMETERS = ("model", "existing", "pretrained")
_OF_TRAINER = ("deepspeed", "fsdp_config", "accelerator_config", "logging_dir", "chat_template_path")


def absolute(recipe: Recipe) -> Recipe:
    """``recipe`` with every path that is relative to the working directory made absolute.

    What may be a name or a path (model.name, an encoder) is a path where a file or a folder of that name is there.
    """
    task, retriever, baselines = recipe.task, recipe.retriever, recipe.baselines
    path = task.path if task.path is None or task.path.startswith("hub:") else _full(task.path)
    params = {k: _if_there(v) if k == "categories" else v for k, v in task.params.items()}
    cache = dataclasses.replace(retriever.cache, disk=retriever.cache.disk and _full(retriever.cache.disk))
    return dataclasses.replace(
        recipe,
        output_dir=_full(recipe.output_dir),
        model=dataclasses.replace(recipe.model, name=_if_there(recipe.model.name)),
        task=dataclasses.replace(task, path=path, params=params),
        retriever=dataclasses.replace(
            retriever,
            index=retriever.index and _full(retriever.index),
            params=_of_backend(retriever.params),
            cache=cache,
        ),
        grounding=dataclasses.replace(recipe.grounding, params=_of_backend(recipe.grounding.params)),
        baselines=dataclasses.replace(
            baselines,
            rollouts=baselines.rollouts and _full(baselines.rollouts),
            outputs=baselines.outputs and _full(baselines.outputs),
            sft=_of_trainer(baselines.sft),
            dpo=_of_trainer(baselines.dpo),
        ),
        grpo=_of_trainer(recipe.grpo),
    )


def _full(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100  links stay: one may be set to data that were moved


def _if_there(value: Any) -> Any:
    return _full(value) if isinstance(value, str) and value and Path(value).exists() else value


def _of_trainer(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _if_there(v) if k in _OF_TRAINER else v for k, v in options.items()}


def _of_backend(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _if_there(v) if k in _PARAMETERS else _of_backend(v) for k, v in value.items()}
    return [_of_backend(item) for item in value] if isinstance(value, list | tuple) else value


def changes(before: Recipe, now: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """(setting, value before, value now) of all that differs, down to the deepest mapping; two spellings of one path do
    not."""
    one, other = (comparable(absolute(recipe)) for recipe in (before, now))
    for section in one:
        for key, was, is_now in differences(section, one[section], other[section]):
            written = is_now if was is None else was  # on one side only, with the value that it had by default
            if section != "grpo" or None not in (was, is_now) or written != _default(key.removeprefix("grpo.")):
                yield key, was, is_now


def _default(option: str) -> Any:
    from trl import GRPOConfig

    defaults = {field.name: field.default for field in dataclasses.fields(GRPOConfig)} | {"logging_steps": 1}
    return defaults.get(option)


def may_change(key: str) -> bool:
    return any(key == free or key.startswith((f"{free}.", free if free.endswith("_") else "\0")) for free in MAY_CHANGE)


def differences(key: str, one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """(key, value, other value) of every setting under ``key`` that differs, down to the deepest mapping."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in dict.fromkeys([*one, *other]):
            yield from differences(f"{key}.{name}", one.get(name), other.get(name))
    elif one != other:
        yield key, one, other
