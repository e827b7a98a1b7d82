"""Fitting VQ-Rec: every prefix of every sequence foretells the next item; the best epoch by validation is kept.

Shapes: B sequences of a batch, L places, P prefixes of a batch, m items that compete in it, n documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from retrievers.interactions import Interactions
from retrievers.recommenders.validation import gain
from retrievers.recommenders.vqrec.ids import Ids
from retrievers.recommenders.vqrec.model import TEMPERATURE, encode, item_vectors
from retrievers.types import Query

BATCHES_PER_POOL = 20  # batches that are sorted by length together: little padding, and still shuffled
MAX_VALIDATION_USERS = 1000  # validation users at most: the others would say the same again
MAX_GRADIENT_NORM = 5.0  # largest norm of a gradient: a guard for the first steps


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. batch: sequences a step. patience: epochs without a better validation figure."""

    epochs: int
    patience: int
    learning_rate: float
    batch: int
    seed: int


class Windows:
    """Sequences cut so that every prefix is foretold from once: a causal Transformer answers for all prefixes of a
    window in one pass. The first ``length`` prefixes are whole; a later one has ``length`` items at the end of its
    window and at least a quarter of that at its start (whole ones throughout would take ``length`` times as long).

    rows: all items of all sequences. cuts: (windows, 3) where each starts, its inputs, how many of them were answered
    for in the window before.
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
        """All windows, shuffled: (B, L) int64 inputs, padded with their first row; (B, L) targets, -1 = not counted."""
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
    """Cross-entropy of the cosines, divided by τ, of every prefix with the items: a scalar tensor.

    compete: rows that stand against the targets beside what the batch holds; None = none. All of them together are
    encoded once. fakes: (P, M) codes of the targets -> (P, M) made-up ones, one more competitor each. ids: added.
    """
    import torch
    from torch.nn.functional import cross_entropy, embedding, normalize

    own = np.concatenate([inputs.ravel(), targets[targets >= 0]])
    rows = np.unique(own if compete is None else np.concatenate([own, compete]))
    device = features.device
    raw = item_vectors(net, features[torch.from_numpy(rows).to(device)], table)
    if ids is not None:
        raw = raw + ids.learning(rows, device)
    # Not raw[…]: threads add up the gradient of an index in whatever order they come.
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
    """Adam over ``parameters``, and ``ids`` by their own, whose best values by ``measure`` (None = no validation: the
    last) are kept.

    loss: inputs, targets, epoch -> scalar. measure: after every epoch, larger is better. Returns epochs (of which the
    values are), ran, the validation figure of every epoch and the mean training loss of the last.
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
    """Mean ndcg@10 of the validation targets, with the history left out; None where there are none."""
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
            total += gain(row, query.history, int(targets[q][0]))
    return total / len(chosen)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch draws from ``seed`` inside; outside, everybody's draws go on as if nothing had been."""
    import torch

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _copies(parameters: Sequence[Any], ids: Ids | None) -> tuple[list[Any], dict[str, np.ndarray]]:
    return [parameter.detach().clone() for parameter in parameters], {} if ids is None else ids.table.state()
