"""An encoder by latent semantic analysis (LSA). It is fitted on the texts of a catalogue and needs no download.

Each text becomes a TF-IDF vector of unit length with idf = ln((1 + n) / (1 + df)) + 1, for n texts of which df contain
the word (scikit-learn's TfidfTransformer). V holds the ``dimensions`` leading right singular vectors of these n vectors
(Deerwester et al. 1990, "Indexing by latent semantic analysis"), and the embedding of a text is its TF-IDF vector
times V. Apart from its length, that is the sum of one vector idf_w V_w per word w. The encoder is therefore saved as a
sentence-transformers model of word vectors, whose folder can be given as the ``model`` of any backend with an encoder,
such as dense and l3ae.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retrievers.core.index_folder import is_filled, new_folder
from retrievers.encoders.files import check_installed

DIMENSIONS = 128
MAX_VOCABULARY = 50_000  # So many words are kept, the most frequent ones.
UNKNOWN_WORD = "[UNK]"  # The token for every other word. Its vector is 0.


def fit(texts: Sequence[str], folder: str | Path, dimensions: int = DIMENSIONS) -> Path:
    """Fit an encoder on ``texts``, save it in ``folder``, and return the folder.

    texts: n texts.
    folder: where the model is saved. Nothing is fitted where this folder is not empty.
    dimensions: the number of dimensions, at most min(n, V) - 1 for V different words. Default 128.

        folder = lsa.fit(catalog.texts, "encoders/lsa")
        retrievers.open("dense", catalog, model=str(folder))

    Raises ValueError where the texts have fewer than two different words, and RetrieverError where
    sentence-transformers is not installed.
    """
    folder = Path(folder)
    if is_filled(folder):
        return folder
    check_installed("an encoder")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    normalizer, words = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    documents = [[word for word, _ in words.pre_tokenize_str(normalizer.normalize_str(text))] for text in texts]
    vocabulary = _vocabulary(documents)
    if len(vocabulary) < 3:
        raise ValueError(
            "LSA needs texts with at least two different words: give the items titles, or use another encoder"
        )
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_WORD))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, words
    vectors = word_vectors([[vocabulary.get(word, 0) for word in document] for document in documents], dimensions)
    with new_folder(folder) as temporary:
        module = StaticEmbedding(tokenizer, embedding_weights=vectors)
        SentenceTransformer(modules=[module], device="cpu").save(str(temporary), create_model_card=False)
    return folder


def _vocabulary(documents: Sequence[Sequence[str]]) -> dict[str, int]:
    """The number of each word: 0 for UNKNOWN_WORD, the others by descending frequency, then alphabetically."""
    from collections import Counter

    counts = Counter(word for document in documents for word in document)
    kept = sorted(counts, key=lambda word: (-counts[word], word))[:MAX_VOCABULARY]
    return {word: number for number, word in enumerate([UNKNOWN_WORD, *kept])}


def word_vectors(documents: Sequence[Sequence[int]], dimensions: int) -> np.ndarray:
    """The vector idf_w V_w of each of the V words: (V, d) float32. Row 0, the vector of the unknown word, is 0.

    documents: n documents, each as a list of word numbers.
    dimensions: the upper limit of d, which is min(dimensions, n - 1, V - 2), but at least 1.

    The result is deterministic, because the randomised SVD has a fixed seed.
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
