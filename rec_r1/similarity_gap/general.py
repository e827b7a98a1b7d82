"""Does an encoder forget when it is tuned on choices? What it finds of a general set before and after.

The general set has nothing to do with the choices: the bundled emoji search, or a folder in BEIR's format. A tuned
encoder reads as much of a text as before, so that only the weights differ.

Shapes: S seeds, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rec_r1 import tasks
from rec_r1.config import Recipe, TaskConfig, UserError
from rec_r1.evaluation.significance import bootstrap
from rec_r1.similarity_gap import claims
from rec_r1.similarity_gap.held_out import HeldOut
from rec_r1.similarity_gap.systems import values_of
from rec_r1.similarity_gap.utility import METRICS
from rec_r1.similarity_gap.vectors import Embedded, Vectors
from rec_r1.tasks import Split, Task
from retrievers import Query
from retrievers.encoders.sentence import Encoder
from retrievers.text.dense import Dense

METRIC = "recall@10"
UNCHANGED = "every fit kept the encoder as it was before tuning, because no epoch was better on validation"


class General(NamedTuple):
    """A general set.

    task: the set as a task.
    held_out: all of its queries.
    """

    task: Task
    held_out: HeldOut


def load(folder: Path | None) -> General:
    """The queries of a folder in BEIR's format, or those of the bundled emoji search where there is none.

    folder: of its qrels, test.tsv is taken, or the only file.

    Raises UserError for data that it cannot use.
    """
    task = tasks.load(TaskConfig() if folder is None else _beir(folder))
    parts = list(task.splits.values())
    whole = Split(
        ids=[one for part in parts for one in part.ids],
        queries=[one for part in parts for one in part.queries],
        rows=[one for part in parts for one in part.rows],
        grades=[one for part in parts for one in part.grades],
    )
    return General(task, HeldOut.of(whole))


def _beir(folder: Path) -> TaskConfig:
    there = sorted({path.name.partition(".tsv")[0] for path in folder.glob("qrels/*.tsv*")})
    if "test" not in there and len(there) != 1:
        found = ", ".join(there) or "none"
        raise UserError(
            f"--general: {folder}: it needs qrels/test.tsv, or one file in qrels/ (there: {found}), beside "
            "corpus.jsonl and queries.jsonl: name a folder in BEIR's format"
        )
    # The task takes its other splits out of this one; all of them are put together again.
    splits = {"train": "test" if "test" in there else there[0]}
    return TaskConfig("beir", str(folder), {"test_share": 0.5, "validation_share": 0.5}, splits)


def measure(recipe: Recipe, general: General, frozen: Dense, tuned: Sequence[Dense]) -> tuple[np.ndarray, np.ndarray]:
    """`METRIC` of an encoder before, (1, Q), and after it was tuned with each of S seeds, (S, Q).

    recipe: of the page.
    general: the general set.
    frozen, tuned: the encoder before and after.
    """
    retrievers = [_retriever(general.task, each.encoder) for each in (frozen, *tuned)]
    values = values_of(recipe, general.task, general.held_out, retrievers)[..., METRICS.index(METRIC)]
    return values[:1], values[1:]


def _retriever(task: Task, encoder: Encoder) -> Vectors:
    """The catalogue of the task in an encoder's embeddings, which are kept nowhere: only the ranks are."""

    def embed(queries: Sequence[Query]) -> np.ndarray:
        return encoder.queries([query.text for query in queries])

    about = {"kind": "general", "encoder": encoder.describe(), "catalog": task.catalog.fingerprint}
    return Vectors(about, len(task.catalog), lambda: Embedded(encoder.documents(task.catalog.texts), embed))


def tested(
    general: General, names: tuple[str, str], before: np.ndarray, after: np.ndarray, epochs: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Test the claim that tuning forgets, by the fits that changed the encoder.

    names: of the encoder before and after.
    before, after: (1, Q) and (S, Q), see :func:`measure`.
    epochs: how many epochs of each fit were kept. 0 = the encoder before tuning.

    Returns the row of the claim, see `claims.row`, and what the page shows beside it as plain JSON.
    """
    shown = {
        "name": general.task.name,
        "queries": len(general.held_out.queries),
        "documents": len(general.task.catalog),
        "metric": METRIC,
        "before": {"system": names[0], **bootstrap(before[0])},
        "after": [{"seed": s, "epochs": e, **bootstrap(after[s])} for s, e in enumerate(epochs)],
    }
    changed = [s for s, kept in enumerate(epochs) if kept]
    if not changed:
        return claims.missing(claims.FORGETTING, UNCHANGED), shown
    found = claims.compared(before, after[changed], general.held_out.users)
    # Nobody knows whose queries these are; each was resampled by itself.
    of = {"of": general.task.name, "users": None}
    return claims.row(claims.FORGETTING, METRIC, f"{names[0]}, before tuning", names[1], {**found, **of}), shown
