"""SFT and DPO on the recipe's own prompts, through TRL's trainers: "RL versus SFT" as one command.

Answers come from the untrained policy, scored by the recipe's reward (SFT: the best of a group, DPO: the best against
the worst), from a run's rollouts, or from a file of given answers (SFT).
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
# Of the recipe's own training options, those that say what the machine can take.
_SHARED = ("per_device_train_batch_size", "gradient_checkpointing", "bf16", "use_cpu", "report_to", "disable_tqdm")


class Group(NamedTuple):
    """One training prompt with its answers and their rewards; raw: what the query itself earns."""

    prompt: Prompt
    answers: Sequence[str]
    rewards: np.ndarray
    raw: float


def sft(recipe: Recipe, env: Environment) -> tuple[Path, str]:
    """Fine-tune on good answers. Returns the policy's folder and how it was made."""
    if recipe.baselines.outputs:
        what = f"SFT on {Path(recipe.baselines.outputs).name}"
        return _trained(recipe, "sft", what, lambda: _given(recipe, env))
    return _trained(recipe, "sft", f"SFT on the best of {_source(recipe)}", lambda: best_answers(_groups(recipe, env)))


def dpo(recipe: Recipe, env: Environment) -> tuple[Path, str]:
    """Direct preference optimisation on pairs. Returns the policy's folder and how it was made."""
    return _trained(recipe, "dpo", f"DPO on best and worst of {_source(recipe)}", lambda: pairs(_groups(recipe, env)))


def best_answers(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Rejection sampling: of each group the best answer, where it earns more than the raw query does."""
    rows = []
    for group in groups:
        best = int(np.argmax(group.rewards))
        if group.rewards[best] > group.raw:
            rows.append({"prompt": group.prompt, "completion": _answer(group.prompt, group.answers[best])})
    logger.info("%d of %d prompts have an answer better than the raw query", len(rows), len(groups))
    return rows


def pairs(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The best and the worst answer of each group that has a difference."""
    rows = []
    for group in groups:
        best, worst = int(np.argmax(group.rewards)), int(np.argmin(group.rewards))
        if group.rewards[best] > group.rewards[worst]:
            chosen, rejected = (_answer(group.prompt, group.answers[i]) for i in (best, worst))
            rows.append({"prompt": group.prompt, "chosen": chosen, "rejected": rejected})
    logger.info("%d of %d prompts have a better and a worse answer", len(rows), len(groups))
    return rows


def _answer(prompt: Prompt, text: str) -> Prompt:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _source(recipe: Recipe) -> str:
    baselines = recipe.baselines
    return Path(baselines.rollouts).as_posix() if baselines.rollouts else f"{baselines.samples} own samples a prompt"


def _groups(recipe: Recipe, env: Environment) -> list[Group]:
    """The training prompts (those that training itself would use) with scored answers."""
    split = keep_headroom(env.task.train, env.retriever, recipe.task.train_filter)
    raw = score_raw(split, env.scorer).rewards
    asked = prompts(split, env.task.catalog, env.format)
    if recipe.baselines.rollouts:
        return _from_rollouts(Path(recipe.baselines.rollouts), split, asked, raw)
    from rec_r1 import models

    count = recipe.baselines.samples
    sampling = sampling_of(recipe, count)
    answers = answer(recipe, models.resolve(recipe.model.name), None, asked, "sampling", sampling)
    repeated = split.take([q for q in range(len(split)) for _ in range(count)])
    earned = env.scorer.score_split(answers, repeated).whole().rewards
    return [
        Group(prompt, answers[q * count : (q + 1) * count], earned[q * count : (q + 1) * count], float(raw[q]))
        for q, prompt in enumerate(asked)
    ]


def _from_rollouts(path: Path, split: Split, asked: Sequence[Prompt], raw: np.ndarray) -> list[Group]:
    """A run's rollouts by query, scored ones only. Raises UserError where none is of these training queries."""
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
        raise UserError(f"baselines.rollouts: {path}: none of its queries is a training query: give this task's run")
    return groups


def _given(recipe: Recipe, env: Environment) -> list[dict[str, Any]]:
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
            raise UserError(f"{where}: {completion[:80]!r} is malformed in format.answer={recipe.format.answer}")
        rows.append({"prompt": by_query[query], "completion": _answer(by_query[query], completion)})
    return rows


def _trained(recipe: Recipe, kind: str, what: str, examples: Any) -> tuple[Path, str]:
    """Train ``kind`` on what ``examples()`` returns, or find that it was trained with the same settings before."""
    folder = Path(recipe.output_dir) / "baselines" / kind
    settings, record = _settings(recipe), folder / "settings.json"
    if record.is_file():
        # What an older version's record does not say has its default value; of sampling options, today's.
        kept = {"grpo": settings["grpo"], **runs.read_json(record, "delete its folder")}
        if _settings(read_params(Recipe, kept, str(record))) == settings:
            logger.info("%s was trained with these settings before: %s", kind, folder)
            return folder, what
        raise UserError(f"{folder}: trained with other settings: delete it, or choose another output_dir")
    config = _config(recipe, kind)
    rows = examples()
    if not rows:
        raise UserError(f"baseline {kind}: no training example is left: raise baselines.samples")
    with new_folder(folder) as temporary:
        config.output_dir = str(temporary)
        _fit(recipe, kind, config, rows, temporary)
        (temporary / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return folder, what


def _settings(recipe: Recipe) -> dict[str, Any]:
    """What decides which policy a recipe's SFT or DPO gives, with absolute paths."""
    plain = comparable(absolute(recipe))
    settings = {k: v for k, v in plain.items() if k not in ("output_dir", "evaluation")}
    free = {"baselines": ("endpoint", "few_shot"), "retriever": ("cache", "max_error_rate", "error_steps")}
    for section, keys in free.items():
        settings[section] = {k: v for k, v in plain[section].items() if k not in keys}
    settings["grpo"] = {name: plain["grpo"][name] for name in OPTIONS if name in plain["grpo"]}  # how samples are drawn
    return settings


def _config(recipe: Recipe, kind: str) -> Any:
    import torch
    from trl import DPOConfig, SFTConfig

    cls: Any = {"sft": SFTConfig, "dpo": DPOConfig}[kind]
    given = getattr(recipe.baselines, kind)
    refuse(problems(f"baselines.{kind}", given, cls))
    options: dict[str, Any] = {"report_to": [], "logging_steps": 10, "save_strategy": "no", "max_length": None}
    if not torch.cuda.is_available():
        options |= {"use_cpu": True, "bf16": False}
    options |= {key: recipe.grpo[key] for key in _SHARED if key in recipe.grpo}
    ours = {
        "output_dir": recipe.output_dir,
        "seed": recipe.seed,
        "trust_remote_code": recipe.model.trust_remote_code,
    }
    with blamed_on(f"baselines.{kind}", given):
        return cls(**{**ours, **options, **hub_token_to_environment(given, f"baselines.{kind}")})


def _fit(recipe: Recipe, kind: str, config: Any, rows: list[dict[str, Any]], folder: Path) -> None:
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
    logger.info("%s of %s on %d examples", kind.upper(), recipe.model.name, len(rows))
    trainer.train()
    trainer.save_model(str(folder))
    models.drop_pickles(folder)
