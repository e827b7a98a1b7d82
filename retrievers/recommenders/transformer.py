"""A causal Transformer that reads a history of item vectors, and the scores of all items by its output.

VQ-Rec and SASRec are such models: they differ in the vectors of the items and in the loss.

Shapes: m items, h dimensions, B sequences, L positions, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from retrievers.core.parameters import Checks
from retrievers.interactions import added_weights
from retrievers.types import Query

INITIAL_STD = 0.02  # The standard deviation of the initial weights, as in BERT.
NORM_EPSILON = 1e-12  # As in BERT.
BLOCK = 16  # Queries are always processed in blocks of this size; see retrievers.text.exact_search.ALIGN.
MIN_PLACES = 8  # Histories are padded to at least so many positions.


def check_sizes(checks: Checks) -> None:
    """Check the fields dim, layers, heads and max_history. A network above these limits is taken for a mistake."""
    checks.integers("dim", most=4096)
    checks.integers("layers", "heads", most=64)
    checks.integers("max_history", most=10_000)


def causal_network(content: Any, dim: int, inner: int, layers: int, positions: int, dropout: float) -> Any:
    """A new network, a torch ModuleDict. Its weights are drawn from torch's global random numbers.

    content: the module of the item vectors, which becomes the entry "content".
    dim: h.
    inner: the width between the two linear maps of a feed-forward layer.
    layers: the number of layers.
    positions: the largest L.
    dropout: the share of the values that training sets to 0, from 0 to below 1.
    """
    from torch import nn

    blocks = [
        nn.ModuleDict(
            {
                "queries_keys_values": nn.Linear(dim, 3 * dim),
                "out": nn.Linear(dim, dim),
                "norm": nn.LayerNorm(dim, eps=NORM_EPSILON),
                "up": nn.Linear(dim, inner),
                "down": nn.Linear(inner, dim),
                "norm_after": nn.LayerNorm(dim, eps=NORM_EPSILON),
            }
        )
        for _ in range(layers)
    ]
    net = nn.ModuleDict(
        {
            "content": content,
            "positions": nn.Embedding(positions, dim),
            "norm": nn.LayerNorm(dim, eps=NORM_EPSILON),
            "dropout": nn.Dropout(dropout),
            "layers": nn.ModuleList(blocks),
        }
    )
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=INITIAL_STD)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return net


def encode(net: Any, vectors: Any, heads: int, bias: Any = None) -> Any:
    """Run the Transformer: (B, L, h). The output at a position depends on this position and the earlier ones.

    vectors: (B, L, h) item vectors, oldest first, with padding at the end.
    heads: the number of attention heads.
    bias: (B, L), added to the attention logits of each position. None, the default, = 0.

    The layers are those of Vaswani et al. 2017 with normalisation after each half, as there and in BERT:

        x = N(vectors + positions),   x = N(x + W_o attention(x)),   x = N(x + W_2 gelu(W_1 x))

    with N for the normalisation of a layer, and with dropout on the first x, on the attention and on both sums. torch's
    own layer is not used, because its fast path for inference interprets a mask with one row per head differently.
    """
    import torch

    drop = net["dropout"]
    size, length, dim = vectors.shape
    x = drop(net["norm"](vectors + net["positions"].weight[:length]))
    mask = None
    if bias is not None:
        mask = torch.full((length, length), -torch.inf, device=x.device).triu(1) + bias[:, None, None, :]
    for layer in net["layers"]:
        parts = layer["queries_keys_values"](x).view(size, length, 3, heads, dim // heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        found = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, drop.p if net.training else 0.0, is_causal=mask is None
        )
        x = layer["norm"](x + drop(layer["out"](found.transpose(1, 2).reshape(size, length, dim))))
        x = layer["norm_after"](x + drop(layer["down"](torch.nn.functional.gelu(layer["up"](x)))))
    return x


class ItemVectors(NamedTuple):
    """The vectors of m items.

    scored: (m', h), padded with rows of zeros to a multiple of BLOCK, see :func:`padded`. The score of an item is its
        inner product with the vector of a query.
    norms: (m, 1). The Transformer reads ``scored`` times these. None = it reads ``scored``.
    """

    scored: Any
    norms: Any = None


def padded(vectors: Any) -> Any:
    """(m, h) -> (m', h), with rows of zeros up to the next multiple of BLOCK."""
    import torch

    return torch.nn.functional.pad(vectors, (0, 0, 0, -len(vectors) % BLOCK))


def history_scores(
    net: Any, heads: int, items: ItemVectors, count: int, queries: Sequence[Query], unit: bool
) -> np.ndarray:
    """The scores of Q queries: (Q, m) float32; -inf for a query without any item.

    net, heads: the network in evaluation mode, and its number of attention heads.
    items: the vectors of the items.
    count: m.
    queries: their histories hold numbers from 0 to m - 1. Their weights are as many as the items of the history, or ().
    unit: whether the output u for a history is scaled to unit length.

    An item with a weight w > 0 gets attention in proportion to w: log w is added to its logits, so that 2 has the
    effect of two equal items. An item with weight 0 is left out. The k items with a negative weight are not part of the
    history that the network reads. Their mean direction, weighted by |w|, is subtracted from u:

        score(d) = (u - |u| (1/k) Σ_j |w_j| j / |j|) · d        j over these k items

    Without an item of positive weight, u is left out, and |u| is 1. A query is encoded in a block whose shape depends
    only on its own length, so that its scores are the same in every batch.
    """
    import torch

    out = np.full((len(queries), count), -np.inf, np.float32)
    with torch.inference_mode():
        wanted, known = _query_vectors(net, heads, items, queries, unit)
        for start in range(0, len(queries), BLOCK):
            block = torch.zeros((BLOCK, wanted.shape[1]), device=wanted.device)
            part = wanted[start : start + BLOCK]
            block[: len(part)] = part
            found = (block @ items.scored.T)[: len(part), :count].cpu().numpy()
            mine = known[start : start + BLOCK]
            out[start : start + BLOCK][mine] = found[mine]
    return out


def _query_vectors(
    net: Any, heads: int, items: ItemVectors, queries: Sequence[Query], unit: bool
) -> tuple[Any, np.ndarray]:
    """The vector of each query, (Q, h), and (Q,) bool: whether its history has an item whose weight is not 0."""
    import torch

    most = len(net["positions"].weight)
    wanted = torch.zeros((len(queries), items.scored.shape[1]), device=items.scored.device)
    known = np.zeros(len(queries), bool)
    by_length: dict[int, list[tuple[int, list[int], list[float]]]] = {}
    away: dict[int, Any] = {}
    for q, query in enumerate(queries):
        weighted = _weighted(query)
        liked = [(item, weight) for item, weight in weighted if weight > 0][-most:]
        disliked = [(item, -weight) for item, weight in weighted if weight < 0]
        known[q] = bool(liked or disliked)
        if liked:
            rows, weights = zip(*liked, strict=True)
            places = min(max(MIN_PLACES, 1 << (len(rows) - 1).bit_length()), most)
            by_length.setdefault(places, []).append((q, list(rows), list(weights)))
        for item, weight in disliked:
            direction = torch.nn.functional.normalize(items.scored[item], dim=0)
            away[q] = away.get(q, 0) + direction * (weight / len(disliked))
    for places, group in by_length.items():
        for start in range(0, len(group), BLOCK):
            part = group[start : start + BLOCK]
            wanted[[q for q, _, _ in part]] = _encoded(net, heads, items, part, places, unit)
    for q, direction in away.items():
        length = wanted[q].norm()
        wanted[q] -= direction * (1.0 if unit or not length else length)
    return wanted, known


def _weighted(query: Query) -> list[tuple[int, float]]:
    """The items of a history with their weights, oldest first.

    Without weights, an item may occur several times. Where a query has weights, those of an item are added at its last
    place, as the linear recommenders add them: "less like" removes an item that was chosen before.
    """
    if not query.weights:
        return [(item, 1.0) for item in query.history]
    return list(added_weights(query.history, query.weights).items())


def _encoded(
    net: Any,
    heads: int,
    items: ItemVectors,
    part: Sequence[tuple[int, list[int], list[float]]],
    places: int,
    unit: bool,
) -> Any:
    """The output for up to BLOCK histories: (len(part), h).

    part: (number of the query, items, positive weights) of each.
    places: the number of positions that the histories are padded to.
    """
    import torch

    rows, weights = np.zeros((BLOCK, places), np.int64), np.ones((BLOCK, places), np.float32)
    last = np.zeros(BLOCK, np.int64)
    for b, (_, mine, w) in enumerate(part):
        rows[b, : len(mine)], weights[b, : len(mine)], last[b] = mine, w, len(mine) - 1
    device = items.scored.device
    index = torch.from_numpy(rows).to(device)
    bias = torch.from_numpy(np.log(weights)).to(device)
    vectors = items.scored[index] if items.norms is None else items.scored[index] * items.norms[index]
    hidden = encode(net, vectors, heads, bias)
    found = hidden[torch.arange(BLOCK, device=device), torch.from_numpy(last).to(device)][: len(part)]
    return torch.nn.functional.normalize(found, dim=1) if unit else found
