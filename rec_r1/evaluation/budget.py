"""What each system used: rollouts and seconds to make it, and completions and seconds for each query.

Systems can be compared fairly only where these are shown beside their scores.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rec_r1 import config, runs
from rec_r1.config import Recipe
from rec_r1.runs.processes import launched
from rec_r1.trl_options import batch_sizes, grpo_config

USED = "used.json"  # It is in the folder of a warm start, of a baseline's policy, and of a search for a prompt.


@dataclasses.dataclass(frozen=True)
class Used:
    """What a system used. None = not known, or not measured.

    rollouts: how many completions of training prompts were sampled and scored before it could answer.
    seconds: how long its training or its search took, with the sampling and without validation.
    completions: how many completions it writes for one held-out query. 0 = it has no model.
    query_seconds: how long it took for one held-out query, on average over all queries.
    """

    rollouts: int | None = 0
    seconds: float | None = 0.0
    completions: int = 1
    query_seconds: float | None = None


def of_run(folder: Path) -> Used:
    """What the training of a run used until its last logged step, with its warm start.

    folder: the run's folder. The seconds are those of all steps, from metrics.jsonl, so pauses before a resume do not
        count.

    Returns values of None where there is no such log. Raises UserError where it is damaged.
    """
    if not (folder / "metrics.jsonl").is_file():
        return Used(None, None)
    recipe = config.load(folder / config.RUN_FILE)
    rows = [row for row in runs.read_metrics(folder) if isinstance(row.get("step_time"), int | float)]
    steps = [0, *(row["step"] for row in rows)]
    # A row has the mean over the steps since the row before it, which are several with grpo.logging_steps above 1.
    seconds = sum(row["step_time"] * (now - before) for row, before, now in zip(rows, steps, steps[1:], strict=False))
    processes = runs.read_info(folder).get("processes", 1)
    rollouts = round(_of_a_step(recipe, processes) * steps[-1])
    before = read(folder / "warm_start") if recipe.warm_start.samples else Used()
    if before.rollouts is None or before.seconds is None:
        return Used(None, None)
    return Used(rollouts + before.rollouts, seconds + before.seconds)


def _of_a_step(recipe: Recipe, processes: int) -> float:
    """How many completions are generated for one optimizer step, on average."""
    passes = recipe.grpo.get("num_iterations") or 1  # How often the completions of a generation are used.
    return batch_sizes(recipe, processes).completions / passes


def planned(recipe: Recipe, queries: int) -> int:
    """How many completions the training of a recipe samples after its warm start.

    recipe: the recipe. The number of its processes is that of this program.
    queries: the number of training queries that pass the recipe's filter.

    Raises UserError for options of `grpo` that TRL refuses.
    """
    args = grpo_config(recipe)
    passes = args.num_iterations * args.steps_per_generation  # The forward passes that use one generation.
    if args.max_steps > 0:
        generations = math.ceil(args.max_steps * args.gradient_accumulation_steps / passes)
    else:
        an_epoch = queries // (args.generation_batch_size // args.num_generations)
        generations = math.ceil(args.num_train_epochs * an_epoch)
    return int(generations * args.generation_batch_size)


def updates(recipe: Recipe, queries: int) -> int:
    """How many updates of the weights the training of a recipe makes. Arguments and errors are those of `planned`."""
    return max(1, round(planned(recipe, queries) / _of_a_step(recipe, 1)))


def of_training(recipe: Recipe, queries: int) -> int:
    """How many completions the run in a recipe's output_dir samples, or, where there is none, would sample.

    The number includes the samples of a warm start, and, for a run that was stopped, those of the steps still to come.
    Otherwise it would depend on whether a baseline is made before or after the training.
    The arguments and errors are those of :func:`planned`.
    """
    folder = Path(recipe.output_dir)
    if not (folder / config.RUN_FILE).is_file():
        return _with_warm_start(recipe, queries)
    run = config.load(folder / config.RUN_FILE)
    of_processes = 1.0
    if run.grpo.get("max_steps", -1) > 0:  # As many steps on more processes have more completions.
        of_processes = _of_a_step(run, runs.read_info(folder).get("processes", 1)) / _of_a_step(run, launched())
    return max(of_run(folder).rollouts or 0, _with_warm_start(run, queries, of_processes))


def _with_warm_start(recipe: Recipe, queries: int, factor: float = 1.0) -> int:
    """How many completions a warm start samples, and ``factor`` times those of :func:`planned`."""
    return recipe.warm_start.samples * queries + round(factor * planned(recipe, queries))


def write(folder: Path, used: Used) -> None:
    """Write what a training or a search used, for :func:`read`."""
    runs.write_atomically(folder / USED, json.dumps({"rollouts": used.rollouts, "seconds": used.seconds}))


def read(folder: Path) -> Used:
    """What the training or the search in a folder used. Nothing is known of a folder of an older version."""
    path = folder / USED
    if not path.is_file():
        return Used(None, None)
    found = runs.read_json(path, "delete its folder")
    return Used(found.get("rollouts"), found.get("seconds"))


def mean(each: Sequence[Used]) -> Used:
    """The mean of what a system used in several runs. A value that is not known in one run is not known."""
    rollouts = _mean([one.rollouts for one in each])
    return Used(
        rollouts=None if rollouts is None else round(rollouts),
        seconds=_mean([one.seconds for one in each]),
        completions=each[0].completions,
        query_seconds=_mean([one.query_seconds for one in each]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of values. None = one of them is not known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def lines(used: Mapping[str, Used]) -> list[list[str]]:
    """The cells of a table: a header, and one line for each system. A dash stands for what is not known.

    used: name of a system -> what it used.
    """
    header = ["used", "rollouts", "seconds to make", "completions a query", "seconds a query"]
    rows = [header]
    for name, one in used.items():
        rollouts = "–" if one.rollouts is None else f"{one.rollouts:,}"
        seconds = "–" if one.seconds is None else f"{one.seconds:,.0f}"
        a_query = "–" if one.query_seconds is None else f"{one.query_seconds:.3f}"
        rows.append([name, rollouts, seconds, str(one.completions), a_query])
    return rows
