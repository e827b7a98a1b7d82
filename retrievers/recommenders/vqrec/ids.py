"""Embeddings by id beside VQ-Rec's codes: what training showed of a document and its text does not say.

After UniSRec (Hou et al. 2022, "Towards Universal Sequence Representation Learning for Recommender Systems",
arXiv:2206.05941), whose transductive setting adds an embedding by id to that of the text. They live in an
:class:`IdTable`, with its optimizer. Documents that training does not show, or not often enough, share one row, zero at
the start: where every document that it shows has a row of its own, cold ones are ranked by their codes as before, and
otherwise by what the row learnt from the rare ones, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from retrievers.recommenders.id_table import SHARED_ROW, IdTable
from retrievers.recommenders.vqrec.codes import arrays

FILE = "ids.npz"


class Ids:
    """The embeddings of a catalogue's n documents, h dimensions each. rows: (n,) int64, theirs in the table."""

    def __init__(self, table: IdTable, documents: int) -> None:
        self.table, self.rows = table, table.find(np.arange(documents))
        self._step: tuple[np.ndarray, Any] | None = None

    @classmethod
    def load(cls, folder: Path, documents: int, dim: int) -> Ids:
        """What :meth:`save` wrote. Raises ValueError, KeyError or OSError where it is damaged or has another width."""
        table = IdTable.saved(arrays(folder / FILE))
        if table.dim != dim:
            raise ValueError(f"{FILE} has embeddings of {table.dim} dimensions instead of {dim}")
        return cls(table, documents)

    def save(self, folder: Path) -> None:
        """The whole table, with its counts and moments."""
        np.savez(folder / FILE, **self.table.state())  # type: ignore[arg-type]

    def vectors(self, device: Any) -> Any:
        """(n, h) float32, of all documents."""
        import torch

        return torch.from_numpy(self.table.weights[self.rows]).to(device)

    def learning(self, documents: np.ndarray, device: Any) -> Any:
        """(m,) rows of the catalogue -> (m, h) embeddings that gather a gradient for :meth:`step`."""
        import torch

        rows = self.rows[documents]
        leaf = torch.from_numpy(self.table.weights[rows]).requires_grad_()
        self._step = rows, leaf
        return leaf.to(device)

    def step(self, learning_rate: float) -> None:
        """Move what :meth:`learning` gave last by its gradient."""
        assert self._step is not None and self._step[1].grad is not None
        rows, leaf = self._step
        self.table.update(rows, leaf.grad.numpy(), learning_rate)
        self._step = None


def admitted(
    shown: np.ndarray, documents: int, dim: int, admit_after: int, hash_bits: int | None, scale: float, seed: int
) -> Ids:
    """Fresh embeddings for the documents ``shown``, (C,) rows, one for each choice of training. With ``hash_bits``
    every document has one, and shares it with those whose hash is the same."""
    table = IdTable(dim, admit_after, hash_bits=hash_bits, scale=scale, seed=seed)
    table.see(shown.astype(np.int64))
    if hash_bits is None:
        table.weights[SHARED_ROW] = 0
    return Ids(table, documents)
