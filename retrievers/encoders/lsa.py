"""Latent semantic analysis as an encoder: one fitted on a catalogue's own words, which needs no network and no model.

TF-IDF with idf = ln((1 + n) / (1 + df)) + 1 and rows of unit length (scikit-learn's), then the ``dimensions`` leading
right singular vectors V (Deerwester et al. 1990, "Indexing by latent semantic analysis"); a text is its TF-IDF row
times V. That is a sum of one vector a word, idf_w V_w, so what is written is a sentence-transformers model of such
vectors: its folder goes wherever an encoder's name goes (dense, l3ae, …).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retrievers.core.index_folder import is_filled, new_folder
from retrievers.encoders.sentence import INSTALL
from retrievers.types import RetrieverError

DIMENSIONS = 128
MAX_VOCABULARY = 50_000  # of the vocabulary, the most frequent
UNKNOWN_WORD = "[UNK]"


def fit(texts: Sequence[str], folder: str | Path, dimensions: int = DIMENSIONS) -> Path:
    """Fit on ``texts`` and save in ``folder``, or do nothing where that is filled; returns the folder.

    A catalogue of n texts and V words has at most min(n, V) - 1 dimensions. Raises ValueError where the texts hold
    fewer than two different words, RetrieverError for a missing extra.
    """
    folder = Path(folder)
    if is_filled(folder):
        return folder
    if importlib.util.find_spec("sentence_transformers") is None:
        raise RetrieverError(f"an encoder needs its extra (sentence-transformers is missing): {INSTALL}")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    normalizer, words = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    documents = [[word for word, _ in words.pre_tokenize_str(normalizer.normalize_str(text))] for text in texts]
    vocabulary = _vocabulary(documents)
    if len(vocabulary) < 3:
        raise ValueError("LSA needs texts of at least two different words: give the items titles, or another encoder")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_WORD))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, words
    vectors = word_vectors([[vocabulary.get(word, 0) for word in document] for document in documents], dimensions)
    with new_folder(folder) as temporary:
        module = StaticEmbedding(tokenizer, embedding_weights=vectors)
        SentenceTransformer(modules=[module], device="cpu").save(str(temporary), create_model_card=False)
    return folder


def _vocabulary(documents: Sequence[Sequence[str]]) -> dict[str, int]:
    """word -> number; 0 is UNKNOWN_WORD, then by frequency, ties by the alphabet."""
    from collections import Counter

    counts = Counter(word for document in documents for word in document)
    kept = sorted(counts, key=lambda word: (-counts[word], word))[:MAX_VOCABULARY]
    return {word: number for number, word in enumerate([UNKNOWN_WORD, *kept])}


def word_vectors(documents: Sequence[Sequence[int]], dimensions: int) -> np.ndarray:
    """n documents of word numbers -> (V, d) float32, idf_w V_w of each word w; row 0, the unknown word, is 0.

    d = min(dimensions, n - 1, V - 2), at least 1. Deterministic: the randomised SVD has a fixed seed.
    """
    from scipy.sparse import csr_matrix
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer

    size = 1 + max((word for document in documents for word in document), default=0)
    offsets = np.cumsum([0, *map(len, documents)])
    flat = np.array([word for document in documents for word in document], np.int64)
    counts = csr_matrix((np.ones(len(flat)), flat, offsets), (len(documents), size))
    counts.sum_duplicates()
    known = counts[:, 1:]
    weighting = TfidfTransformer().fit(known)
    svd = TruncatedSVD(max(1, min(dimensions, len(documents) - 1, size - 2)), random_state=0)
    svd.fit(weighting.transform(known))
    vectors = np.zeros((size, svd.components_.shape[0]), np.float32)
    vectors[1:] = weighting.idf_[:, None] * svd.components_.T
    return vectors
