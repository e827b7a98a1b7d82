"""Train a recipe with several seeds, one after the other. Each seed is a run with its own folder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

from rec_r1 import runs
from rec_r1.config import Recipe, UserError
from rec_r1.evaluation.seeds import RECORD, measure, refuse_other_recipes, runs_in, text
from rec_r1.runs import processes

logger = logging.getLogger(__name__)


def recipes(recipe: Recipe, count: int) -> list[Recipe]:
    """The recipes of ``count`` runs, with the recipe's seed and the seeds that follow it.

    recipe: the recipe. Each run has a folder seed-N inside its output_dir.
    count: the number of seeds.

    Raises UserError for a count below 2.
    """
    if count < 2:
        raise UserError(f"--seeds must be at least 2, got {count}: leave it out to train with one seed")
    chosen = range(recipe.seed, recipe.seed + count)
    folder = Path(recipe.output_dir)
    return [dataclasses.replace(recipe, seed=seed, output_dir=str(folder / f"seed-{seed}")) for seed in chosen]


def train_all(recipe: Recipe, count: int, resume: bool, train: Callable[[Recipe, bool], int]) -> int:
    """Train one seed after the other, and print a comparison over all of them.

    recipe: the recipe of the first seed.
    count: the number of seeds.
    resume: whether runs that have begun continue. Complete runs are left as they are, and the other seeds start.
    train: trains one recipe, and returns an exit code. It takes the recipe, and whether to resume.

    Returns 0, or the exit code of the first run that did not end with 0.

    Raises UserError before anything is trained: where a run's folder is in use and ``resume`` is False, where the
    folder holds seeds of another recipe, where ``count`` is below 2, and where the program runs as several processes,
    because they exit at the end of one run.
    """
    if processes.launched() > 1:
        raise UserError(
            "--seeds: several seeds are trained by one process, and several processes were started: start each seed "
            f"on its own with seed=N output_dir={recipe.output_dir}/seed-N, and compare the runs with rec-r1 report "
            f"{recipe.output_dir}"
        )
    each = recipes(recipe, count)
    begun = [runs.is_started(Path(one.output_dir)) for one in each]
    if any(begun) and not resume:
        raise UserError(runs.not_empty(Path(each[begun.index(True)].output_dir)))
    own = {Path(one.output_dir) for one in each}  # Their settings are compared when they are resumed.
    refuse_other_recipes(recipe, [run for run in runs_in(Path(recipe.output_dir)) if run not in own])
    for one, is_begun in zip(each, begun, strict=True):
        logger.info(
            "training seed %d of the seeds %d to %d into %s", one.seed, each[0].seed, each[-1].seed, one.output_dir
        )
        code = train(one, resume and is_begun)
        if code:
            return code
    folder = Path(recipe.output_dir)
    print("", text(measure(folder)), f"the runs and {RECORD} are in {folder}", sep="\n\n")  # noqa: T201
    return 0
