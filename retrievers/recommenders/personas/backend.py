"""A recommender that represents a user by several vectors, the personas, and weights them by attention for each item.

It follows AMP-CF (Barkan, Fuchs, Caciularu and Koenigstein 2020, "Explainable recommendations via attentive
multi-persona collaborative filtering", arXiv:2010.07042). For personas u_1 … u_P of a user and an item with vector v
and bias b

    score(u, i) = sum_p a_p (u_p · v) + b,     a = softmax_p(s cos(A u_p, B v))

This is the score that a public reimplementation of the paper computes; the text of the paper was not available. The
attention weights are cosines in a space of their own (A and B), and the score is the inner product of the item with the
weighted sum of the personas. Three things are ours: the factor s, which is learned and the same for all users (without
it the attention is nearly uniform); personas that are computed from a history and not read from a table of users; and a
loss without entropy terms (see `personas/train.py`).

The personas of a history start as the means of clusters of its items' vectors. A few gradient steps then increase the
likelihood of the history, with fixed item vectors (`personas/model.py`). Items with a negative weight in
``Query.weights`` start no persona, and the steps move the personas away from them.

An item that is not in the training split has no vector. It is not retrieved, and is ignored in a history; a history of
only such items retrieves nothing. :func:`explain` names the items of the history that a persona stands for.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.parameters import MAX_SEED, Checks
from retrievers.interactions import Interactions, history_matrix
from retrievers.recommenders.fitted import ByHistory, fitted
from retrievers.recommenders.id_table import IdTable
from retrievers.recommenders.personas.scoring import Items
from retrievers.types import Query

INDEX_FORMAT = 1
MAX_EXPLAINING_ITEMS = 3  # An explanation names at most so many items of the history.


@dataclass(frozen=True)
class Params:
    """The parameters of `personas`. Raises ValueError, naming the field, for a bad value."""

    personas: int = 4  # P, the number of personas of a user. 1: one vector for each user.
    dim: int = 32  # The length of the vectors.
    steps: int = 3  # How many gradient steps move the personas of a history towards its items.
    epochs: int = 60  # The largest number of epochs of the fit; validation choices may end it earlier.
    learning_rate: float = 0.01  # The learning rate of the fit.
    # Items with the same hash share one of 2^hash_bits vectors. null: each item has its own.
    hash_bits: int | None = None
    seed: int = 0  # The seed of the fit.

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.integers("personas", most=64)
        checks.integers("dim", least=2, most=1024)
        checks.integers("steps", least=0, most=100)
        checks.integers("epochs", most=10_000)
        checks.integers("seed", least=0, most=MAX_SEED)
        checks.integers("hash_bits", most=30, optional=True)
        checks.numbers("learning_rate", above=True, most=1)
        checks.raise_all()


class Explanation(NamedTuple):
    """Why an item has its rank.

    persona: the number, from 0, of the persona with the largest attention to the item.
    attention: (P',) the attention of each of the P' personas of the history; it sums to 1.
    rows: at most MAX_EXPLAINING_ITEMS rows of the history, the one nearest to the persona first.
    cosines: the cosine of each of these rows with the persona.
    score: the score of the item.
    """

    persona: int
    attention: tuple[float, ...]
    rows: tuple[int, ...]
    cosines: tuple[float, ...]
    score: float


class Model:
    """The fitted model; see :class:`retrievers.recommenders.fitted.Model`.

    folder: the folder with the files that `build` saved.

    Its attribute `items` holds the m items of the training split, as ascending rows of the catalogue, and `vectors`
    their vectors and biases, (m, d + 1) float32.
    """

    def __init__(self, folder: Path) -> None:
        try:
            with np.load(folder / "table.npz") as state, np.load(folder / "model.npz") as found:
                values = {name: found[name] for name in found.files}
                table = IdTable.saved(state)
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(str(error)) from error
        self.items, self.vectors = values["items"], table.weights[table.find(values["items"])]
        self._background, self._offset = self.vectors[values["background"]], values["offset"]
        self._count, self._steps, self._documents = (int(x) for x in values["settings"])
        self._shared = {name.removeprefix("shared_"): array for name, array in values.items() if "shared_" in name}
        self._number = np.full(self._documents, -1, np.int64)
        self._number[self.items] = np.arange(len(self.items))
        keys = self.vectors[:, :-1] @ self._shared["item_key"].T
        self.blocks = Items(self.vectors, keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-6))

    def personas(self, query: Query) -> tuple[np.ndarray, np.ndarray] | None:
        """The P' <= P personas of a query's history, and their keys.

        The personas are (P', d + 1) float32; the last column is 1, so that the product with an item includes its bias.
        The keys are (P', d) float32, multiplied by the factor s of the attention. The result is None where no item of
        the history has a vector.
        """
        import torch

        from retrievers.recommenders.personas.model import fold_in, keys_of, places

        history = self._number[list(query.history)]
        # Each query is computed alone, so that its result does not depend on a batch.
        rows, signed = places([history.tolist()], [query.weights])
        if not signed.any():
            return None
        p = {name: torch.from_numpy(array) for name, array in self._shared.items()}
        own, weights = torch.from_numpy(self.vectors[rows]), torch.from_numpy(signed)
        background, offset = torch.from_numpy(self._background), torch.from_numpy(self._offset)
        with torch.no_grad():
            found, alive = fold_in(p, own, weights, background, offset, self._count, self._steps)
            keys = (p["sharpness"].exp() * keys_of(found, p["user_key"]))[0][alive[0]].numpy()
        personas = found[0][alive[0]].numpy()
        return np.concatenate([personas, np.ones((len(personas), 1), np.float32)], 1), keys

    def scores(self, queries: Sequence[Query]) -> np.ndarray:
        """The scores of Q queries: (Q, n) float32, -inf for items without a vector.

        Raises ValueError for a row outside the catalogue, and for weights that are not as many as the history's items.
        """
        history_matrix(queries, self._documents)  # This checks the histories.
        found = np.full((len(queries), self._documents), -np.inf, np.float32)
        for q, query in enumerate(queries):
            user = self.personas(query)
            if user is not None:
                found[q, self.items] = self.blocks.scores(*user)
        return found

    def explain(self, query: Query, row: int) -> Explanation | None:
        """See :func:`explain`."""
        history_matrix([query], self._documents)
        user, number = self.personas(query), self._number[row]
        if user is None or number < 0:
            return None
        attention = self.blocks.attention(user[1], int(number))
        persona = int(attention.argmax())
        liked = query.weights or (1.0,) * len(query.history)
        rows = np.array(list(dict.fromkeys(r for r, w in zip(query.history, liked, strict=True) if w > 0)), np.int64)
        rows = rows[self._number[rows] >= 0]
        vectors, vector = self.vectors[self._number[rows], :-1], user[0][persona, :-1]
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(vector)
        cosines = vectors @ vector / np.maximum(norms, 1e-12)
        order = np.argsort(-cosines, kind="stable")[:MAX_EXPLAINING_ITEMS]
        score = float(self.blocks.scores(*user)[number])
        return Explanation(
            persona, tuple(attention.tolist()), tuple(rows[order].tolist()), tuple(cosines[order].tolist()), score
        )


def explain(retriever: ByHistory, query: Query, row: int) -> Explanation | None:
    """Explain the score of an item: which persona has the most attention, and which items of the history it stands for.

    retriever: a retriever of kind "personas".
    query: a query with a history.
    row: the row of the item.

    Returns None where the item is not retrieved.

        explain(retriever, Query(history=(3, 14)), row=15).rows  # rows of the history, such as (14, 3)

    Raises ValueError for a row outside the catalogue, and for a retriever of another kind.
    """
    if not isinstance(retriever.model, Model):
        raise ValueError(f"a retriever of kind {retriever.kind} has no personas: open one of kind 'personas'")
    if not 0 <= row < len(retriever):
        raise ValueError(f"row {row} is outside the catalogue's rows 0 to {len(retriever) - 1}: use catalog.row(id)")
    return retriever.model.explain(query, row)


def build(
    catalog: Catalog, folder: str | Path | None = None, interactions: Interactions | None = None, **params: Any
) -> ByHistory:
    """Fit the personas model, or open the one in ``folder``.

    params: see :class:`Params`. The other arguments are those of :func:`retrievers.recommenders.fitted.fitted`.

    Raises ValueError for a bad parameter, and the errors of `fitted`.
    """
    settings = Params(**params)

    def fit(temporary: Path, given: Interactions) -> Mapping[str, Any]:
        from retrievers.recommenders.personas.train import Fit

        fitting = Fit(given, settings)
        report = fitting.run()
        np.savez(temporary / "table.npz", **fitting.table.state())  # type: ignore[arg-type]
        np.savez(
            temporary / "model.npz",
            items=fitting.items,
            background=fitting.background,
            offset=fitting.offset,
            settings=np.array([settings.personas, settings.steps, given.documents]),
            **{f"shared_{name}": array for name, array in fitting.shared.items()},  # type: ignore[arg-type]
        )
        return report

    described = {name: getattr(settings, name) for name in Params.__dataclass_fields__}
    return fitted("personas", INDEX_FORMAT, catalog, folder, interactions, described, fit, Model, floor=-np.inf)
