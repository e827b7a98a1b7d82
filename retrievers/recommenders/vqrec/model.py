"""The network of VQ-Rec: an item is the mean of the embeddings of its codes, and a Transformer reads the history.

Scores are cosines of the history and the items (Hou et al. 2023, "Learning Vector-Quantized Item Representation for
Transferable Sequential Recommenders", arXiv:2210.12316, section 3.1). The network is a torch ModuleDict with functions
that use it, so that importing this module does not load torch.

Shapes: n items, M codes per item, K values per code, h dimensions, B sequences, L positions, Q queries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.interactions import history_matrix
from retrievers.recommenders.vqrec.codes import arrays
from retrievers.recommenders.vqrec.ids import Ids
from retrievers.types import Query

TEMPERATURE = 0.07  # τ in the paper.
INITIAL_STD = 0.02  # The standard deviation of the initial weights, as in BERT.
BLOCK = 16  # Queries are always processed in blocks of this size; see retrievers.text.exact_search.ALIGN.
MIN_PLACES = 8  # Histories are padded to at least so many positions.


@dataclass(frozen=True)
class Shape:
    """The sizes of a network."""

    codes: int  # M. 0 = text embeddings are projected, and there are no codes.
    values: int  # K. 0 = there are no codes.
    text: int  # The dimensions of a text embedding.
    dim: int  # h.
    layers: int
    heads: int  # Attention heads per layer.
    max_history: int  # The largest number of positions.
    dropout: float
    ids: bool = False  # Whether embeddings by id are added, see `vqrec/ids.py`.


def network(shape: Shape) -> Any:
    """A new network, a torch ModuleDict. Its weights are drawn from torch's global random numbers.

    Its entry "content" is the table of code embeddings, (M K, h), or the projection of text embeddings. Its size does
    not depend on the catalogue. Embeddings by id do depend on it, so they are not part of the network.
    """
    from torch import nn

    if shape.codes:
        content: Any = nn.Embedding(shape.codes * shape.values, shape.dim)
    else:
        content = nn.Linear(shape.text, shape.dim)
    layers = [
        nn.ModuleDict(
            {
                "queries_keys_values": nn.Linear(shape.dim, 3 * shape.dim),
                "out": nn.Linear(shape.dim, shape.dim),
                "norm": nn.LayerNorm(shape.dim, eps=1e-12),
                "up": nn.Linear(shape.dim, shape.dim),
                "down": nn.Linear(shape.dim, shape.dim),
                "norm_after": nn.LayerNorm(shape.dim, eps=1e-12),
            }
        )
        for _ in range(shape.layers)
    ]
    net = nn.ModuleDict(
        {
            "content": content,
            "positions": nn.Embedding(shape.max_history, shape.dim),
            "norm": nn.LayerNorm(shape.dim, eps=1e-12),
            "dropout": nn.Dropout(shape.dropout),
            "layers": nn.ModuleList(layers),
        }
    )
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=INITIAL_STD)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    if shape.codes:  # The mean of M embeddings is smaller by a factor of √M.
        nn.init.normal_(content.weight, std=INITIAL_STD * shape.codes**0.5)
    return net


def item_vectors(net: Any, features: Any, table: Any = None) -> Any:
    """The vectors of m items: (m, h), the mean of their code embeddings, or their projected text embeddings.

    features: (m, M) uint8 codes, or (m, d) text embeddings.
    table: (M K, h), code embeddings to use instead of the network's. None, the default, = the network's.
    """
    import torch

    content = net["content"]
    if not isinstance(content, torch.nn.Embedding):
        return content(features.to(content.weight.dtype))
    table = content.weight if table is None else table
    codes = features.shape[1]
    first = torch.arange(codes, device=features.device) * (len(table) // codes)
    return torch.nn.functional.embedding_bag(features.long() + first, table, mode="mean")


def encode(net: Any, vectors: Any, heads: int, bias: Any = None) -> Any:
    """Run the Transformer: (B, L, h). The output at a position depends on this position and the earlier ones.

    vectors: (B, L, h) item vectors, oldest first, with padding at the end.
    heads: the number of attention heads.
    bias: (B, L), added to the attention logits of each position. None, the default, = 0.

    The layers are those of Vaswani et al. 2017, with normalisation after each half, as there and in BERT. torch's own
    layer is not used, because its fast path for inference interprets a mask with one row per head differently.
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


def save(folder: Path, net: Any, shape: Shape) -> None:
    """Write shape.json and weights.npz into ``folder``."""
    (folder / "shape.json").write_text(json.dumps(asdict(shape)))
    np.savez(folder / "weights.npz", **{name: value.cpu().numpy() for name, value in net.state_dict().items()})


def load(folder: Path, **changes: Any) -> tuple[Any, Shape]:
    """Load the network and the shape that :func:`save` wrote into ``folder``.

    changes: fields of the shape to replace, such as dropout.

    Raises ValueError or OSError where the files are damaged.
    """
    import torch

    shape = replace(load_shape(folder), **changes)
    with torch.random.fork_rng(devices=[]):  # The weights are overwritten, so drawing them must not change the state.
        net = network(shape)
    found = {name: torch.from_numpy(value) for name, value in arrays(folder / "weights.npz").items()}
    try:
        net.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(f"weights.npz does not fit shape.json ({' '.join(str(error).split())[:200]})") from error
    return net, shape


def load_shape(folder: Path) -> Shape:
    """Load only the shape. Raises ValueError or OSError where the file is damaged."""
    try:
        return Shape(**json.loads((folder / "shape.json").read_text()))
    except TypeError as error:
        raise ValueError(f"shape.json was written by another version ({error})") from error


def digest(folder: Path) -> str:
    """The sha256 of a saved network, in hex."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in ("shape.json", "weights.npz"))).hexdigest()


class Ranker:
    """The fitted model; see :class:`retrievers.recommenders.fitted.Model`.

    net: the network.
    shape: its shape.
    features: (n, M) uint8 codes or (n, d) text embeddings, on the network's device.
    ids: the embeddings by id. None, the default, = there are none.

    The vector u of a query is the output for its history, scaled to unit length. An item with a weight w > 0 gets
    attention in proportion to w: log w is added to its logits, so that 2 has the effect of two equal items. An item
    with weight 0 is left out. The m items with a negative weight are not part of the history that the network reads.
    Their mean, weighted by |w|, is subtracted:

        score(d) = u · d - (1/m) Σ_j |w_j| j · d            all vectors of unit length, j over these m items

    Without an item of positive weight, only the second part remains. Without any item, nothing is retrieved.
    """

    def __init__(self, net: Any, shape: Shape, features: Any, ids: Ids | None = None) -> None:
        self.net, self.shape, self.features, self.ids = net, shape, features, ids
        self.refresh()

    def refresh(self) -> Ranker:
        """Compute the item vectors, (n, h) of unit length, and their norms again, from the present weights.

        Returns this model.
        """
        import torch

        self.net.eval()
        with torch.no_grad():
            parts = [item_vectors(self.net, part) for part in self.features.split(1 << 16)]
            raw = torch.cat(parts)
            if self.ids is not None:
                raw = raw + self.ids.vectors(raw.device)
            missing = -len(raw) % BLOCK
            self._norm = raw.norm(dim=1, keepdim=True).clamp_min(1e-12)
            self._unit = torch.nn.functional.pad(raw / self._norm, (0, 0, 0, missing))
        return self

    def scores(self, queries: Sequence[Query]) -> np.ndarray:
        """The scores of Q queries: (Q, n) float32; -inf for a query without any item.

        A query is encoded in a block whose shape depends only on its own length, so that its scores are the same in
        every batch.

        Raises ValueError for a row outside the catalogue, and for weights that are not as many as the history's items.
        """
        import torch

        n = len(self.features)
        history_matrix(queries, n)  # This checks the histories.
        out = np.full((len(queries), n), -np.inf, np.float32)
        with torch.inference_mode():
            wanted, known = self._vectors(queries)
            for start in range(0, len(queries), BLOCK):
                block = torch.zeros((BLOCK, self.shape.dim), device=wanted.device)
                part = wanted[start : start + BLOCK]
                block[: len(part)] = part
                found = (block @ self._unit.T)[: len(part), :n].cpu().numpy()
                mine = known[start : start + BLOCK]
                out[start : start + BLOCK][mine] = found[mine]
        return out

    def _vectors(self, queries: Sequence[Query]) -> tuple[Any, np.ndarray]:
        """The vector of each query, (Q, h), and (Q,) bool: whether its history has an item whose weight is not 0."""
        import torch

        wanted = torch.zeros((len(queries), self.shape.dim), device=self._unit.device)
        known = np.zeros(len(queries), bool)
        by_length: dict[int, list[tuple[int, list[int], list[float]]]] = {}
        for q, query in enumerate(queries):
            weighted = list(zip(query.history, query.weights or (1.0,) * len(query.history), strict=True))
            liked = [(row, weight) for row, weight in weighted if weight > 0][-self.shape.max_history :]
            disliked = [(row, -weight) for row, weight in weighted if weight < 0]
            known[q] = bool(liked or disliked)
            if liked:
                rows, weights = zip(*liked, strict=True)
                places = min(max(MIN_PLACES, 1 << (len(rows) - 1).bit_length()), self.shape.max_history)
                by_length.setdefault(places, []).append((q, list(rows), list(weights)))
            for row, weight in disliked:
                wanted[q] -= self._unit[row] * (weight / len(disliked))
        for places, group in by_length.items():
            for start in range(0, len(group), BLOCK):
                part = group[start : start + BLOCK]
                wanted[[q for q, _, _ in part]] += self._encoded(part, places)
        return wanted, known

    def _encoded(self, part: Sequence[tuple[int, list[int], list[float]]], places: int) -> Any:
        """The vectors of up to BLOCK histories: (len(part), h), of unit length.

        part: (number of the query, rows, positive weights) of each.
        places: the number of positions that the histories are padded to.
        """
        import torch

        rows, weights = np.zeros((BLOCK, places), np.int64), np.ones((BLOCK, places), np.float32)
        last = np.zeros(BLOCK, np.int64)
        for b, (_, mine, w) in enumerate(part):
            rows[b, : len(mine)], weights[b, : len(mine)], last[b] = mine, w, len(mine) - 1
        device = self._unit.device
        index = torch.from_numpy(rows).to(device)
        bias = torch.from_numpy(np.log(weights)).to(device)
        hidden = encode(self.net, self._unit[index] * self._norm[index], self.shape.heads, bias)
        found = hidden[torch.arange(BLOCK, device=device), torch.from_numpy(last).to(device)]
        return torch.nn.functional.normalize(found, dim=1)[: len(part)]
