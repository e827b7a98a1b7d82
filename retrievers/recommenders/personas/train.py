"""Training for `retrievers.recommenders.personas.backend`: item vectors in an IdTable, and what all users share.

An example cuts a sequence at a random place. The part before is folded in exactly as a query will be, the loss is the
cross-entropy of what came after over the items that are not in the history (all, or a sample of a large catalogue),
and its gradient goes back through the steps of the fold-in. So a user has no parameters of their own to be lost, and
training does what the test will ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from retrievers.interactions import Interactions
from retrievers.recommenders.id_table import IdTable
from retrievers.recommenders.personas.model import MAX_HISTORY, fold_in, parameters, places, scores
from retrievers.recommenders.validation import gain

MAX_TARGETS = 5  # choices after a cut that an example asks for
CHOICES_PER_CUT = 20  # an epoch cuts a sequence once for so many choices
BATCH = 128
BACKGROUND_ITEMS = 512  # items that stand for all others in the steps of a fold-in
SOFTMAX_ITEMS = 2048  # items up to which the loss runs over all of them; beyond, over as many that are drawn
MAX_VALIDATION_HISTORIES = 2000  # histories that an epoch is judged by, at most
PATIENCE = 8  # epochs without a better one
PROGRESS_FROM = 10_000  # choices from which on a fit shows its progress


class Fit:
    """A training. items: (m,) int64 catalogue rows that the interactions show, ascending; all else here speaks of
    their numbers, -1 = another. table, shared: what is learned. background, offset: see `fold_in`."""

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
        # Begin as popularity does: before anything is learned, the bias ranks by counts.
        shown = np.bincount(self.rows, self.counts, len(self.table.weights))[self.rows]
        self.table.weights[self.rows, -1] = np.log(shown / shown.mean())
        self.shared = parameters(settings.dim)
        self.background, self.offset = self.draw(BACKGROUND_ITEMS)
        held = zip(interactions.validation_histories, interactions.validation_targets, strict=True)
        asked = [(number[list(h)], int(number[t])) for h, t in held if len(h)]
        self.validation = [asked[i] for i in self.rng.permutation(len(asked))[:MAX_VALIDATION_HISTORIES]]

    def run(self) -> dict[str, Any]:
        """Trains until ``epochs`` are over or validation has not improved for PATIENCE of them; keeps the best. The
        report: items, epochs run, the one kept (from 1), its loss and validation figure, None without validation."""
        import torch
        from tqdm import tqdm

        shared = {name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in self.shared.items()}
        optimizer = torch.optim.Adam(shared.values(), lr=self.settings.learning_rate)
        best: tuple[float, int, float] = (-1.0, 0, 0.0)
        kept, epoch, quiet = self.snapshot(shared), 0, self.counts.sum() < PROGRESS_FROM
        bar = tqdm(range(1, self.settings.epochs + 1), "fitting personas", disable=quiet, leave=False)
        for epoch in bar:
            loss = self.epoch(shared, optimizer)
            figure = self.validate(shared) if self.validation else float(epoch)  # without: the last is kept
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
        return self.table.state(), {name: value.detach().numpy().copy() for name, value in shared.items()}

    def epoch(self, shared: Mapping[str, Any], optimizer: Any) -> float:
        """The mean loss of one pass."""
        total, seen, batch = 0.0, 0, []
        examples = list(self.examples())
        for start in range(0, len(examples), BATCH):
            batch = examples[start : start + BATCH]
            total += self.step(shared, optimizer, batch) * len(batch)
            seen += len(batch)
        return total / max(1, seen)

    def examples(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(history, what came next) in random order; what the history holds already is no target."""
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
        """One step of Adam, row-wise for the items; the batch's loss."""
        import torch

        histories, signed = places([history.tolist() for history, _ in batch])
        asked, offset = self.draw(SOFTMAX_ITEMS, np.unique(np.concatenate([targets for _, targets in batch])))
        used = np.unique(np.concatenate([histories.ravel(), asked, self.background]))
        leaf = torch.from_numpy(self.table.weights[self.rows[used]]).requires_grad_()

        def items(numbers: np.ndarray) -> Any:  # its gradient is summed in one order, that of an index is not
            return torch.nn.functional.embedding(torch.from_numpy(np.searchsorted(used, numbers)), leaf)

        personas, alive = self.fold(shared, items(histories), signed, items(self.background))
        logits = scores(shared, personas, alive, items(asked)) - torch.from_numpy(offset)
        place = np.full(len(self.items), -1)
        place[asked] = np.arange(len(asked))
        own = np.zeros((len(batch), len(asked)), bool)  # a shop leaves out what the user has, and so does the metric
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
        import torch

        weights, offset = torch.from_numpy(signed), torch.from_numpy(self.offset)
        return fold_in(shared, x, weights, background, offset, self.settings.personas, self.settings.steps)

    def validate(self, shared: Mapping[str, Any]) -> float:
        """ndcg@10 of the held-out choices, with the history left out."""
        import torch

        items, gains = torch.from_numpy(self.table.weights[self.rows]), []
        with torch.no_grad():
            for start in range(0, len(self.validation), BATCH):
                part = self.validation[start : start + BATCH]
                histories, signed = places([history.tolist() for history, _ in part])
                personas, alive = self.fold(shared, items[torch.from_numpy(histories)], signed, items[self.background])
                found = scores(shared, personas, alive, items).numpy()
                for row, (history, target) in zip(found, part, strict=True):
                    gains.append(gain(row, history[history >= 0].tolist(), int(target)))
        return float(np.mean(gains))

    def draw(self, size: int, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(m',) ascending items of a softmax, and how much their logits are to be lowered (float32): all, or ``size``
        draws by counts^0.75 (Mikolov et al. 2013) beside ``among``. Lowered by the log of its chance to be drawn, an
        item stands for as many as it should (Bengio and Senécal 2008)."""
        if len(self.items) <= size:
            return np.arange(len(self.items)), np.zeros(len(self.items), np.float32)
        chance = self.counts**0.75 / (self.counts**0.75).sum()
        drawn = np.unique(self.rng.choice(len(chance), size, p=chance))
        found = drawn if among is None else np.union1d(drawn, among)
        return found, np.log(-np.expm1(size * np.log1p(-chance[found]))).astype(np.float32)
