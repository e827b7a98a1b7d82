"""Embeddings by id, which VQ-Rec can add to those of its codes. They learn what the text of an item does not say.

This follows UniSRec (Hou et al. 2022, "Towards Universal Sequence Representation Learning for Recommender Systems",
arXiv:2206.05941), whose transductive setting adds an embedding by id to that of the text. The embeddings and their
optimizer are in an :class:`IdTable`.

Items that are not in the training split, or not often enough, share one embedding, which is 0 at the start. Where every
item of the training split has its own embedding, this one stays 0, and the other items are ranked by their codes alone.
Otherwise it learns from the rare items, and also affects the ranking of the cold ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.recommenders.id_table import SHARED_ROW, IdTable
from retrievers.recommenders.vqrec.codes import arrays

FILE = "ids.npz"


class Ids:
    """The embeddings by id of a catalogue's n items, with h dimensions.

    table: the table with the embeddings. Its ids are catalogue rows.
    documents: n.

    The attribute `rows`, (n,) int64, holds the row of each item in the table.
    """

    def __init__(self, table: IdTable, documents: int) -> None:
        self.table, self.rows = table, table.find(np.arange(documents))
        self._step: tuple[np.ndarray, Any] | None = None

    @classmethod
    def load(cls, folder: Path, documents: int, dim: int) -> Ids:
        """Load what :meth:`save` wrote into ``folder``.

        documents: n.
        dim: h.

        Raises ValueError, KeyError or OSError where the file is damaged or has another number of dimensions.
        """
        table = IdTable.saved(arrays(folder / FILE))
        if table.dim != dim:
            raise ValueError(f"{FILE} has embeddings of {table.dim} dimensions instead of {dim}")
        return cls(table, documents)

    def save(self, folder: Path) -> None:
        """Write the whole table into ``folder``, with its counts and the moments of its optimizer."""
        np.savez(folder / FILE, **self.table.state())  # type: ignore[arg-type]

    def vectors(self, device: Any) -> Any:
        """The embeddings of all items, as a tensor on ``device``: (n, h) float32."""
        import torch

        return torch.from_numpy(self.table.weights[self.rows]).to(device)

    def trainable(self, documents: np.ndarray, device: Any) -> Any:
        """The embeddings of m items, as a tensor on ``device`` that collects a gradient for :meth:`step`: (m, h).

        documents: (m,) rows of the catalogue.
        """
        import torch

        rows = self.rows[documents]
        leaf = torch.from_numpy(self.table.weights[rows]).requires_grad_()
        self._step = rows, leaf
        return leaf.to(device)

    def step(self, learning_rate: float) -> None:
        """Move the embeddings that :meth:`trainable` returned last, by their gradient."""
        assert self._step is not None and self._step[1].grad is not None
        rows, leaf = self._step
        self.table.update(rows, leaf.grad.numpy(), learning_rate)
        self._step = None

    def state(self) -> dict[str, np.ndarray]:
        """A copy of the whole table, with its counts and the moments of its optimizer."""
        return self.table.state()

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what :meth:`state` returned."""
        self.table.load_state(state)


def ids_for_fit(
    shown: np.ndarray, documents: int, dim: int, admit_after: int, hash_bits: int | None, scale: float, seed: int
) -> Ids:
    """New embeddings by id for a fit.

    shown: (C,) catalogue rows, one per choice in the training split.
    documents: n.
    dim: h.
    admit_after, hash_bits, scale, seed: see :class:`IdTable`. With ``hash_bits``, every item has an embedding, which it
        shares with the items that have the same hash.
    """
    table = IdTable(dim, admit_after, hash_bits=hash_bits, scale=scale, seed=seed)
    table.see(shown.astype(np.int64))
    if hash_bits is None:
        table.weights[SHARED_ROW] = 0
    return Ids(table, documents)
