"""The loss of VQ-Rec. `next_item.py` fits it.

Shapes: B sequences per batch, L positions, P prefixes per batch, m items in the softmax of a batch, n items.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from retrievers.recommenders.next_item import Batch
from retrievers.recommenders.transformer import encode
from retrievers.recommenders.vqrec.ids import Ids
from retrievers.recommenders.vqrec.model import TEMPERATURE, item_vectors


def next_item_loss(
    net: Any,
    heads: int,
    features: Any,
    batch: Batch,
    compete: np.ndarray | None,
    table: Any = None,
    fakes: Callable[[Any], Any] | None = None,
    ids: Ids | None = None,
) -> Any:
    """The mean cross-entropy of the targets, a scalar tensor. The logits are cosines, divided by τ.

    net, heads: the network, and its number of attention heads.
    features: (n, M) uint8 codes or (n, d) text embeddings of all items.
    batch: B windows of rows.
    compete: rows of negatives, in addition to all items of the batch. None = only the items of the batch.
    table: code embeddings to use instead of the network's, see :func:`item_vectors`.
    fakes: takes the (P, M) codes of the targets, and returns (P, M) codes of one further negative each.
    ids: the embeddings by id to add.
    """
    import torch
    from torch.nn.functional import cross_entropy, embedding, normalize

    inputs, targets, _ = batch
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
