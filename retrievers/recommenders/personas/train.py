"""Fits the model of `retrievers.recommenders.personas.backend`: item vectors in an IdTable, and shared parameters.

A training example is a sequence that is cut at a random position. The items before the cut are a history, whose
personas are computed as for a query. The loss is the cross-entropy of the items after the cut, over all items that are
not in the history, or over a sample of a large catalogue. The gradient flows through the steps of `fold_in`. A user has
no parameters, so that the fitted model can answer histories of new users.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from retrievers.interactions import Interactions
from retrievers.recommenders.id_table import IdTable
from retrievers.recommenders.personas.model import MAX_HISTORY, fold_in, parameters, places, scores
from retrievers.recommenders.validation import ndcg_of_ranking

MAX_TARGETS = 5  # The targets of an example are the first so many items after the cut.
CHOICES_PER_CUT = 20  # In each epoch, a sequence is cut once per so many items, rounded up.
BATCH = 128  # Examples per step.
BACKGROUND_ITEMS = 512  # A sample of so many items stands for the catalogue in the steps of `fold_in`.
SOFTMAX_ITEMS = 2048  # The loss runs over all items of a catalogue up to this size, and otherwise over so many draws.
MAX_VALIDATION_HISTORIES = 2000  # At most so many validation queries are evaluated after an epoch.
PATIENCE = 8  # The fit ends after so many epochs without a better validation metric.
PROGRESS_FROM = 10_000  # A fit shows a progress bar from so many choices on.


class Fit:
    """A fit of the model.

    interactions: the interactions to fit on.
    settings: the `Params` of the backend.

    Attributes:

    items: (m,) int64, the catalogue rows that occur in the interactions, in ascending order. All other attributes and
        methods number items by their position in this array; -1 = an item that is not in it.
    table, shared: the learned item vectors and shared parameters.
    background, offset: see `fold_in`.
    """

    def __init__(self, interactions: Interactions, settings: Any) -> None:
        self.settings = settings
        self.rng = np.random.default_rng(settings.seed)
        self.items = np.unique(interactions.rows).astype(np.int64)
        number = np.full(interactions.documents, -1, np.int64)
        number[self.items] = np.arange(len(self.items))
        flat = number[interactions.rows]
        self.sequences = np.split(flat, interactions.offsets[1:-1])
        self.counts = np.bincount(flat, minlength=len(self.items))
        self.table = IdTable(settings.dim + 1, hash_bits=settings.hash_bits, seed=settings.seed)
        self.table.see(interactions.rows)
        self.rows = self.table.find(self.items)
        # The initial biases rank the items by popularity.
        shown = np.bincount(self.rows, self.counts, len(self.table.weights))[self.rows]
        self.table.weights[self.rows, -1] = np.log(shown / shown.mean())
        self.shared = parameters(settings.dim)
        self.background, self.offset = self.draw(BACKGROUND_ITEMS)
        held = zip(interactions.validation_histories, interactions.validation_targets, strict=True)
        asked = [(number[list(h)], int(number[t])) for h, t in held if len(h)]
        self.validation = [asked[i] for i in self.rng.permutation(len(asked))[:MAX_VALIDATION_HISTORIES]]

    def run(self) -> dict[str, Any]:
        """Fit for at most ``epochs`` epochs, and keep the epoch with the best ndcg@10 on validation.

        The fit ends earlier after PATIENCE epochs without a better one. Without a validation split, the last epoch is
        kept. Returns a report: the number of items, the epochs that were run, the epoch that was kept (from 1), its
        loss, and its ndcg@10, which is None without validation.
        """
        import torch
        from tqdm import tqdm

        shared = {name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in self.shared.items()}
        optimizer = torch.optim.Adam(shared.values(), lr=self.settings.learning_rate)
        best: tuple[float, int, float] = (-1.0, 0, 0.0)
        kept, epoch, quiet = self.snapshot(shared), 0, self.counts.sum() < PROGRESS_FROM
        bar = tqdm(range(1, self.settings.epochs + 1), "fitting personas", disable=quiet, leave=False)
        for epoch in bar:
            loss = self.epoch(shared, optimizer)
            # Without a validation split, the number of the epoch takes the place of the metric: the last one is best.
            figure = self.validate(shared) if self.validation else float(epoch)
            if figure > best[0]:
                best, kept = (figure, epoch, loss), self.snapshot(shared)
            bar.set_postfix(loss=f"{loss:.3f}", ndcg=f"{figure:.4f}", best=best[1])
            if epoch - best[1] >= PATIENCE:
                break
        state, self.shared = kept
        self.table.load_state(state)
        return {
            "items": len(self.items),
            "epochs": epoch,
            "epoch": best[1],
            "loss": round(best[2], 4),
            "ndcg@10": round(best[0], 4) if self.validation else None,
        }

    def snapshot(self, shared: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Copies of the table and of the shared parameters."""
        return self.table.state(), {name: value.detach().numpy().copy() for name, value in shared.items()}

    def epoch(self, shared: Mapping[str, Any], optimizer: Any) -> float:
        """Train on all examples once. Returns the mean loss."""
        total, seen, batch = 0.0, 0, []
        examples = list(self.examples())
        for start in range(0, len(examples), BATCH):
            batch = examples[start : start + BATCH]
            total += self.step(shared, optimizer, batch) * len(batch)
            seen += len(batch)
        return total / max(1, seen)

    def examples(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the history and the targets of each example, in random order. Items of the history are no targets."""
        cuts = [
            (s, c)
            for s in self.sequences
            if len(s) > 1
            for c in self.rng.integers(1, len(s), -(-len(s) // CHOICES_PER_CUT))
        ]
        for at in self.rng.permutation(len(cuts)):
            sequence, cut = cuts[at]
            history = sequence[max(0, cut - MAX_HISTORY) : cut]
            new = [item for item in dict.fromkeys(sequence[cut:].tolist()) if item not in set(history.tolist())]
            if new:
                yield history, np.array(new[:MAX_TARGETS])

    def step(self, shared: Mapping[str, Any], optimizer: Any, batch: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
        """Train on one batch with one step of Adam, which is row-wise for the items. Returns the loss."""
        import torch

        histories, signed = places([history.tolist() for history, _ in batch])
        asked, offset = self.draw(SOFTMAX_ITEMS, np.unique(np.concatenate([targets for _, targets in batch])))
        used = np.unique(np.concatenate([histories.ravel(), asked, self.background]))
        leaf = torch.from_numpy(self.table.weights[self.rows[used]]).requires_grad_()

        # The gradient of `embedding` is always added in the same order. That of indexing (leaf[…]) is not.
        def items(numbers: np.ndarray) -> Any:
            return torch.nn.functional.embedding(torch.from_numpy(np.searchsorted(used, numbers)), leaf)

        personas, alive = self.fold(shared, items(histories), signed, items(self.background))
        logits = scores(shared, personas, alive, items(asked)) - torch.from_numpy(offset)
        place = np.full(len(self.items), -1)
        place[asked] = np.arange(len(asked))
        own = np.zeros((len(batch), len(asked)), bool)  # Items of the history are left out, as in the metric.
        wanted, share = np.zeros((len(batch), MAX_TARGETS), np.int64), np.zeros((len(batch), MAX_TARGETS), np.float32)
        for b, (history, targets) in enumerate(batch):
            own[b, place[history][place[history] >= 0]] = True
            wanted[b] = place[targets[0]]
            wanted[b, : len(targets)], share[b, : len(targets)] = place[targets], 1 / len(targets)
        likely = logits.masked_fill(torch.from_numpy(own), -torch.inf).log_softmax(1)
        loss = -(likely.gather(1, torch.from_numpy(wanted)) * torch.from_numpy(share)).sum() / len(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert leaf.grad is not None
        self.table.update(self.rows[used], leaf.grad.numpy(), self.settings.learning_rate)
        return float(loss.detach())

    def fold(self, shared: Mapping[str, Any], x: Any, signed: np.ndarray, background: Any) -> tuple[Any, Any]:
        """`fold_in` with the settings of this fit."""
        import torch

        weights, offset = torch.from_numpy(signed), torch.from_numpy(self.offset)
        return fold_in(shared, x, weights, background, offset, self.settings.personas, self.settings.steps)

    def validate(self, shared: Mapping[str, Any]) -> float:
        """The mean ndcg@10 on the validation split. Rankings leave out the history."""
        import torch

        items, gains = torch.from_numpy(self.table.weights[self.rows]), []
        with torch.no_grad():
            for start in range(0, len(self.validation), BATCH):
                part = self.validation[start : start + BATCH]
                histories, signed = places([history.tolist() for history, _ in part])
                personas, alive = self.fold(shared, items[torch.from_numpy(histories)], signed, items[self.background])
                found = scores(shared, personas, alive, items).numpy()
                for row, (history, target) in zip(found, part, strict=True):
                    gains.append(ndcg_of_ranking(row, history[history >= 0].tolist(), int(target)))
        return float(np.mean(gains))

    def draw(self, size: int, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The items of a softmax, (m',) in ascending order, and the offsets of their logits, (m',) float32.

        size: a catalogue up to this size is taken as a whole. Otherwise so many items are drawn, with probabilities
            proportional to counts^0.75 (Mikolov et al. 2013).
        among: items to include in any case. None, the default, = none.

        A logit is to be lowered by its offset, the logarithm of the probability that the item is in the sample. This
        corrects the softmax for the sampling (Bengio and Senécal 2008).
        """
        if len(self.items) <= size:
            return np.arange(len(self.items)), np.zeros(len(self.items), np.float32)
        chance = self.counts**0.75 / (self.counts**0.75).sum()
        drawn = np.unique(self.rng.choice(len(chance), size, p=chance))
        found = drawn if among is None else np.union1d(drawn, among)
        return found, np.log(-np.expm1(size * np.log1p(-chance[found]))).astype(np.float32)
