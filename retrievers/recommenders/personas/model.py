"""The computation of personas from a history, and of scores from personas, in torch.

Shapes: B histories, L = MAX_HISTORY positions, P personas, d dimensions, m items. Items are (…, d + 1) float32: a
vector v and, in the last column, a bias b. Gradients flow through everything except the choice of clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retrievers.interactions import added_weights

MAX_HISTORY = 50  # The newest so many items of a history are used.
KMEANS_ROUNDS = 2  # The clusters are improved by so many rounds of k-means.


def parameters(dim: int) -> dict[str, np.ndarray]:
    """The initial values of the parameters that all users share, float32.

    user_key, item_key: (d, d), the matrices A and B of the attention.
    sharpness: the logarithm of the factor s of the attention.
    gain: the logarithm of the factor between the mean of a cluster and a persona.
    pace: the logarithm of the step size of :func:`fold_in`.
    recency: (L,), the logarithms of the weights of the positions in a history, oldest first.
    """
    eye = np.eye(dim, dtype=np.float32)
    return {
        "user_key": eye,
        "item_key": eye.copy(),
        "sharpness": np.array(np.log(4.0), np.float32),
        "gain": np.array(np.log(4.0), np.float32),
        "pace": np.array(np.log(1.0), np.float32),
        "recency": np.linspace(-1, 0, MAX_HISTORY, dtype=np.float32),
    }


def keys_of(items: Any, matrix: Any) -> Any:
    """The keys of (…, d) vectors: (…, d) of unit length. Their inner products are the cosines of the attention."""
    import torch

    return torch.nn.functional.normalize(items @ matrix.T, dim=-1, eps=1e-6)


def attention(p: Mapping[str, Any], personas: Any, alive: Any, item_keys: Any) -> Any:
    """The attention of the personas to the items: (B, P, m). It sums to 1 over P.

    p: the shared parameters, see :func:`parameters`.
    personas: (B, P, d).
    alive: (B, P) bool, which personas exist.
    item_keys: (m, d) or (B, m, d).
    """
    import torch

    cosines = keys_of(personas, p["user_key"]) @ item_keys.transpose(-1, -2)
    logits = (p["sharpness"].exp() * cosines).masked_fill(~alive[..., None], -torch.inf)
    return logits.softmax(1)


def scores(p: Mapping[str, Any], personas: Any, alive: Any, items: Any) -> Any:
    """The scores of m items for B users: (B, m), sum over p of a_p (u_p · v) + b.

    items: (m, d + 1). For the other arguments see :func:`attention`.
    """
    vectors, bias = items[..., :-1], items[..., -1]
    each = personas @ vectors.transpose(-1, -2)
    return (attention(p, personas, alive, keys_of(vectors, p["item_key"])) * each).sum(1) + bias


def start(x: Any, weights: Any, count: int) -> tuple[Any, Any]:
    """Cluster the items of each history: (B, P, d) means of the clusters, and (B, P) bool, which clusters have items.

    x: (B, L, d) item vectors.
    weights: (B, L) >= 0; 0 = padding.
    count: P.

    The first centre is the newest item. Each further centre is the item that is furthest from all centres so far, by
    cosine (Gonzalez 1985). This is k-means++ (Arthur and Vassilvitskii 2007) with the most probable item in place of a
    random draw. Then follow KMEANS_ROUNDS rounds of k-means on the unit sphere.
    """
    import torch

    with torch.no_grad():
        unit = torch.nn.functional.normalize(x, dim=-1)
        places = torch.arange(x.shape[1])
        newest = torch.where(weights > 0, places, -1).argmax(1)
        centres = [unit[torch.arange(len(x)), newest]]
        far = torch.where(weights > 0, 1 - (unit @ centres[0][..., None])[..., 0], -1.0)
        alive = [(weights > 0).any(1)]
        for _ in range(count - 1):
            best, place = far.max(1)
            alive.append(best > 1e-4)
            centres.append(unit[torch.arange(len(x)), place])
            far = torch.minimum(far, 1 - (unit @ centres[-1][..., None])[..., 0])
        centre, living = torch.stack(centres, 1), torch.stack(alive, 1)
        for round_ in range(KMEANS_ROUNDS + 1):
            near = (unit @ centre.transpose(1, 2)).masked_fill(~living[:, None], -torch.inf)
            member = torch.nn.functional.one_hot(near.argmax(2), count) * weights[..., None]
            share = member / member.sum(1, keepdim=True).clamp_min(1e-12)
            living = living & (member.sum(1) > 0)
            if round_ < KMEANS_ROUNDS:
                centre = torch.nn.functional.normalize(share.transpose(1, 2) @ unit, dim=-1)
        kept = (member > 0).to(x.dtype)
    share = kept * weights[..., None]  # This repeats the computation with a gradient of the weights.
    share = share / share.sum(1, keepdim=True).clamp_min(1e-12)
    return share.transpose(1, 2) @ x, living


def fold_in(
    p: Mapping[str, Any], x: Any, signed: Any, background: Any, offset: Any, count: int, steps: int
) -> tuple[Any, Any]:
    """The personas of each history: (B, P, d), and (B, P) bool, which of them exist.

    p: the shared parameters, see :func:`parameters`.
    x: (B, L, d + 1) items.
    signed: (B, L) weights, which may be negative; 0 = padding.
    background: (m, d + 1) items that stand for the whole catalogue.
    offset: (m,) amounts by which the logits of the background items are lowered: the logarithm of the probability that
        an item is in the background.
    count: P.
    steps: the number of gradient steps.

    The personas start as the means of the clusters of the items with a positive weight. The steps then increase
    sum_l w_l log p(i_l | u) / sum_l |w_l|, where p is the softmax of the scores over the background. The attention is
    kept fixed during a step, as in expectation-maximisation. Items with a negative weight push the personas away. Where
    no weight is positive, one persona starts at zero.
    """
    import torch

    weights = signed * p["recency"].exp()
    weights = weights / weights.abs().sum(1, keepdim=True).clamp_min(1e-12)
    vectors = x[..., :-1]
    means, alive = start(vectors, weights.clamp_min(0), count)
    personas = p["gain"].exp() * means * alive[..., None]
    alive = torch.cat([alive[:, :1] | ~alive.any(1, keepdim=True), alive[:, 1:]], 1)
    pace, total = p["pace"].exp(), weights.sum(1)
    own_keys = keys_of(vectors, p["item_key"])
    back_keys = keys_of(background[:, :-1], p["item_key"])
    for _ in range(steps):
        mine = attention(p, personas, alive, own_keys) * weights[:, None]
        others = attention(p, personas, alive, back_keys)
        logits = (others * (personas @ background[:, :-1].T)).sum(1) + background[:, -1] - offset
        expected = (others * logits.softmax(1)[:, None]) @ background[:, :-1]
        personas = personas + pace * (mine @ vectors - total[:, None, None] * expected) * alive[..., None]
    return personas, alive


def places(histories: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None) -> Any:
    """Pad histories to a common length: (B, L) int64 item numbers, and (B, L) float32 weights.

    histories: B lists of item numbers, oldest first; -1 = an item without a vector.
    weights: B lists of weights. None, or an empty list, = all 1.

    An item that occurs several times keeps its last position. Its weights are added where there are weights, and it
    counts 1 otherwise. Padding comes first and has the number 0 and the weight 0.
    """
    rows, signed = (
        np.zeros((len(histories), MAX_HISTORY), np.int64),
        np.zeros((len(histories), MAX_HISTORY), np.float32),
    )
    for b, history in enumerate(histories):
        given = weights[b] if weights is not None and len(weights[b]) else None
        found = added_weights(history, [1.0] * len(history) if given is None else given)
        if given is None:
            found = dict.fromkeys(found, 1.0)
        kept = [(item, weight) for item, weight in found.items() if item >= 0 and weight][-MAX_HISTORY:]
        if kept:
            rows[b, -len(kept) :], signed[b, -len(kept) :] = zip(*kept, strict=True)
    return rows, signed
