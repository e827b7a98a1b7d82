"""Fits a sequence model: each prefix of each sequence predicts the next item, and the best epoch on validation is kept.

VQ-Rec and SASRec are fitted by it. The network and the loss are theirs.

Shapes: B sequences per batch, L positions, n items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from retrievers.interactions import Interactions
from retrievers.recommenders.fitted import Model
from retrievers.recommenders.validation import ndcg_of_ranking
from retrievers.types import Query

BATCHES_PER_POOL = 20  # Sequences are sorted by length within so many shuffled batches, which leaves little padding.
MAX_VALIDATION_USERS = 1000  # At most so many validation queries are evaluated after an epoch.
MAX_GRADIENT_NORM = 5.0  # Gradients are clipped to this norm, which protects the first steps.
MAX_COMPETITORS = 20_000  # Where all items of the training split compete, at most so many do in a step.


@dataclass(frozen=True)
class Schedule:
    """The length and the speed of a fit."""

    epochs: int  # At most so many.
    patience: int  # The fit ends after so many epochs without a better validation metric.
    learning_rate: float
    batch: int  # Sequences per step.
    seed: int  # Of the order of the sequences.


class Batch(NamedTuple):
    """A batch of windows.

    inputs: (B, L) int64 rows, padded with the first row of their window.
    targets: (B, L) int64, the row that follows each input. A target of -1 does not count.
    users: (B,) int64, the number of the sequence that each window is cut from.
    """

    inputs: np.ndarray
    targets: np.ndarray
    users: np.ndarray


class OwnOptimizer(Protocol):
    """Parameters that are fitted beside those of the network, with an optimizer of their own."""

    def step(self, learning_rate: float) -> None:
        """Move the parameters by the gradient of the last loss."""
        ...

    def state(self) -> Mapping[str, np.ndarray]:
        """A copy of the parameters."""
        ...

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what :meth:`state` returned."""
        ...


class Windows:
    """Sequences that are cut into windows, so that each prefix is a training example exactly once.

    sequences: one array of rows per user, oldest first.
    length: the largest number of inputs of a window.

    A causal Transformer predicts the next item for all prefixes of a window in one pass. The first window of a sequence
    starts at its beginning. Later windows overlap the one before by a quarter of ``length``, so that their examples
    have from a quarter of ``length`` up to ``length`` items. A window of its own for each example would take ``length``
    times as long.

    Attributes: `rows` holds all items of all sequences. `cuts`, (windows, 3), holds the start of each window in `rows`,
    its number of inputs, and how many of these are examples of the window before. `users`, (windows,), holds the number
    of its sequence.
    """

    def __init__(self, sequences: Sequence[np.ndarray], length: int) -> None:
        self.rows = np.concatenate([*sequences, np.zeros(0, np.int64)]).astype(np.int64)
        cuts, users = [], []
        stride = length - length // 4
        first = 0
        for user, sequence in enumerate(sequences):
            done, inputs = 0, len(sequence) - 1
            while done < inputs:
                end = min(inputs, done + (stride if done else length))
                start = max(0, end - length)
                cuts.append((first + start, end - start, done - start))
                users.append(user)
                done = end
            first += len(sequence)
        self.cuts = np.array(cuts, np.int64).reshape(-1, 3)
        self.users = np.array(users, np.int64)

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """Yield all windows in random order.

        size: B.
        rng: the random numbers.
        """
        order = rng.permutation(len(self.cuts))
        pool = size * BATCHES_PER_POOL
        groups = []
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            part = part[np.argsort(self.cuts[part, 1], kind="stable")]
            groups += [part[i : i + size] for i in range(0, len(part), size)]
        for g in rng.permutation(len(groups)):
            starts, lengths, answered = self.cuts[groups[g]].T
            places = np.arange(lengths.max())
            inside = places < lengths[:, None]
            at = np.where(inside, starts[:, None] + places, 0)
            inputs = np.where(inside, self.rows[at], self.rows[starts][:, None])
            counted = inside & (places >= answered[:, None])
            targets = np.where(counted, self.rows[np.where(inside, at + 1, 0)], -1)
            yield Batch(inputs, targets, self.users[groups[g]])


def optimise(
    parameters: Sequence[Any],
    loss: Callable[[Batch, int], Any],
    windows: Windows,
    schedule: Schedule,
    measure: Callable[[], float | None],
    name: str,
    own: OwnOptimizer | None = None,
) -> dict[str, Any]:
    """Fit ``parameters`` with Adam, and keep their values of the best epoch.

    parameters: the torch parameters to fit.
    loss: takes a batch and the epoch, and returns a scalar tensor.
    windows: the training examples.
    schedule: the length and the speed.
    measure: the validation metric, which is called before the first and after each epoch; larger is better. Where it
        returns None, there is no validation split, and the last epoch is kept.
    name: the label of the progress bar.
    own: parameters with an optimizer of their own. None, the default, = there are none.

    Returns a report: `epochs`, the epoch that is kept (0 = before the first); `ran`, the epochs that were run;
    `before`, the metric before the first epoch; `ndcg@10`, that of each epoch; `loss`, the mean loss of the last epoch.

    Raises ValueError for a loss that is not finite.
    """
    import torch
    from tqdm import tqdm

    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, lr=schedule.learning_rate)
    rng = np.random.default_rng(schedule.seed)
    best, kept, curve, mean = 0, _copies(parameters, own), [], float("nan")
    first = measure()
    highest = -np.inf if first is None else first
    progress = tqdm(range(1, schedule.epochs + 1), name, leave=False, disable=None)
    for epoch in progress:
        total, batches = 0.0, 0
        for batch in windows.batches(schedule.batch, rng):
            if not (batch.targets >= 0).any():
                continue
            value = loss(batch, epoch)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimizer.step()
            if own is not None:
                own.step(schedule.learning_rate)
            total, batches = total + value.item(), batches + 1
        mean = total / max(1, batches)
        if not np.isfinite(mean):  # Without a validation split, weights that are no numbers would be kept.
            raise ValueError(
                f"retriever.params.learning_rate: the loss is {mean} in epoch {epoch}: lower it, "
                f"{schedule.learning_rate:g} is too high"
            )
        figure = measure()
        progress.set_postfix(loss=f"{mean:.3f}", ndcg10="-" if figure is None else f"{figure:.4f}")
        curve.append(None if figure is None else round(figure, 6))
        if figure is None or figure > highest:
            best, kept, highest = epoch, _copies(parameters, own), figure if figure is not None else highest
        elif epoch - best >= schedule.patience:
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, kept[0], strict=True):
            parameter.copy_(value)
    if own is not None:
        own.load_state(kept[1])
    return {
        "epochs": best,
        "ran": len(curve),
        "before": None if first is None else round(first, 6),
        "ndcg@10": curve,
        "loss": round(mean, 6),
    }


def ndcg_at_10(model: Model, interactions: Interactions) -> float | None:
    """The mean ndcg@10 of a model on the validation split, or None without one. Rankings leave out the history."""
    if not len(interactions.validation_targets):
        return None
    queries, targets = interactions.validation_queries()
    chosen = np.arange(len(queries))
    if len(queries) > MAX_VALIDATION_USERS:
        chosen = np.sort(np.random.default_rng(0).choice(len(queries), MAX_VALIDATION_USERS, replace=False))
    total = 0.0
    for start in range(0, len(chosen), 256):
        part: list[Query] = [queries[q] for q in chosen[start : start + 256]]
        scores = np.array(model.scores(part))
        for q, query, row in zip(chosen[start : start + 256], part, scores, strict=True):
            total += ndcg_of_ranking(row, query.history, int(targets[q][0]))
    return total / len(chosen)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's random numbers in this block. Afterwards their previous state is restored."""
    import torch

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def competitors(warm: np.ndarray, negatives: int | None, seed: int) -> Callable[[], np.ndarray]:
    """A function that returns the negatives of a step: all ``warm`` rows, or a new random sample of them.

    warm: the rows of the training split. Other items are no negatives, because they are never targets and their scores
        would only fall.
    negatives: the size of the sample. None = all rows, at most `MAX_COMPETITORS`.
    seed: of the samples.
    """
    limit = negatives or MAX_COMPETITORS
    if limit >= len(warm):
        return lambda: warm
    rng = np.random.default_rng(seed)
    return lambda: rng.choice(warm, limit, replace=False)


def torch_device(device: str | None) -> str:
    """The device to compute on. None = a GPU where there is one."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _copies(parameters: Sequence[Any], own: OwnOptimizer | None) -> tuple[list[Any], Mapping[str, np.ndarray]]:
    return [parameter.detach().clone() for parameter in parameters], {} if own is None else own.state()
