"""The arithmetic of `backend`: from a history to its personas, and from those to scores, in torch.

Shapes: B histories, L = MAX_HISTORY places, P personas, d dimensions, m items. Items are (…, d + 1) float32: a vector v
and, in the last column, a bias b. Gradients flow through all of it but the choice of clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MAX_HISTORY = 50  # a user's latest items; older ones are left out
KMEANS_ROUNDS = 2  # rounds of k-means that follow the first choice of centres


def parameters(dim: int) -> dict[str, np.ndarray]:
    """What all users share, before training, float32.

    user_key, item_key: (d, d), A and B of the attention. sharpness: log of its factor. gain: log of what a mean of
    item vectors is multiplied by to make a persona. pace: log of the step of the fold-in. recency: (L,) log weights of
    the places in a history, the newest last.
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
    """(…, d) vectors -> (…, d) of length 1, whose products are the attention's cosines."""
    import torch

    return torch.nn.functional.normalize(items @ matrix.T, dim=-1, eps=1e-6)


def attention(p: Mapping[str, Any], personas: Any, alive: Any, item_keys: Any) -> Any:
    """(B, P, d), (B, P) bool and (m, d) or (B, m, d) keys of items -> (B, P, m), adding up to 1 over P."""
    import torch

    cosines = keys_of(personas, p["user_key"]) @ item_keys.transpose(-1, -2)
    logits = (p["sharpness"].exp() * cosines).masked_fill(~alive[..., None], -torch.inf)
    return logits.softmax(1)


def scores(p: Mapping[str, Any], personas: Any, alive: Any, items: Any) -> Any:
    """(B, P, d), (B, P) and (m, d + 1) items -> (B, m): sum over p of a_p (u_p · v) + b."""
    vectors, bias = items[..., :-1], items[..., -1]
    each = personas @ vectors.transpose(-1, -2)
    return (attention(p, personas, alive, keys_of(vectors, p["item_key"])) * each).sum(1) + bias


def start(x: Any, weights: Any, count: int) -> tuple[Any, Any]:
    """(B, L, d) items and (B, L) weights >= 0, 0 = padding -> (B, P, d) means of clusters, (B, P) which hold an item.

    Centres: the newest item, then again and again the one furthest from all centres by cosine (Gonzalez 1985: k-means++
    of Arthur and Vassilvitskii 2007 with the most probable draw in place of a draw, so that nothing is random);
    then KMEANS_ROUNDS rounds of k-means on the unit sphere.
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
    share = kept * weights[..., None]  # once more, for the gradient of the weights
    share = share / share.sum(1, keepdim=True).clamp_min(1e-12)
    return share.transpose(1, 2) @ x, living


def fold_in(
    p: Mapping[str, Any], x: Any, signed: Any, background: Any, offset: Any, count: int, steps: int
) -> tuple[Any, Any]:
    """A history's personas: (B, L, d + 1) items and (B, L) signed weights, 0 = padding -> (B, P, d), (B, P) alive.

    Starts from the clusters of what has a positive weight, then climbs sum_l w_l log p(i_l | u) / sum_l |w_l|, where p
    is the softmax of the scores over the background, (m, d + 1), whose logits are lowered by ``offset``, (m,), the log
    of how much oftener than once an item stands there. The attention is held while a step is taken, as in
    expectation-maximisation. A negative weight pushes away, and founds no persona; where none is positive, one persona
    starts from zero.
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
    """Histories of item numbers, oldest first, -1 = unknown -> (B, L) int64 numbers and (B, L) float32 weights.

    An item that stands there twice keeps its last place; without weights it counts 1, with weights they add up.
    """
    rows, signed = (
        np.zeros((len(histories), MAX_HISTORY), np.int64),
        np.zeros((len(histories), MAX_HISTORY), np.float32),
    )
    for b, history in enumerate(histories):
        found: dict[int, float] = {}
        for at, item in enumerate(history):
            weight = found.pop(item, 0.0) + weights[b][at] if weights is not None and len(weights[b]) else 1.0
            found.pop(item, None)
            found[item] = weight
        kept = [(item, weight) for item, weight in found.items() if item >= 0 and weight][-MAX_HISTORY:]
        if kept:
            rows[b, -len(kept) :], signed[b, -len(kept) :] = zip(*kept, strict=True)
    return rows, signed
