"""The loss that an encoder is tuned by: a softmax over the documents of a batch, with a correction for popularity.

Shapes: B pairs per batch, m further negatives per pair, C = B * (1 + m) documents per batch, n documents.

With s_ij = scale * cosine(query i, document j), the loss of pair i is

    - log( exp(s_ii - c_i) / sum_j exp(s_ij - c_j) ),    c_j = log(f_j / mean of f)

f_j is how often document j is the positive of a pair; the mean is over the documents that are one. Popular documents
are drawn as negatives more often, and without the correction their scores would fall (logQ, Yi et al. 2019,
"Sampling-bias-corrected neural modeling for large corpus item recommendations"). A softmax does not change with a
constant, so c is centred. The further negatives were not drawn by popularity, and have c = 0, as documents of average
popularity. Documents that are known to be relevant to query i are left out of its sum.

With a share `keep` of text similarity, the loss is (1 - keep) times this one, plus keep times the divergence
KL(softmax of scale * the cosines of the encoder before it was tuned || softmax of s) over the same documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Objective:
    """The loss as a function of embeddings.

    scale: see the formula.
    correction: (n,) float32, c of each document. None = no correction.
    offsets, known: the documents that are no negatives of a group, see `pairs.Pairs`.
    keep: the share of text similarity; it needs ``frozen``.
    frozen: the embeddings of the query texts, (D, d), and of the documents, (n, d), before the encoder is tuned.
    """

    scale: float
    correction: np.ndarray | None
    offsets: np.ndarray
    known: np.ndarray
    keep: float = 0.0
    frozen: tuple[np.ndarray, np.ndarray] | None = None

    def of_embeddings(self, columns: Sequence[Any], labels: Any) -> Any:
        """The mean loss of a batch, a scalar tensor.

        columns: 2 + m tensors of (B, d): the embeddings of the queries, the positives, and the further negatives.
        labels: (B, 3 + m) int64 tensor: group, query text, row of the positive, rows of the further negatives; a row of
            -1 = there is none, and its embedding does not count.
        """
        import torch
        from sentence_transformers.util import cos_sim
        from torch.nn.functional import log_softmax

        rows = labels[:, 2:].T.reshape(-1).cpu().numpy()  # (C,), in the order of the documents below.
        logits = self.scale * cos_sim(columns[0], torch.cat(list(columns[1:])))
        corrected = logits
        if self.correction is not None:
            drawn = np.arange(len(rows)) < len(labels)  # The positives of the batch come first.
            shift = np.where(drawn, self.correction[rows], 0.0).astype(np.float32)
            corrected = logits - torch.from_numpy(shift).to(logits.device)
        left_out = torch.from_numpy(self._left_out(labels[:, 0].cpu().numpy(), rows)).to(logits.device)
        loss = -log_softmax(corrected.masked_fill(left_out, -torch.inf), dim=1).diagonal().mean()
        if not self.keep:
            return loss
        return (1 - self.keep) * loss + self.keep * self._divergence(logits, labels[:, 1].cpu().numpy(), rows)

    def _left_out(self, groups: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(B, C) bools: which documents do not count for a query, because they are relevant to it or do not exist."""
        out = np.stack([np.isin(rows, self.known[self.offsets[g] : self.offsets[g + 1]]) for g in groups])
        out |= rows < 0
        np.fill_diagonal(out, False)  # The positive of the pair itself.
        return out

    def _divergence(self, logits: Any, queries: np.ndarray, rows: np.ndarray) -> Any:
        """The mean divergence of the softmax of ``logits``, (B, C), from that of the encoder before it was tuned."""
        import torch
        from sentence_transformers.util import cos_sim
        from torch.nn.functional import kl_div, log_softmax

        assert self.frozen is not None
        there = np.flatnonzero(rows >= 0)
        texts, documents = (
            torch.from_numpy(np.asarray(part[index], np.float32)).to(logits.device)
            for part, index in zip(self.frozen, (queries, rows[there]), strict=True)
        )
        before = log_softmax(self.scale * cos_sim(texts, documents), dim=1)
        now = log_softmax(logits[:, torch.from_numpy(there).to(logits.device)], dim=1)
        return kl_div(now, before, log_target=True, reduction="batchmean")


def as_module(model: Any, objective: Objective, mini_batch: int | None = None) -> Any:
    """The loss as sentence-transformers' trainer takes it: a torch module.

    model: the encoder that is tuned.
    objective: the loss of embeddings.
    mini_batch: how many texts are encoded at once, with gradient caching. None, the default, = all texts of the batch.
    """
    from sentence_transformers.base.losses.gradcache import CachedLossMixin
    from torch import Tensor, cat, nn

    class PairLoss(CachedLossMixin, nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.mini_batch_size = mini_batch or 0

        def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
            columns = list(sentence_features)
            if self.mini_batch_size:
                return self.forward_cached(columns, labels)
            return objective.of_embeddings([self.model(column)["sentence_embedding"] for column in columns], labels)

        def calculate_loss(
            self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
        ) -> Tensor:
            """What gradient caching calls, with embeddings that were computed in parts."""
            loss = objective.of_embeddings([cat(parts) for parts in reps], labels)
            if with_backward:
                loss.backward()
                loss = loss.detach()
            return loss

    return PairLoss()


def correction_of(rows: np.ndarray, documents: int) -> np.ndarray:
    """c of each document: (n,) float32. It is 0 for a document that is no positive, whose c is never used.

    rows: (X,) rows of the positives of all pairs.
    documents: n.
    """
    counts = np.bincount(rows, minlength=documents)
    drawn = counts > 0
    out = np.zeros(documents, np.float32)
    out[drawn] = np.log(counts[drawn] / counts[drawn].mean())
    return out
