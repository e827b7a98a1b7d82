"""One recipe trained with several seeds, one after the other, each into a run of its own."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path

from rec_r1 import runs
from rec_r1.config import Recipe, UserError
from rec_r1.evaluation.seeds import RECORD, measure, text

logger = logging.getLogger(__name__)


def recipes(recipe: Recipe, count: int) -> list[Recipe]:
    """``recipe`` with its own seed and those that follow, each run in a folder of its own inside output_dir."""
    if count < 2:
        raise UserError(f"--seeds must be at least 2, got {count}: leave it out to train with one seed")
    chosen = range(recipe.seed, recipe.seed + count)
    folder = Path(recipe.output_dir)
    return [dataclasses.replace(recipe, seed=seed, output_dir=str(folder / f"seed-{seed}")) for seed in chosen]


def train_all(recipe: Recipe, count: int, resume: bool, train: Callable[[Recipe, bool], int]) -> int:
    """Train one seed after the other; 0, or what the first that did not end well returns.

    resume: runs that were begun go on, those that are complete are left as they are, and the others start. Raises
    UserError before anything is trained where a folder is in use and ``resume`` is off, where count is below 2, and
    under several processes: they end when their run does.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--seeds: one process trains them one after the other, and there are several: start each by itself with "
            f"seed=N output_dir={recipe.output_dir}/seed-N; rec-r1 report {recipe.output_dir} compares them"
        )
    each = recipes(recipe, count)
    begun = [runs.is_started(Path(one.output_dir)) for one in each]
    if any(begun) and not resume:
        raise UserError(runs.not_empty(Path(each[begun.index(True)].output_dir)))
    for one, is_begun in zip(each, begun, strict=True):
        logger.info("seed %d of %d to %d, into %s", one.seed, each[0].seed, each[-1].seed, one.output_dir)
        code = train(one, resume and is_begun)
        if code:
            return code
    folder = Path(recipe.output_dir)
    print("", text(measure(folder)), f"all runs, and {RECORD}: {folder}", sep="\n\n")  # noqa: T201
    return 0
