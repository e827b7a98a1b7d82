"""The text embeddings of a catalogue, taken from the index of another backend where one has them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from retrievers.catalog import Catalog
from retrievers.core.index_folder import link_or_copy, read_meta
from retrievers.encoders.sentence import Encoder
from retrievers.types import RetrieverError

logger = logging.getLogger(__name__)


def embed(catalog: Catalog, encoder: Encoder, siblings: Path | None, into: Path | None = None) -> np.ndarray:
    """The text embeddings of a catalogue: (n, d) float16.

    siblings: a folder with other index folders. The embeddings of an index of the same catalogue and encoder are used
        again; `dense` saves them, too. None = the texts are encoded.
    into: a folder into which embeddings.npy is written. None, the default, = it is not written.
    """
    wanted = {"catalog": catalog.fingerprint, "encoder": encoder.describe()}
    for other in sorted(siblings.glob("*/index.json")) if siblings is not None else []:
        found = other.parent / "embeddings.npy"
        try:
            meta = read_meta(other.parent, {"catalog": wanted["catalog"]})
            theirs = meta.get("encoder", meta.get("params", {}).get("encoder"))
            if theirs != wanted["encoder"] or not found.is_file():
                continue
            if into is not None:
                link_or_copy(found, into / found.name)
            logger.info("using the embeddings in %s", other.parent)
            return np.asarray(np.load(found))
        except (RetrieverError, OSError, ValueError):
            continue
    vectors = encoder.documents(catalog.texts)
    if into is not None:
        np.save(into / "embeddings.npy", vectors)
    return vectors
