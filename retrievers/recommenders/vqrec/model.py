"""VQ-Rec's network: items as the mean of their codes' embeddings, a Transformer over the history, cosines.

Hou et al. 2023, "Learning Vector-Quantized Item Representation for Transferable Sequential Recommenders"
(arXiv:2210.12316), section 3.1. The network is a ModuleDict and functions over it, so that importing this file
loads no torch.

Shapes: n documents, M codes a document, K values a code, h dimensions, B sequences, L places, Q queries.
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

TEMPERATURE = 0.07  # τ, the paper's
INITIAL_STD = 0.02  # standard deviation of what is drawn at the start, as in BERT
BLOCK = 16  # queries encoded and multiplied together, always as many; see retrievers.text.exact_search.ALIGN
MIN_PLACES = 8  # places that a history is padded to at least


@dataclass(frozen=True)
class Shape:
    """codes, values: M and K (0, 0 where the text embedding is projected instead). text: its dimensions. ids: whether
    documents have an embedding of their own beside that, see `vqrec/ids.py`."""

    codes: int
    values: int
    text: int
    dim: int
    layers: int
    heads: int
    max_history: int
    dropout: float
    ids: bool = False


def network(shape: Shape) -> Any:
    """A fresh network (torch ModuleDict), drawn from torch's global generator.

    content: the (M K, h) table of code embeddings, whose size no catalogue changes, or the projection of the text
    embedding. Embeddings by id are in a table of their own, which a catalogue does change: see `vqrec/ids.py`.
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
    if shape.codes:  # a mean of M is √M times as small
        nn.init.normal_(content.weight, std=INITIAL_STD * shape.codes**0.5)
    return net


def item_vectors(net: Any, features: Any, table: Any = None) -> Any:
    """(m, M) uint8 codes, or (m, d) text embeddings -> (m, h), the mean of the codes' embeddings. table: others than
    the network's, (M K, h)."""
    import torch

    content = net["content"]
    if not isinstance(content, torch.nn.Embedding):
        return content(features.to(content.weight.dtype))
    table = content.weight if table is None else table
    codes = features.shape[1]
    first = torch.arange(codes, device=features.device) * (len(table) // codes)
    return torch.nn.functional.embedding_bag(features.long() + first, table, mode="mean")


def encode(net: Any, vectors: Any, heads: int, bias: Any = None) -> Any:
    """(B, L, h) item vectors, oldest first, what is missing at the end -> (B, L, h): what each place knows of itself
    and those before it. bias: (B, L), added to the attention's logits towards a place.

    The layers of Vaswani et al. 2017, normalised after each half as there and in BERT. torch's own layer would do, but
    for the other kernel that it takes where nothing learns: it reads a mask with one row a head as something else.
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
    """shape.json and weights.npz in ``folder``."""
    (folder / "shape.json").write_text(json.dumps(asdict(shape)))
    np.savez(folder / "weights.npz", **{name: value.cpu().numpy() for name, value in net.state_dict().items()})


def load(folder: Path, **changes: Any) -> tuple[Any, Shape]:
    """What :func:`save` wrote, with ``changes`` of its shape (dropout). Raises ValueError or OSError where it is
    damaged."""
    import torch

    shape = replace(load_shape(folder), **changes)
    with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten: nobody else's draws may change
        net = network(shape)
    found = {name: torch.from_numpy(value) for name, value in arrays(folder / "weights.npz").items()}
    try:
        net.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(f"weights.npz does not fit shape.json ({' '.join(str(error).split())[:200]})") from error
    return net, shape


def load_shape(folder: Path) -> Shape:
    """The shape alone. Raises ValueError or OSError where it is damaged."""
    try:
        return Shape(**json.loads((folder / "shape.json").read_text()))
    except TypeError as error:
        raise ValueError(f"shape.json is another version's ({error})") from error


def digest(folder: Path) -> str:
    """sha256 of a saved network, hex."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in ("shape.json", "weights.npz"))).hexdigest()


class Ranker:
    """Scores of every document for histories; see :class:`retrievers.recommenders.fitted.Model`.

    A query is the unit vector u of its encoded history. Weights: one of zero leaves its item out; positive ones
    multiply the attention that an item draws (log w is added to the logits, so 2 is an item that stands there twice);
    items of negative weight are no part of the sequence, and each takes its share of their mean away:

        score(d) = u · d - (1/m) Σ_j |w_j| j · d            all vectors of unit length, j over the m disliked items

    Without a positive item only the second part is left; without any, nothing is found.
    """

    def __init__(self, net: Any, shape: Shape, features: Any, ids: Ids | None = None) -> None:
        """features: (n, M) uint8 codes or (n, d) text embeddings, on the network's device."""
        self.net, self.shape, self.features, self.ids = net, shape, features, ids
        self.refresh()

    def refresh(self) -> Ranker:
        """Item vectors from what the network has learned by now, (n, h) of unit length and their norms."""
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
        """(Q, n) float32. A query is encoded in a block of one shape, which its own length decides, and so is scored
        alike in every batch. Raises ValueError for a row outside the catalogue or weights that do not fit."""
        import torch

        n = len(self.features)
        history_matrix(queries, n)  # for its checks
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
        """(Q, h): what each query is multiplied by; (Q,) bool: whether anything speaks in it."""
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
        """Up to BLOCK (query, rows, positive weights) -> (len(part), h) of unit length."""
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
