"""General ability before and after training, by EleutherAI's lm-evaluation-harness: did the policy forget anything?"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rec_r1 import config, models, runs
from rec_r1.config import UserError

logger = logging.getLogger(__name__)


def measure(run: Path, tasks: Sequence[str], limit: int | None, include: Path | None = None) -> dict[str, Any]:
    """lm_eval's results for the untrained and the trained policy of a run; written to `evaluation/ability.json`.

    Answers are written as each task's own settings say, not as the recipe does: they are to compare with others'.

    tasks: names of lm_eval's tasks. limit: the first so many examples of each. include: a folder with task files of
    your own. Raises UserError where lm_eval is missing, a task is unknown, or the run has no policy.
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
        scores = simple_evaluate(wrapped, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False)
        found[name] = scores["results"]
        del policy, wrapped
        gc.collect()
    result = {"tasks": list(tasks), "limit": limit, "results": found}
    (run / "evaluation").mkdir(exist_ok=True)
    runs.write_atomically(run / "evaluation" / "ability.json", json.dumps(result, indent=1, default=str))
    return result


def text(result: dict[str, Any]) -> str:
    """A line a task and metric: untrained, trained, difference, and lm_eval's standard error."""
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
