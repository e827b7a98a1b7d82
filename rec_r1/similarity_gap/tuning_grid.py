"""Under which losses and negatives is pre-training on texts a net gain for an encoder that is tuned on choices?

The encoder of the recipe, and one of the same architecture with random weights, are tuned with each of `SETTINGS`, with
several seeds. The learning rate of each is chosen on validation with the first seed, and the epoch of every fit on
validation; nothing is chosen on test. Fits and ranks are kept in the cache, so that an interrupted call continues where
it stopped.

Shapes: S seeds, Q queries.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import retrievers
from rec_r1.config import Recipe, UserError, cache_folder, refuse
from rec_r1.config.redaction import redact
from rec_r1.environment import retriever_problems
from rec_r1.evaluation.significance import over_seeds
from rec_r1.similarity_gap import anti_affinity, grid_sentences, sentences
from rec_r1.similarity_gap.held_out import HeldOut, load
from rec_r1.similarity_gap.systems import open_system, values_of
from rec_r1.similarity_gap.utility import MAIN, METRICS
from rec_r1.tasks import Task
from retrievers.text import dense
from retrievers.text.dense import Dense
from retrievers.text.tuning import random_weights

logger = logging.getLogger(__name__)
SEEDS = 3
LEARNING_RATES = (5e-5, 5e-4)  # The second one is for random weights, which need a higher rate.
PRETRAINED, RANDOM = "pre-trained", "random weights"
STARTS = (PRETRAINED, RANDOM)


class Setting(NamedTuple):
    """A loss and its negatives.

    name: its name on the page.
    tuned: the keys of `tuned` that it sets.
    what: what it changes beside `BASE`, as the subject of a sentence.
    """

    name: str
    tuned: Mapping[str, Any]
    what: str


BASE = Setting("in-batch + logQ", {"log_q": True}, "")
AFFINITY = Setting("+ anti-affinity", {"log_q": True, "anti_affinity": 1}, "Adding items of negative affinity")
WRITTEN = Setting("+ written", {"log_q": True, "written": 1}, "Adding written negatives")
SETTINGS = (
    Setting("in-batch", {"log_q": False}, "Leaving the correction for popularity out"),
    BASE,
    Setting("+ text neighbours", {"log_q": True, "hard": 1}, "Adding text neighbours as negatives"),
    AFFINITY,
    WRITTEN,
)
OWN = ("log_q", "learning_rate", "seed")  # What the grid sets itself.
# Keys of the recipe's `tuned` that apply only to the setting with this kind of negatives.
OF_ONE = {
    "hard": "hard", "anti_affinity": "anti_affinity", "affinity": "anti_affinity", "written": "written",
    "written_file": "written",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """The fits of one setting from one start, with the chosen learning rate.

    start, setting: names.
    learning_rate: the chosen one.
    validation: learning rate -> the metric on validation of the first seed.
    backends: the tuned encoder of each of S seeds.
    values: (S, Q) `MAIN` of the test queries.
    """

    start: str
    setting: str
    learning_rate: float
    validation: Mapping[float, float]
    backends: Sequence[Dense]
    values: np.ndarray


class Grid:
    """Fits cells, and shows a progress bar.

    recipe, task, held_out: what is measured.
    seeds: S.
    learning_rates: those to choose from.
    """

    def __init__(
        self, recipe: Recipe, task: Task, held_out: HeldOut, seeds: int, learning_rates: Sequence[float]
    ) -> None:
        self.recipe, self.task, self.held_out = recipe, task, held_out
        self.seeds, self.learning_rates = seeds, learning_rates
        self.base = {name: value for name, value in recipe.retriever.params.items() if name != "tuned"}
        self.tuned = dict(recipe.retriever.params.get("tuned") or {})
        self.bar: Any = None

    def model(self, start: str, seed: int) -> str:
        """The encoder that is tuned: the recipe's, or the same with random weights drawn by a seed."""
        encoder = dense.Params(**self.base).encoder()
        if start == PRETRAINED:
            return str(encoder.settings["model"])
        pooling = encoder.settings["pooling"]  # It is saved with the random weights. None = the encoder's own.
        name = f"random-{encoder.describe()['files'][:16]}-{pooling + '-' if pooling else ''}{seed}"
        try:
            return str(random_weights.save(encoder, cache_folder() / "encoders" / name, seed))
        except ValueError as error:
            raise UserError(str(error)) from error

    def params(self, start: str, seed: int, setting: Setting | None, learning_rate: float) -> dict[str, Any]:
        """The parameters of one fit. setting: None = the encoder is not tuned."""
        params = {**self.base, "model": self.model(start, seed)}
        if setting is None:
            return params
        own = {k: v for k, v in self.tuned.items() if k not in OF_ONE or (v and OF_ONE[k] in setting.tuned)}
        return {**params, "tuned": {**setting.tuned, **own, "learning_rate": learning_rate, "seed": seed}}

    def open(self, params: Mapping[str, Any]) -> Dense:
        """The encoder with some parameters, from the cache or fitted now."""
        backend = open_system(self.recipe, self.task, "dense", params)
        assert isinstance(backend, Dense)
        if self.bar is not None:
            self.bar.update()
        return backend

    def values(self, backends: Sequence[Dense]) -> np.ndarray:
        """(S, Q) `MAIN` of the test queries."""
        return values_of(self.recipe, self.task, self.held_out, backends)[..., METRICS.index(MAIN)]

    def cell(self, start: str, setting: Setting) -> Cell:
        """Choose the learning rate with the first seed, and fit the others with it."""
        first = {rate: self.open(self.params(start, 0, setting, rate)) for rate in self.learning_rates}
        validation = {rate: validation_of(backend) for rate, backend in first.items()}
        rate = max(validation, key=lambda each: validation[each])
        rest = [self.open(self.params(start, seed, setting, rate)) for seed in range(1, self.seeds)]
        backends = [first[rate], *rest]
        return Cell(start, setting.name, rate, validation, backends, self.values(backends))


def validation_of(backend: Dense) -> float:
    """The metric of the epoch that a fit kept, on validation."""
    report = backend.report
    found = report["before"] if not report["epochs"] else report["ndcg@10"][report["epochs"] - 1]
    return float(found)


def measure(
    recipe: Recipe,
    split: str = "test",
    seeds: int = SEEDS,
    learning_rates: Sequence[float] = LEARNING_RATES,
) -> dict[str, Any]:
    """Measure the grid on the recipe's task.

        found = measure(rec_r1.load_recipe("cpu/sequential", ["task.path=data/shop", "retriever.kind=dense"]))

    recipe: the recipe. Its retriever is `dense`, and the keys of its `tuned` hold for all fits, except that `hard`,
        `anti_affinity` and `written` are how many negatives the setting of this kind has: 1 where they are not given.
        Without `written` and its file, that setting is left out.
    split: test or validation.
    seeds: S, how many fits of each setting.
    learning_rates: those of which one is chosen for each start and setting.

    Returns everything that the page shows, as plain JSON. Raises UserError for another retriever, for keys of `tuned`
    that the grid sets itself, for a task without histories or without a validation split, and for fewer than one seed
    or learning rate.
    """
    check(recipe, seeds, learning_rates)
    task, held_out = load(recipe, split)
    assert task.interactions is not None
    if not task.interactions.validation_targets:
        raise UserError(f"task {task.name} has no validation split, which chooses the learning rates: hold one out")
    grid = Grid(recipe, task, held_out, seeds, learning_rates)
    settings = [each for each in SETTINGS if each is not WRITTEN or grid.tuned.get("written")]
    from tqdm import tqdm

    cells = []
    fits = len(STARTS) * len(settings) * (len(learning_rates) + seeds - 1)
    with tqdm(total=fits, desc="fits of the grid") as grid.bar:
        for start in STARTS:
            cells += [grid.cell(start, setting) for setting in settings]
    grid.bar = None
    frozen = {
        PRETRAINED: [grid.open(grid.params(PRETRAINED, 0, None, 0.0))],
        RANDOM: [grid.open(grid.params(RANDOM, seed, None, 0.0)) for seed in range(seeds)],
    }
    of_frozen = {start: grid.values(backends) for start, backends in frozen.items()}
    gains, learned = _gains(cells, settings, held_out.users), _anti_affinity(grid, cells, frozen[PRETRAINED])
    named = ((WRITTEN, "Written negatives"), (AFFINITY, "Items of negative affinity"))
    return {
        "about": _about(grid, split),
        "answer": grid_sentences.answer(gains),
        "gains": gains,
        "effects": _effects(cells, of_frozen, settings, held_out.users),
        "anti_affinity": {**learned, "sentences": [grid_sentences.taught(learned, s.name, what) for s, what in named]},
        "cells": [_described(cell, held_out.users) for cell in cells],
    }


def check(recipe: Recipe, seeds: int, learning_rates: Sequence[float]) -> None:
    """Raise UserError for a recipe and for options that no grid can be made of. The arguments are those of
    :func:`measure`."""
    if recipe.retriever.kind != "dense":
        raise UserError(
            f"retriever.kind: {recipe.retriever.kind}: the grid tunes an encoder: set retriever.kind=dense, and "
            "retriever.params={} if the recipe has parameters of another kind"
        )
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}")
    if not learning_rates:
        raise UserError("--learning-rate: give at least one")
    refuse(retriever_problems(recipe))
    tuned = recipe.retriever.params.get("tuned") or {}
    for name in OWN:
        if name in tuned:
            more = ": give --learning-rate" if name == "learning_rate" else ""
            raise UserError(f"retriever.params.tuned.{name}: the grid sets it itself{more}: leave it out")


def _about(grid: Grid, split: str) -> dict[str, Any]:
    """What was measured."""
    given, task = grid.task.interactions, grid.task
    assert given is not None
    encoder = dense.Params(**grid.base).encoder()
    return {
        "task": task.name,
        "part": split,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "queries": len(grid.held_out.queries),
        "users": len(set(grid.held_out.users)),
        "items": len(task.catalog),
        "choices": len(given.rows),
        "fitted_users": len(given),
        "validation": len(given.validation_targets),
        "titles": given.raw_titles,
        "model": encoder.settings["model"],
        "tuned": redact(grid.tuned),
        "seeds": grid.seeds,
        "learning_rates": list(grid.learning_rates),
        "settings": {
            "name": grid.recipe.task.name,
            "path": grid.recipe.task.path,
            "params": redact(grid.recipe.task.params),
        },
    }


def _gains(cells: Sequence[Cell], settings: Sequence[Setting], users: Sequence[str]) -> list[dict[str, Any]]:
    """What pre-training adds under each setting: the difference of the two starts, paired by seeds and queries."""
    by = {(cell.start, cell.setting): cell.values for cell in cells}
    out = []
    for setting in settings:
        values = {start: by[start, setting.name] for start in STARTS}
        difference = over_seeds(values[PRETRAINED] - values[RANDOM], users)
        out.append(
            {
                "setting": setting.name,
                "starts": {start: over_seeds(each, users) for start, each in values.items()},
                "difference": difference,
                "sentence": grid_sentences.gain(setting.name, difference),
            }
        )
    return out


def _effects(
    cells: Sequence[Cell], frozen: Mapping[str, np.ndarray], settings: Sequence[Setting], users: Sequence[str]
) -> list[dict[str, Any]]:
    """What tuning adds to each start, and what each setting adds to `BASE`, or takes away."""
    bases = {cell.start: cell.values for cell in cells if cell.setting == BASE.name}
    what = {setting.name: setting.what for setting in settings}
    out = []
    for cell in cells:
        beside = sentence = None
        if cell.setting != BASE.name:
            beside = over_seeds(cell.values - bases[cell.start], users)
            differing = int((cell.values != bases[cell.start]).any(axis=0).sum())
            sentence = sentences.effect(f"{what[cell.setting]} ({cell.start})", MAIN, beside, differing)
        lift = over_seeds(cell.values - frozen[cell.start], users)
        shown = {"frozen": over_seeds(frozen[cell.start], users), "lift": lift, "beside": beside}
        out.append({"start": cell.start, "setting": cell.setting, **shown, "sentence": sentence})
    return out


def _anti_affinity(grid: Grid, cells: Sequence[Cell], frozen: Sequence[Dense]) -> dict[str, Any]:
    """How the pre-trained encoder's scores agree with EASE's negative scores, by setting; see `anti_affinity`."""
    ease = open_system(grid.recipe, grid.task, "ease", {})
    encoders = {"frozen": frozen} | {cell.setting: cell.backends for cell in cells if cell.start == PRETRAINED}
    places = anti_affinity.unseen(grid.task, grid.held_out)
    kept, found, pairs = anti_affinity.correlations(grid.task, grid.held_out, places, ease, encoders)
    users = [grid.held_out.users[place] for place in kept.tolist()]
    return anti_affinity.compared(found, BASE.name, users, len(kept), pairs)


def _described(cell: Cell, users: Sequence[str]) -> dict[str, Any]:
    """A cell as plain JSON."""
    reports = [dict(retrievers.fits(backend))["dense"] for backend in cell.backends]
    written = reports[0].get("written")
    return {
        "start": cell.start,
        "setting": cell.setting,
        "learning_rate": cell.learning_rate,
        "validation": {f"{rate:g}": metric for rate, metric in cell.validation.items()},
        "epochs": [report["epochs"] for report in reports],
        **over_seeds(cell.values, users),
        "seeds": cell.values.mean(axis=1).tolist(),
        "probe": None if written is None else written["says"],
    }
