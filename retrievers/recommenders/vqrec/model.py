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
from retrievers.recommenders.transformer import INITIAL_STD, ItemVectors, causal_network, history_scores, padded
from retrievers.recommenders.vqrec.codes import arrays
from retrievers.recommenders.vqrec.ids import Ids
from retrievers.types import Query

TEMPERATURE = 0.07  # τ in the paper.


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
    net = causal_network(content, shape.dim, shape.dim, shape.layers, shape.max_history, shape.dropout)
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

    The output for a history and the vectors of all items are scaled to unit length, so that scores are cosines. For
    weights, see :func:`retrievers.recommenders.transformer.history_scores`.
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
            self._norm = raw.norm(dim=1, keepdim=True).clamp_min(1e-12)
            self._unit = padded(raw / self._norm)
        return self

    def scores(self, queries: Sequence[Query]) -> np.ndarray:
        """The scores of Q queries: (Q, n) float32; -inf for a query without any item.

        Raises ValueError for a row outside the catalogue, and for weights that are not as many as the history's items.
        """
        n = len(self.features)
        history_matrix(queries, n)  # This checks the histories.
        return history_scores(self.net, self.shape.heads, ItemVectors(self._unit, self._norm), n, queries, unit=True)
