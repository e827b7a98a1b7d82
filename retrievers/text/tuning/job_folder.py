"""The folder of a fit, as the process that tunes the encoder reads it. `job.py` writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog

ENCODER = "encoder"  # The folder of the tuned model, in the folder of a fit and in that of an index.
ERROR = "error.txt"  # The file with the message of a mistake that a user can fix.


class Job:
    """What `job.py` wrote into a folder: settings, pairs, texts, and the frozen embeddings where they are needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        self.tuned: dict[str, Any] = self.settings["tuned"]
        texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
        self.queries: list[str] = texts["queries"]
        self.held_out: list[str] = texts["held_out"]
        self.documents: Sequence[str] = Catalog.load(folder / "catalog").texts
        with np.load(folder / "pairs.npz") as arrays:
            self.arrays: dict[str, np.ndarray] = {name: arrays[name] for name in arrays.files}

    @property
    def epoch_size(self) -> int:
        """P, the number of pairs in an epoch."""
        return len(self.arrays["row"]) // int(self.tuned["epochs"])

    @property
    def steps(self) -> int:
        """The number of steps in an epoch."""
        return equal_batches(self.epoch_size, int(self.tuned["batch_size"]))[0]

    @property
    def batch_size(self) -> int:
        """The number of pairs in a step, the same in all."""
        return equal_batches(self.epoch_size, int(self.tuned["batch_size"]))[1]

    def query(self, text: str) -> str:
        """A query as the encoder gets it."""
        return str(self.settings["encoder"]["query_prefix"]) + text

    def document(self, row: int) -> str:
        """A document as the encoder gets it."""
        return str(self.settings["encoder"]["document_prefix"]) + self.documents[row]

    def columns(self, pairs: Sequence[int]) -> dict[str, list[Any]]:
        """The texts and the label of each pair, as `Objective` takes them; in place of a negative that there is not,
        the positive's text."""
        arrays = self.arrays
        rows = np.concatenate([arrays["row"][pairs, None], arrays["negatives"][pairs]], axis=1)
        out: dict[str, list[Any]] = {"query": [self.query(self.queries[q]) for q in arrays["query"][pairs]]}
        for m in range(rows.shape[1]):
            shown = np.where(rows[:, m] < 0, rows[:, 0], rows[:, m])
            out["positive" if m == 0 else f"negative_{m}"] = [self.document(int(row)) for row in shown]
        numbers = np.stack([arrays["group"][pairs], arrays["query"][pairs]], axis=1)
        out["label"] = np.concatenate([numbers, rows], axis=1).tolist()
        return out

    def listed(self, name: str, number: int) -> np.ndarray:
        """One list of several that are stored in one array with their offsets, such as the relevant rows of a query."""
        offsets = self.arrays[f"{name}_offsets"]
        return self.arrays[name][offsets[number] : offsets[number + 1]]


def equal_batches(pairs: int, most: int) -> tuple[int, int]:
    """The number of steps and the size of each, at most ``most``, in which an epoch uses as many pairs as it can.

    Either the size is ``most``, and the rest is left out, or there is one step more, and all are a little smaller.
    """
    steps = -(-pairs // most)
    choices = [(steps, pairs // steps), (pairs // most, most)]
    return max(choices, key=lambda choice: choice[0] * choice[1])
