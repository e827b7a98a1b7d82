"""Is the number of dimensions what limits an encoder on a task, or what its embeddings are aligned with?

The embeddings are projected onto fewer and fewer dimensions, see `vectors.projected`. If the encoder loses nothing by
halving them, their number does not limit it. Vectors of as many dimensions that are fitted to choices show what the
dimensions could hold, see `vectors.Choices`: if they find more than the encoder, then the number does not limit it
either, but where it places items.

Shapes: S seeds, Q queries, K numbers of dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rec_r1.evaluation.significance import over_seeds
from rec_r1.similarity_gap import claims
from rec_r1.similarity_gap.measured import Measured
from rec_r1.similarity_gap.systems import values_of
from rec_r1.similarity_gap.utility import MAIN, METRICS
from rec_r1.similarity_gap.vectors import Choices, projected
from retrievers import Retriever
from retrievers.text.dense import Dense

FEWEST = 8  # The smallest number of dimensions.
CLAIMS = (claims.DIMENSION, claims.ALIGNMENT)
CHOICES = "low-rank model of choices"


@dataclass(frozen=True)
class Sweep:
    """What is found by the number of dimensions.

    dimensions: the K numbers, D last; each is half of the next one.
    values: name -> (S, K, Q) `MAIN`. S = 1 without a seed.
    users: Q labels.
    """

    dimensions: Sequence[int]
    values: Mapping[str, np.ndarray]
    users: Sequence[str]

    def rows(self) -> list[dict[str, Any]]:
        """The name of each system, and the mean and interval at each number of dimensions."""
        places = range(len(self.dimensions))
        return [
            {"system": name, "values": [over_seeds(found[:, place], self.users) for place in places]}
            for name, found in self.values.items()
        ]


def numbers(most: int) -> list[int]:
    """The numbers of dimensions that are measured for an encoder of ``most`` dimensions, ascending."""
    out = []
    while most >= FEWEST:
        out.append(most)
        most //= 2
    return out[::-1]


def measure(of: Measured, encoders: Mapping[str, Sequence[Dense]]) -> Sweep | str:
    """Measure the sweep, or say why it cannot be.

    of: what the page has measured already.
    encoders: name -> the encoder with each of S seeds. All have the same number of dimensions.
    """
    from tqdm import tqdm

    (first, *_), *_ = encoders.values()
    dimensions = numbers(first.encoder.dimension)
    if len(dimensions) < 2:
        return f"an encoder of {first.encoder.dimension} dimensions has no half with at least {FEWEST}"
    assert of.task.interactions is not None
    if not of.task.interactions.validation_targets:
        return "the task has no validation choices, on which the regularization of the vectors is picked"
    choices = Choices(of.task.interactions, dimensions[-1])
    found: dict[str, list[np.ndarray]] = {name: [] for name in [*encoders, CHOICES]}
    for dimension in tqdm(dimensions, "fewer dimensions", leave=False):
        whole = dimension == dimensions[-1]
        for name, backends in encoders.items():
            shown: list[Retriever] = [each if whole else projected(each, dimension) for each in backends]
            found[name].append(_values(of, shown))
        found[CHOICES].append(_values(of, [choices.of(dimension)]))
    return Sweep(dimensions, {name: np.stack(each, axis=1) for name, each in found.items()}, of.held_out.users)


def _values(of: Measured, backends: Sequence[Retriever]) -> np.ndarray:
    """(S, Q) `MAIN` of S retrievers."""
    return values_of(of.recipe, of.task, of.held_out, backends)[..., METRICS.index(MAIN)]


def tested(sweep: Sweep, name: str) -> tuple[list[dict[str, Any]], str]:
    """Test the two claims for one encoder of a sweep.

    Returns the rows of `CLAIMS`, see `claims.row`, and the sentence that follows from both.
    """
    half, whole = sweep.dimensions[-2:]
    encoder, choices = sweep.values[name], sweep.values[CHOICES]
    needed = claims.compared(encoder[:, -1], encoder[:, -2], sweep.users)
    aligned = claims.compared(choices[:, -1], encoder[:, -1], sweep.users)
    rows = [
        claims.row(claims.DIMENSION, MAIN, name, f"{name}, {half} dimensions", {**needed, "of": "all"}),
        claims.row(claims.ALIGNMENT, MAIN, f"{CHOICES}, {whole} dimensions", name, {**aligned, "of": "all"}),
    ]
    return rows, limit(name, whole, needed["verdict"], aligned["verdict"])


def limit(name: str, dimensions: int, needed: str, aligned: str) -> str:
    """What limits an encoder, in one sentence.

    needed, aligned: the verdicts on the claims that all dimensions are needed, and that vectors of as many find more.
    """
    if aligned == claims.STANDS:
        return (
            f"Alignment limits {name} here, and not the number of its dimensions: vectors of as many ({dimensions}) "
            "that are fitted to choices find more."
        )
    if needed == claims.STANDS:
        return (
            f"The number of its dimensions ({dimensions}) may limit {name} here: it finds less with half of them, and "
            "vectors of as many that are fitted to choices are not shown to find more."
        )
    return (
        f"Neither the number of its dimensions ({dimensions}) nor alignment is shown to limit {name} here: it is not "
        "shown to need all of them, and vectors of as many that are fitted to choices are not shown to find more."
    )
