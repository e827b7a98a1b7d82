"""Fits VQ-Rec: each prefix of each sequence predicts the next item, and the best epoch on validation is kept.

Shapes: B sequences per batch, L positions, P prefixes per batch, m items in the softmax of a batch, n items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from retrievers.interactions import Interactions
from retrievers.recommenders.validation import ndcg_of_ranking
from retrievers.recommenders.vqrec.ids import Ids
from retrievers.recommenders.vqrec.model import TEMPERATURE, encode, item_vectors
from retrievers.types import Query

BATCHES_PER_POOL = 20  # Sequences are sorted by length within so many shuffled batches, which leaves little padding.
MAX_VALIDATION_USERS = 1000  # At most so many validation queries are evaluated after an epoch.
MAX_GRADIENT_NORM = 5.0  # Gradients are clipped to this norm, which protects the first steps.


@dataclass(frozen=True)
class Schedule:
    """The length and the speed of a fit."""

    epochs: int  # At most so many.
    patience: int  # The fit ends after so many epochs without a better validation metric.
    learning_rate: float
    batch: int  # Sequences per step.
    seed: int  # Of the order of the sequences.


class Windows:
    """Sequences that are cut into windows, so that each prefix is a training example exactly once.

    sequences: one array of rows per user, oldest first.
    length: the largest number of inputs of a window.

    A causal Transformer predicts the next item for all prefixes of a window in one pass. The first window of a sequence
    starts at its beginning. Later windows overlap the one before by a quarter of ``length``, so that their examples
    have from a quarter of ``length`` up to ``length`` items. A window of its own for each example would take ``length``
    times as long.

    Attributes: `rows` holds all items of all sequences. `cuts`, (windows, 3), holds the start of each window in `rows`,
    its number of inputs, and how many of these are examples of the window before.
    """

    def __init__(self, sequences: Sequence[np.ndarray], length: int) -> None:
        self.rows = np.concatenate([*sequences, np.zeros(0, np.int64)]).astype(np.int64)
        cuts = []
        stride = length - length // 4
        first = 0
        for sequence in sequences:
            done, inputs = 0, len(sequence) - 1
            while done < inputs:
                end = min(inputs, done + (stride if done else length))
                start = max(0, end - length)
                cuts.append((first + start, end - start, done - start))
                done = end
            first += len(sequence)
        self.cuts = np.array(cuts, np.int64).reshape(-1, 3)

    def batches(self, size: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield all windows in random order, as (B, L) int64 inputs and (B, L) int64 targets.

        size: B.
        rng: the random numbers.

        Inputs are padded with the first row of their window. A target of -1 does not count.
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
            yield inputs, targets


def next_item_loss(
    net: Any,
    heads: int,
    features: Any,
    inputs: np.ndarray,
    targets: np.ndarray,
    compete: np.ndarray | None,
    table: Any = None,
    fakes: Callable[[Any], Any] | None = None,
    ids: Ids | None = None,
) -> Any:
    """The mean cross-entropy of the targets, a scalar tensor. The logits are cosines, divided by τ.

    net, heads: the network, and its number of attention heads.
    features: (n, M) uint8 codes or (n, d) text embeddings of all items.
    inputs, targets: (B, L) rows, see :meth:`Windows.batches`.
    compete: rows of negatives, in addition to all items of the batch. None = only the items of the batch.
    table: code embeddings to use instead of the network's, see :func:`item_vectors`.
    fakes: takes the (P, M) codes of the targets, and returns (P, M) codes of one further negative each.
    ids: the embeddings by id to add.
    """
    import torch
    from torch.nn.functional import cross_entropy, embedding, normalize

    own = np.concatenate([inputs.ravel(), targets[targets >= 0]])
    rows = np.unique(own if compete is None else np.concatenate([own, compete]))
    device = features.device
    raw = item_vectors(net, features[torch.from_numpy(rows).to(device)], table)
    if ids is not None:
        raw = raw + ids.trainable(rows, device)
    # raw[…] is not used, because threads add its gradient in a random order.
    hidden = encode(net, embedding(torch.from_numpy(np.searchsorted(rows, inputs)).to(device), raw), heads)
    wanted = normalize(hidden[torch.from_numpy(targets >= 0).to(device)], dim=1)
    logits = wanted @ normalize(raw, dim=1).T / TEMPERATURE
    answers = targets[targets >= 0]
    if fakes is not None:
        made = normalize(item_vectors(net, fakes(features[torch.from_numpy(answers).to(device)]), table), dim=1)
        logits = torch.cat([logits, (wanted * made).sum(1, keepdim=True) / TEMPERATURE], 1)
    return cross_entropy(logits, torch.from_numpy(np.searchsorted(rows, answers)).to(device))


def optimise(
    parameters: Sequence[Any],
    loss: Callable[[np.ndarray, np.ndarray, int], Any],
    windows: Windows,
    schedule: Schedule,
    measure: Callable[[], float | None],
    name: str,
    ids: Ids | None = None,
) -> dict[str, Any]:
    """Fit ``parameters`` with Adam, and keep their values of the best epoch.

    parameters: the torch parameters to fit.
    loss: takes inputs, targets and the epoch, and returns a scalar tensor.
    windows: the training examples.
    schedule: the length and the speed.
    measure: the validation metric, which is called before the first and after each epoch; larger is better. Where it
        returns None, there is no validation split, and the last epoch is kept.
    name: the label of the progress bar.
    ids: embeddings by id to fit, with their own optimizer. None, the default, = there are none.

    Returns a report: `epochs`, the epoch that is kept (0 = before the first); `ran`, the epochs that were run;
    `before`, the metric before the first epoch; `ndcg@10`, that of each epoch; `loss`, the mean loss of the last epoch.
    """
    import torch
    from tqdm import tqdm

    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, lr=schedule.learning_rate)
    rng = np.random.default_rng(schedule.seed)
    best, kept, curve, mean = 0, _copies(parameters, ids), [], float("nan")
    first = measure()
    highest = -np.inf if first is None else first
    progress = tqdm(range(1, schedule.epochs + 1), name, leave=False, disable=None)
    for epoch in progress:
        total, batches = 0.0, 0
        for inputs, targets in windows.batches(schedule.batch, rng):
            if not (targets >= 0).any():
                continue
            value = loss(inputs, targets, epoch)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimizer.step()
            if ids is not None:
                ids.step(schedule.learning_rate)
            total, batches = total + value.item(), batches + 1
        mean = total / max(1, batches)
        figure = measure()
        progress.set_postfix(loss=f"{mean:.3f}", ndcg10="-" if figure is None else f"{figure:.4f}")
        curve.append(None if figure is None else round(figure, 6))
        if figure is None or figure > highest:
            best, kept, highest = epoch, _copies(parameters, ids), figure if figure is not None else highest
        elif epoch - best >= schedule.patience:
            break
    with torch.no_grad():
        for parameter, value in zip(parameters, kept[0], strict=True):
            parameter.copy_(value)
    if ids is not None:
        ids.table.load_state(kept[1])
    return {
        "epochs": best,
        "ran": len(curve),
        "before": None if first is None else round(first, 6),
        "ndcg@10": curve,
        "loss": round(mean, 6),
    }


def ndcg_at_10(model: Any, interactions: Interactions) -> float | None:
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


def _copies(parameters: Sequence[Any], ids: Ids | None) -> tuple[list[Any], dict[str, np.ndarray]]:
    return [parameter.detach().clone() for parameter in parameters], {} if ids is None else ids.table.state()
