"""Measure a policy's general ability before and after training with EleutherAI's lm-evaluation-harness (lm_eval)."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rec_r1 import config, models, runs
from rec_r1.config import UserError
from retrievers import unsharded

logger = logging.getLogger(__name__)


def measure(run: Path, tasks: Sequence[str], limit: int | None, include: Path | None = None) -> dict[str, Any]:
    """Run tasks of lm_eval with the untrained and the trained policy of a run.

    The policies write with the settings of each task, and not with those of the recipe, so that the results can be
    compared with published ones.

    run: the run's folder.
    tasks: names of lm_eval's tasks.
    limit: only the first so many examples of each task are used. None = all.
    include: a folder with further task files. None = only lm_eval's own tasks.

    Returns {"tasks", "limit", "results"}, where "results" has lm_eval's results of "untrained" and "trained", and
    writes it to `evaluation/ability.json` of the run. Raises UserError where lm_eval is not installed, a task is
    unknown, or the run has no trained policy.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"general ability needs lm_eval ({error}): pip install 'rec-r1[ability]'") from error

    recipe = config.load(runs.check_run(run) / config.RUN_FILE)
    source = runs.model_source(run, recipe)
    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(f"--tasks {unknown[0]}: lm_eval has no such task: see lm_eval ls tasks")
    found: dict[str, Any] = {}
    for name, weights in (("untrained", None), ("trained", runs.best_policy(run))):
        policy = models.load_policy_for_evaluation(source, recipe, weights)
        tokenizer = models.load_tokenizer(source, recipe.model.trust_remote_code)
        wrapped = HFLM(pretrained=policy, tokenizer=tokenizer, batch_size=recipe.evaluation.batch_size)
        with unsharded():  # transformers' `generate` would wait for all processes of a training with ZeRO-3.
            scores = simple_evaluate(wrapped, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False)
        found[name] = scores["results"]
        del policy, wrapped
        gc.collect()
    result = {"tasks": list(tasks), "limit": limit, "results": found}
    (run / "evaluation").mkdir(exist_ok=True)
    runs.write_atomically(run / "evaluation" / "ability.json", json.dumps(result, indent=1, default=str))
    return result


def text(result: dict[str, Any]) -> str:
    """The result of :func:`measure` as a table, with one line per task and metric.

    The columns are the untrained and the trained policy, the difference, and lm_eval's standard error.
    """
    lines = [["task", "metric", "untrained", "trained", "difference", "standard error"]]
    for task, before in result["results"]["untrained"].items():
        after = result["results"]["trained"][task]
        for key, value in before.items():
            metric, _, rest = key.partition(",")
            if isinstance(value, float) and rest and not metric.endswith("_stderr"):
                error = before.get(f"{metric}_stderr,{rest}")
                shown = f"{error:.3f}" if isinstance(error, float) else "?"
                lines.append([task, metric, f"{value:.3f}", f"{after[key]:.3f}", f"{after[key] - value:+.3f}", shown])
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
