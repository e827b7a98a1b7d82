"""SASRec: a causal Transformer over embeddings by id predicts the item that a user chooses next.

See Kang and McAuley 2018, "Self-Attentive Sequential Recommendation" (arXiv:1808.09781). The network is the one in
`transformer.py`. The score of an item is the inner product of its embedding, which is also the one that the network
reads, with the output at the last item of the history. Two things differ from the paper:

- The layers are those of BERT: normalisation after each half, gelu, and a wider feed-forward layer, as in RecBole. The
  paper has normalisation before each half, relu, and feed-forward layers of the width of the embeddings.
- The loss is by default the cross-entropy over all items of the training split (Klenitskiy and Vasilev 2023,
  arXiv:2309.07602). The paper's, the binary cross-entropy against one random item, is ``loss: bce``.

An item that is not in the training split has no embedding. It is not retrieved, and is left out of a history.

    sasrec = retrievers.open("sasrec", catalog, "indexes/sasrec", interactions)
    sasrec.search([retrievers.Query(history=(3, 7))], k=10)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.parameters import MAX_SEED, Checks
from retrievers.encoders.settings import check_device
from retrievers.interactions import Interactions, history_matrix
from retrievers.recommenders.fitted import ByHistory, fitted
from retrievers.recommenders.next_item import (
    Batch,
    Schedule,
    Windows,
    competitors,
    ndcg_at_10,
    optimise,
    seeded,
    torch_device,
)
from retrievers.recommenders.transformer import (
    ItemVectors,
    causal_network,
    check_sizes,
    encode,
    history_scores,
    padded,
)
from retrievers.types import Query

INDEX_FORMAT = 1
FILE = "sasrec.safetensors"
ROWS = "rows"  # The name of the tensor with the catalogue rows of the embeddings.
LOSSES = ("ce", "bce")
BCE_NEGATIVES = 1  # As in the paper.
REDRAWS = 20  # A negative that the user chose is drawn again, at most so many times.


@dataclass(frozen=True)
class Params:
    """The parameters of `sasrec`. Raises ValueError, naming the field, for a bad value."""

    # The loss: ce, the cross-entropy over all items, or bce, the binary cross-entropy against random items.
    loss: str = "ce"
    # How many random items a target competes with: of a step with ce, of each target with bce. null: with ce all of the
    # training split, at most 20,000, and with bce one.
    negatives: int | None = None
    dim: int = 64  # The length of the embeddings and the width of the Transformer.
    inner_dim: int | None = None  # The inner width of its feed-forward layers. null: four times `dim`.
    layers: int = 2  # The number of its layers.
    heads: int = 2  # The number of its attention heads, which must divide `dim`.
    dropout: float = 0.5  # The dropout of the fit.
    max_history: int = 50  # How many of the newest items of a history are read.
    learning_rate: float = 1e-3  # The learning rate of the fit.
    train_batch: int = 32  # The number of sequences in a step.
    epochs: int = 200  # The largest number of epochs.
    patience: int = 20  # The fit ends after so many epochs without a better validation ndcg@10.
    device: str | None = None  # The device of the network, such as cuda:0. null: a GPU if there is one.
    seed: int = 0  # The seed of the fit.

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.choice("loss", LOSSES)
        checks.integers("train_batch", "patience")
        check_sizes(checks)
        checks.integers("inner_dim", most=16_384, optional=True)
        checks.integers("negatives", optional=True)
        checks.integers("epochs", least=0)
        checks.integers("seed", least=0, most=MAX_SEED)
        checks.numbers("dropout", below=1)
        checks.numbers("learning_rate", above=True, below=1)
        with checks:
            if self.device is not None:
                check_device(self.device)
        checks.raise_all()
        if self.dim % self.heads:
            raise ValueError(
                f"retriever.params.heads: {self.heads} does not divide dim {self.dim}: choose one that does"
            )

    def schedule(self) -> Schedule:
        """The length and the speed of the fit."""
        return Schedule(self.epochs, self.patience, self.learning_rate, self.train_batch, self.seed)

    def network(self, items: int) -> Any:
        """A new network for so many items, see :func:`retrievers.recommenders.transformer.causal_network`."""
        from torch import nn

        inner = self.inner_dim or 4 * self.dim
        content = nn.Embedding(items, self.dim)
        return causal_network(content, self.dim, inner, self.layers, self.max_history, self.dropout)


class SASRec:
    """The fitted model; see :class:`retrievers.recommenders.fitted.Model`.

    net: the network. Its entry "content" has the embeddings of m items.
    heads: the number of its attention heads.
    rows: (m,) int64 rows of the catalogue, ascending: the items of the training split.
    documents: n.
    """

    def __init__(self, net: Any, heads: int, rows: np.ndarray, documents: int) -> None:
        self.net, self.heads, self.rows, self.documents = net, heads, rows, documents
        self.numbers = np.full(documents, -1, np.int64)
        self.numbers[rows] = np.arange(len(rows))
        self.refresh()

    def refresh(self) -> SASRec:
        """Read the embeddings again from the network, and set it to evaluation mode. Returns this model."""
        self.net.eval()
        self._items = ItemVectors(padded(self.net["content"].weight.detach()))
        return self

    def scores(self, queries: Sequence[Query]) -> np.ndarray:
        """The scores of Q queries: (Q, n) float32. The score of an item without an embedding is -inf, and so are all
        scores of a query whose history has no other items.

        For weights, see :func:`retrievers.recommenders.transformer.history_scores`. Raises ValueError for a row outside
        the catalogue, and for weights that are not as many as the history's items.
        """
        history_matrix(queries, self.documents)  # This checks the histories.
        known = [self._with_numbers(query) for query in queries]
        found = history_scores(self.net, self.heads, self._items, len(self.rows), known, unit=False)
        if len(self.rows) == self.documents:
            return found
        out = np.full((len(queries), self.documents), -np.inf, np.float32)
        out[:, self.rows] = found
        return out

    def _with_numbers(self, query: Query) -> Query:
        """The query with the numbers of the items that have an embedding in place of the rows of its history."""
        numbers = self.numbers[list(query.history)]
        weights = np.array(query.weights)[numbers >= 0].tolist() if query.weights else ()
        return Query(history=tuple(numbers[numbers >= 0].tolist()), weights=tuple(weights))


def build(
    catalog: Catalog, folder: str | Path | None = None, interactions: Interactions | None = None, **params: Any
) -> ByHistory:
    """Fit SASRec, or open the model in ``folder``.

    params: see :class:`Params`. The other arguments are those of :func:`retrievers.recommenders.fitted.fitted`.

    Raises ValueError for a bad parameter, and the errors of `fitted`.
    """
    settings = Params(**params)
    described = asdict(settings)
    del described["device"]  # It does not change the model.

    def fit(temporary: Path, given: Interactions) -> Mapping[str, Any]:
        with seeded(settings.seed):
            return _fit(settings, given, temporary)

    opened = partial(open_model, device=settings.device)
    return fitted("sasrec", INDEX_FORMAT, catalog, folder, interactions, described, fit, opened, floor=-np.inf)


def open_model(folder: Path, device: str | None = None) -> SASRec:
    """Load the fitted model in ``folder``. Raises ValueError, KeyError or OSError where it is damaged.

    device: a torch device. None, the default, = a GPU where there is one.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    meta = json.loads((folder / "index.json").read_text())
    settings, n = Params(**meta["params"]), int(meta["documents"])
    try:
        tensors = load_file(folder / FILE)
    except SafetensorError as error:
        raise ValueError(f"{FILE} is not a valid safetensors file ({error})") from error
    rows = tensors.pop(ROWS).clone().numpy()  # The file is mapped into memory only while it is read.
    if rows.ndim != 1 or rows.dtype != np.int64 or not len(rows) or (np.diff(rows) <= 0).any():
        raise ValueError(f"{FILE}: the rows of the items are not ascending integers")
    if rows[0] < 0 or rows[-1] >= n:
        raise ValueError(f"{FILE} has the rows {rows[0]} to {rows[-1]}, outside 0 to {n - 1}")
    with torch.random.fork_rng(devices=[]):  # The weights are overwritten, so drawing them must not change the state.
        net = settings.network(len(rows))
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{FILE} does not fit index.json ({' '.join(str(error).split())[:200]})") from error
    return SASRec(net.to(torch_device(device)), settings.heads, rows, n)


def _fit(settings: Params, given: Interactions, folder: Path) -> Mapping[str, Any]:
    """Fit the network, write it into ``folder``, and return a report."""
    import torch
    from safetensors.torch import save_file

    rows = np.unique(given.rows).astype(np.int64)
    device = torch_device(settings.device)
    model = SASRec(settings.network(len(rows)).to(device), settings.heads, rows, given.documents)
    sequences = [model.numbers[given.sequence(user)] for user in range(len(given))]
    windows = Windows(sequences, settings.max_history)
    if not len(windows.cuts):
        raise ValueError(
            "sasrec needs a user who chose at least two items, and these interactions have none: give more interactions"
        )
    net, target_loss = model.net, _loss(settings, sequences, len(rows))

    def loss(batch: Batch, epoch: int) -> Any:
        net.train()
        weight = net["content"].weight
        # weight[…] is not used, because threads add its gradient in a random order.
        vectors = torch.nn.functional.embedding(torch.from_numpy(batch.inputs).to(device), weight)
        hidden = encode(net, vectors, settings.heads)
        counted = batch.targets >= 0
        return target_loss(hidden[torch.from_numpy(counted).to(device)], weight, batch, counted)

    def measure() -> float | None:
        return ndcg_at_10(model.refresh(), given)

    report = optimise(list(net.parameters()), loss, windows, settings.schedule(), measure, "fitting")
    tensors = {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
    save_file(tensors | {ROWS: torch.from_numpy(rows)}, folder / FILE)
    return {"warm": len(rows), "cold": given.documents - len(rows), **report}


def _loss(
    settings: Params, sequences: Sequence[np.ndarray], items: int
) -> Callable[[Any, Any, Batch, np.ndarray], Any]:
    """The loss as a function of the outputs at the P positions that count, the embeddings, the batch, and the (B, L)
    bool of the positions that count.

    sequences: the numbers of the items of each user, from 0 to ``items`` - 1.
    """
    if settings.loss == "bce":
        drawn = Negatives(sequences, items, settings.seed)
        each = settings.negatives or BCE_NEGATIVES
        return lambda outputs, weight, batch, counted: binary_loss(
            outputs, weight, batch.targets[counted], drawn.draw(np.repeat(batch.users, counted.sum(1)), each)
        )
    compete = competitors(np.arange(items), settings.negatives, settings.seed)
    return lambda outputs, weight, batch, counted: softmax_loss(outputs, weight, batch.targets[counted], compete())


def softmax_loss(outputs: Any, weight: Any, targets: np.ndarray, compete: np.ndarray) -> Any:
    """The mean cross-entropy of the targets, a scalar tensor. The logits are inner products.

    outputs: (P, h), the outputs of the network.
    weight: (m, h), the embeddings.
    targets: (P,) the item that follows each.
    compete: the items of the softmax, to which the targets are added.
    """
    import torch
    from torch.nn.functional import cross_entropy, embedding

    if len(compete) < len(weight):
        rows = np.union1d(compete, targets)
        weight, targets = embedding(torch.from_numpy(rows).to(weight.device), weight), np.searchsorted(rows, targets)
    return cross_entropy(outputs @ weight.T, torch.from_numpy(targets).to(weight.device))


def binary_loss(outputs: Any, weight: Any, targets: np.ndarray, negatives: np.ndarray) -> Any:
    """The binary cross-entropy, a scalar tensor (Kang and McAuley 2018, section III.E, with means for sums).

    outputs, weight, targets: see :func:`softmax_loss`.
    negatives: (P, K) items that the users did not choose.

    With r for an inner product, it is the mean of -log σ(r) over the targets, plus the mean of -log(1 - σ(r)) over the
    negatives.
    """
    import torch
    from torch.nn.functional import embedding, softplus

    wanted, others = (embedding(torch.from_numpy(rows).to(weight.device), weight) for rows in (targets, negatives))
    return softplus(-(outputs * wanted).sum(1)).mean() + softplus((outputs[:, None] * others).sum(2)).mean()


class Negatives:
    """Draws items that a user did not choose, all with the same probability.

    sequences: the numbers of the items of each user.
    items: m.
    seed: of the random numbers.

    An item that the user chose is drawn again, at most REDRAWS times. It is then kept, because the user may have chosen
    all items.
    """

    def __init__(self, sequences: Sequence[np.ndarray], items: int, seed: int) -> None:
        users = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
        self._chosen = np.unique(users * items + np.concatenate(list(sequences)))
        self._items, self._rng = items, np.random.default_rng(seed)

    def draw(self, users: np.ndarray, each: int) -> np.ndarray:
        """(P, ``each``) int64 items for (P,) users."""
        drawn = self._rng.integers(0, self._items, (len(users), each))
        for _ in range(REDRAWS):
            keys = users[:, None] * self._items + drawn
            found = self._chosen[np.searchsorted(self._chosen, keys).clip(max=len(self._chosen) - 1)] == keys
            if not found.any():
                break
            drawn[found] = self._rng.integers(0, self._items, int(found.sum()))
        return drawn
