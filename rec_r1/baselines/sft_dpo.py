"""The baselines SFT and DPO: the recipe's policy, trained on the recipe's prompts with TRL's other trainers.

The completions to train on are samples of the untrained policy, or the rollouts of a run, with their rewards. SFT takes
the best completion of each group, and DPO the best and the worst one. SFT can also train on a file of completions.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rec_r1 import runs
from rec_r1.config import Recipe, UserError, comparable, read_params, refuse
from rec_r1.config.passthrough import problems
from rec_r1.console import blamed_on
from rec_r1.environment import Environment
from rec_r1.evaluation.evaluate import score_raw
from rec_r1.generation import OPTIONS, answer, sampling_of, write_as_evaluated
from rec_r1.prompts import Prompt
from rec_r1.runs.run_config import absolute
from rec_r1.tasks import Split, keep_headroom, prompts
from rec_r1.tasks.raw_files import read, value
from rec_r1.trl_options import hub_token_to_environment, lora_config
from retrievers.core.index_folder import new_folder

logger = logging.getLogger(__name__)
# Options of the recipe's `grpo` section that depend on the machine. SFT and DPO use them, too.
_OF_MACHINE = ("per_device_train_batch_size", "gradient_checkpointing", "bf16", "use_cpu", "report_to", "disable_tqdm")


class Group(NamedTuple):
    """A training prompt with its completions.

    prompt: the prompt.
    answers: G completions.
    rewards: (G,) their rewards.
    raw: the reward of the raw query.
    """

    prompt: Prompt
    answers: Sequence[str]
    rewards: np.ndarray
    raw: float


def sft(recipe: Recipe, env: Environment) -> tuple[Path, str]:
    """Train a policy by supervised fine-tuning on good completions.

    Returns the policy's folder, and a description of how it was trained. Raises UserError for options that TRL refuses,
    for a folder that was trained with other settings, and where no training example is left.
    """
    if recipe.baselines.outputs:
        method = f"SFT on {Path(recipe.baselines.outputs).name}"
        return _trained(recipe, "sft", method, lambda: _given(recipe, env))
    return _trained(recipe, "sft", f"SFT on the best of {_source(recipe)}", lambda: best_answers(_groups(recipe, env)))


def dpo(recipe: Recipe, env: Environment) -> tuple[Path, str]:
    """Train a policy by direct preference optimisation on pairs of completions.

    Result and errors are those of :func:`sft`.
    """
    return _trained(recipe, "dpo", f"DPO on best and worst of {_source(recipe)}", lambda: pairs(_groups(recipe, env)))


def best_answers(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Training examples for SFT by rejection sampling.

    An example is the best completion of a group that has one that earns more than the raw query.
    """
    rows = []
    for group in groups:
        best = int(np.argmax(group.rewards))
        if group.rewards[best] > group.raw:
            rows.append({"prompt": group.prompt, "completion": _as_written(group.prompt, group.answers[best])})
    logger.info("%d of %d prompts have a completion that beats the raw query", len(rows), len(groups))
    return rows


def pairs(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Training examples for DPO: the best and the worst completion of each group that is not dead."""
    rows = []
    for group in groups:
        best, worst = int(np.argmax(group.rewards)), int(np.argmin(group.rewards))
        if group.rewards[best] > group.rewards[worst]:
            chosen, rejected = (_as_written(group.prompt, group.answers[i]) for i in (best, worst))
            rows.append({"prompt": group.prompt, "chosen": chosen, "rejected": rejected})
    logger.info("%d of %d prompts have completions with different rewards", len(rows), len(groups))
    return rows


def _as_written(prompt: Prompt, text: str) -> Prompt:
    """A completion in the form of its prompt: a string, or a chat message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _source(recipe: Recipe) -> str:
    """Where the completions of SFT and DPO come from, in words."""
    baselines = recipe.baselines
    return Path(baselines.rollouts).as_posix() if baselines.rollouts else f"{baselines.samples} own samples a prompt"


def _groups(recipe: Recipe, env: Environment) -> list[Group]:
    """The training prompts that pass the recipe's filter, with their scored completions."""
    split = keep_headroom(env.task.train, env.retriever, recipe.task.train_filter)
    raw = score_raw(split, env.scorer).rewards
    asked = prompts(split, env.task.catalog, env.format)
    if recipe.baselines.rollouts:
        return _from_rollouts(Path(recipe.baselines.rollouts), split, asked, raw)
    from rec_r1 import models

    count = recipe.baselines.samples
    sampling = sampling_of(recipe, count)
    completions = answer(recipe, models.resolve(recipe.model.name), None, asked, "sampling", sampling)
    repeated = split.take([q for q in range(len(split)) for _ in range(count)])
    earned = env.scorer.score_split(completions, repeated).whole().rewards
    return [
        Group(prompt, completions[q * count : (q + 1) * count], earned[q * count : (q + 1) * count], float(raw[q]))
        for q, prompt in enumerate(asked)
    ]


def _from_rollouts(path: Path, split: Split, asked: Sequence[Prompt], raw: np.ndarray) -> list[Group]:
    """The scored rollouts of a run as groups, one per query. Raises UserError where none is of a training query."""
    found: dict[str, list[tuple[str, float]]] = {}
    for record, where in read(path):
        if value(record, "completion", where) and record.get("reward") is not None:
            found.setdefault(str(value(record, "query", where)), []).append((record["completion"], record["reward"]))
    groups = [
        Group(asked[q], [a for a, _ in found[query]], np.array([r for _, r in found[query]], np.float32), float(raw[q]))
        for q, query in enumerate(split.queries)
        if query in found
    ]
    if not groups:
        raise UserError(
            f"baselines.rollouts: {path}: none of its queries is a training query of this task: give the "
            "rollouts.jsonl of a run on this task"
        )
    return groups


def _given(recipe: Recipe, env: Environment) -> list[dict[str, Any]]:
    """Training examples for SFT from the file baselines.outputs.

    Raises UserError for a query that is no training query, and for a completion that is malformed.
    """
    path = Path(str(recipe.baselines.outputs))
    train = env.task.train
    asked = prompts(train, env.task.catalog, env.format)
    by_query = dict(zip((*train.queries, *train.ids), (*asked, *asked), strict=True))
    rows = []
    for record, where in read(path):
        query, completion = str(value(record, "query", where)), str(value(record, "completion", where))
        if query not in by_query:
            raise UserError(f"{where}: {query!r} is no training query: give training queries (or their ids) only")
        if env.format.parse(completion, query) is None:
            raise UserError(
                f"{where}: {completion[:80]!r} is malformed in format.answer={recipe.format.answer}: remove it"
            )
        rows.append({"prompt": by_query[query], "completion": _as_written(by_query[query], completion)})
    return rows


def _trained(recipe: Recipe, kind: str, method: str, examples: Any) -> tuple[Path, str]:
    """Train a policy, unless it was trained with the same settings before.

    recipe: the recipe.
    kind: sft or dpo.
    method: a description of the training.
    examples: returns the training examples.

    Returns the policy's folder and ``method``. Raises UserError as :func:`sft`.
    """
    folder = Path(recipe.output_dir) / "baselines" / kind
    settings, record = _settings(recipe), folder / "settings.json"
    if record.is_file():
        # A setting that an older version did not record has its default value, or for sampling options the present one.
        recorded = {"grpo": settings["grpo"], **runs.read_json(record, "delete its folder")}
        if _settings(read_params(Recipe, recorded, str(record))) == settings:
            logger.info("%s was already trained with these settings: %s", kind, folder)
            return folder, method
        raise UserError(f"{folder}: trained with other settings: delete it, or choose another output_dir")
    config = _config(recipe, kind)
    rows = examples()
    if not rows:
        raise UserError(f"baseline {kind}: no training example is left: raise baselines.samples")
    with new_folder(folder) as temporary:
        config.output_dir = str(temporary)
        _train(recipe, kind, config, rows, temporary)
        (temporary / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return folder, method


def _settings(recipe: Recipe) -> dict[str, Any]:
    """The settings that affect the policy that SFT or DPO trains, with absolute paths."""
    plain = comparable(absolute(recipe))
    settings = {k: v for k, v in plain.items() if k not in ("output_dir", "evaluation")}
    without_effect = {"baselines": ("endpoint", "few_shot"), "retriever": ("cache", "max_error_rate", "error_steps")}
    for section, keys in without_effect.items():
        settings[section] = {k: v for k, v in plain[section].items() if k not in keys}
    # Of the options of GRPO, only those of generation matter, because samples are drawn with them.
    settings["grpo"] = {name: plain["grpo"][name] for name in OPTIONS if name in plain["grpo"]}
    return settings


def _config(recipe: Recipe, kind: str) -> Any:
    """The `trl.SFTConfig` or `trl.DPOConfig` of a recipe. Raises UserError for options that TRL refuses."""
    import torch
    from trl import DPOConfig, SFTConfig

    cls: Any = {"sft": SFTConfig, "dpo": DPOConfig}[kind]
    given = getattr(recipe.baselines, kind)
    refuse(problems(f"baselines.{kind}", given, cls))
    options: dict[str, Any] = {"report_to": [], "logging_steps": 10, "save_strategy": "no", "max_length": None}
    if not torch.cuda.is_available():
        options |= {"use_cpu": True, "bf16": False}
    options |= {key: recipe.grpo[key] for key in _OF_MACHINE if key in recipe.grpo}
    from_recipe = {
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "trust_remote_code": recipe.model.trust_remote_code,
    }
    with blamed_on(f"baselines.{kind}", given):
        return cls(**{**from_recipe, **options, **hub_token_to_environment(given, f"baselines.{kind}")})


def _train(recipe: Recipe, kind: str, config: Any, rows: list[dict[str, Any]], folder: Path) -> None:
    """Train a policy on the training examples ``rows``, and save it in ``folder``."""
    from datasets import Dataset
    from transformers import PrinterCallback, set_seed
    from trl import DPOTrainer, SFTTrainer

    from rec_r1 import models

    models.keep_freed_memory()
    source = models.resolve(recipe.model.name)
    lora = lora_config(recipe)
    set_seed(recipe.seed)
    trainer_class: Any = {"sft": SFTTrainer, "dpo": DPOTrainer}[kind]
    options = recipe.grpo.get("chat_template_kwargs")
    if options:
        rows = [{**row, "chat_template_kwargs": options} for row in rows]
    tokenizer = models.load_tokenizer(source, recipe.model.trust_remote_code)
    policy = models.load_policy(source, recipe.model, all_weights_train=lora is None)
    write_as_evaluated(policy, tokenizer, recipe)
    with blamed_on(f"baselines.{kind}", getattr(recipe.baselines, kind)):
        trainer = trainer_class(
            model=policy,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora,
        )
    trainer.remove_callback(PrinterCallback)
    logger.info("training %s by %s on %d examples", recipe.model.name, kind.upper(), len(rows))
    trainer.train()
    trainer.save_model(str(folder))
    models.drop_pickles(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template, which says nothing about this policy.
