"""The checks that `check` and `train` both make before weights are loaded, the cheapest first.

:func:`check_recipe` needs neither data nor a model. :func:`check_data` needs the data. The last check,
:func:`rec_r1.checks.policy_check.check_policy`, needs the model's configuration and tokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

import retrievers
import rewards
from rec_r1 import models, tasks
from rec_r1.checks import grpo_rules, reward_probe
from rec_r1.checks.steps import Steps, plan
from rec_r1.checks.unread import unread
from rec_r1.config import Recipe, UserError, refuse
from rec_r1.config.passthrough import check_sections
from rec_r1.config.typed import mismatch
from rec_r1.environment import Environment, check_trainable, retriever_problems, retriever_sections, rewards_of
from rec_r1.environment.structured import unserved
from rec_r1.prompts import Action, Format
from rec_r1.tasks import Split, keep_headroom, pad
from rec_r1.trl_options import grpo_config, lora_config
from rewards import Outcome, RankingReward


def check_recipe(recipe: Recipe) -> Any:
    """The `trl.GRPOConfig` of a recipe, after every check that needs neither data nor a model.

    The toolkit's own settings are checked first, then the options of TRL and PEFT, then the machine.

    Raises UserError, with all problems of the first of these groups that has any.
    """
    format_ = Format(recipe.format)
    tasks.find(recipe.task)
    wrong_types = list(_retriever_params(recipe))
    named = {_name(line) for line in wrong_types}
    parameters = [*wrong_types, *(line for line in retriever_problems(recipe) if _name(line) not in named)]
    own = [*unread(recipe, format_), *unserved(recipe), *parameters, *reward_probe.problems(recipe)]
    refuse(own)
    refuse(check_sections(recipe))
    args = grpo_config(recipe)
    lora_config(recipe)
    launch = [*_launch(recipe, args.world_size), *_sharding(args)]
    refuse([*_trackers(args), *_machine(args), *launch, *grpo_rules.impossible(recipe, args)])
    return args


def check_data(recipe: Recipe, env: Environment, args: Any) -> tuple[Split, Steps]:
    """The training queries that pass the recipe's filter, and the number of steps of their training.

    recipe: the recipe.
    env: its task and retriever.
    args: its `trl.GRPOConfig`.

    Raises UserError where the retriever's rewards would be useless (see `check_trainable`), where a query's perfect
    ranking does not score 1, where a reward or a metric refuses the grades, and where the queries do not fill one step.
    """
    check_trainable(recipe, env)
    for name, split in env.task.splits.items():
        _refuse_imperfect(name, split)
        _refuse_grades(recipe, name, split)
    kept = keep_headroom(env.task.train, env.retriever, recipe.task.train_filter)
    return kept, plan(recipe, len(kept), args)


def _refuse_imperfect(name: str, split: Split) -> None:
    """Raise UserError for a query whose targets, ranked by grade, score less than 1: no policy could score 1."""
    perfect = RankingReward("ndcg", 10)(_perfect(split))
    bad = np.flatnonzero(~(np.abs(perfect - 1) <= 1e-6))  # NaN is bad, too.
    if len(bad):
        raise UserError(
            f"{name} query {split.ids[bad[0]]!r}: its perfect ranking scores ndcg@10 = {perfect[bad[0]]:.4f}, not 1: "
            "correct the grades of its targets"
        )


def _refuse_grades(recipe: Recipe, name: str, split: Split) -> None:
    """Raise UserError where a reward or a metric refuses the largest or the smallest grades of a split.

    Without this, a training would end at the step in which such a query is first drawn.
    """
    largest = [max(grades) for grades in split.grades]
    for q in sorted({int(np.argmax(largest)), int(np.argmin(largest))}):
        metrics = rewards.from_spec(dict.fromkeys(recipe.evaluation.metrics, 1.0))
        for section, total in (("rewards", rewards_of(recipe)), ("evaluation.metrics", metrics)):
            try:
                total.components(_perfect(split.take([q])))
            except ValueError as error:
                raise UserError(f"{section}: {name} query {split.ids[q]!r}: {error}") from error


def _perfect(split: Split) -> Outcome:
    """Completions that rank the targets of each query perfectly, and repeat the query as their text."""
    rows, grades = pad(split.rows, split.grades)
    order = np.argsort(-grades, axis=1, kind="stable")
    ranks = np.zeros(rows.shape, np.int32)
    np.put_along_axis(ranks, order, np.arange(1, rows.shape[1] + 1, dtype=np.int32)[None].repeat(len(rows), 0), axis=1)
    ranks[grades == 0] = 0
    texts = list(split.queries)
    actions = [Action(text, text) for text in texts]
    return Outcome(texts, actions, ranks, grades, raw_ranks=ranks, queries=texts, written=texts)


def warnings(recipe: Recipe, args: Any, steps: Steps) -> list[str]:
    """One line for each setting that is allowed, but rarely intended.

    recipe: the recipe, which has passed :func:`check_recipe`.
    args: its `trl.GRPOConfig`.
    steps: the number of steps of its training.
    """
    malformed = reward_probe.malformed_pays(recipe)
    return [*([malformed] if malformed else []), *grpo_rules.weak(recipe, args, steps)]


def _name(problem: str) -> str:
    """The parameter that a problem names first, such as retriever.params.k1."""
    return problem.split()[0].rstrip(":")


def _retriever_params(recipe: Recipe) -> Iterator[str]:
    """One line for each retriever parameter whose value is not of the annotated type. Backends check the ranges."""
    for section, kind, params in retriever_sections(recipe):
        try:
            hints = retrievers.parameters(kind)
        except ValueError as error:
            yield str(error).replace("retriever.", f"{section}.", 1)
            continue
        for name, value in params.items():
            wrong = mismatch(hints[name], value, name) if name in hints else None
            if wrong:
                yield f"{section}.params.{name} {wrong}"


def _trackers(args: Any) -> Iterator[str]:
    """One line for each tracker in `grpo.report_to` that is unknown, not installed, or not logged in to."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            yield f"grpo.report_to: unknown {name!r}: choose from {', '.join(INTEGRATION_TO_CALLBACK)}"
        elif name not in get_available_reporting_integrations():
            yield f"grpo.report_to: {name}: its package is not installed: pip install {name.replace('_', '-')}"
        elif name == "wandb" and not _wandb_ready():
            yield (
                "grpo.report_to: wandb: this machine is not logged in to it: run `wandb login`, or set WANDB_API_KEY, "
                "or WANDB_MODE=offline"
            )


def _wandb_ready() -> bool:
    """Whether a run could start: W&B is off or offline, or a key is set. No server is asked."""
    import wandb
    from requests.utils import get_netrc_auth

    settings = wandb.Settings()
    settings.update_from_system_settings()
    settings.update_from_env_vars(dict(os.environ))
    key = settings.api_key or settings.identity_token_file or get_netrc_auth(settings.base_url)
    return settings.mode in ("offline", "disabled", "dryrun") or bool(key)


def _machine(args: Any) -> Iterator[str]:
    """One line for each option that this machine does not support. The trainer would refuse it only after loading."""
    import torch
    from transformers.utils import is_liger_kernel_available

    if args.fp16 and not torch.cuda.is_available():
        yield "grpo.fp16: true, but there is no GPU: set grpo.fp16=false"
    if args.use_liger_kernel and not is_liger_kernel_available():
        yield "grpo.use_liger_kernel: true, but liger-kernel is not installed: pip install liger-kernel"


def _launch(recipe: Recipe, processes: int) -> Iterator[str]:
    """One line where a recipe cannot be trained by so many processes. `grpo_config` checks their batch sizes."""
    if recipe.warm_start.samples and processes > 1:
        yield (
            f"warm_start.samples: {recipe.warm_start.samples}: a warm start is trained by one process, and {processes} "
            "were started: set warm_start.samples=0, or start one process"
        )


def _sharding(args: Any) -> Iterator[str]:
    """One line where an option of the sharding keeps the trainer from saving a whole policy, which best/ needs."""
    how, whole = models.sharding(args), "FULL_STATE_DICT"
    gathered = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    if how == "ZeRO-3" and not args.deepspeed_plugin.get_value(gathered):
        yield (
            "zero3_save_16bit_model: false in the configuration of accelerate (in a DeepSpeed configuration, "
            "stage3_gather_16bit_weights_on_model_save): each process would save its part of the policy, and no "
            "command could open these parts: set it to true, as in recipes/accelerate/zero3.yaml"
        )
    place, kind = "fsdp_state_dict_type in the configuration of accelerate", whole
    if args.fsdp:
        place, kind = "grpo.fsdp_config.state_dict_type", args.fsdp_config.get("state_dict_type", whole)
    elif how == "FSDP":
        kind = os.environ.get("FSDP_STATE_DICT_TYPE", "not set")
    if kind != whole:
        yield (
            f"{place}: {kind}: the trainer would save the weights only in parts, inside a checkpoint, and "
            f"best/ would hold no weights: set it to {whole}, as in recipes/accelerate/fsdp2.yaml"
        )
