"""The dense backend: compared with brute force, interrupted and continued, damaged, and with approximate indexes."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import retrievers
from rec_r1 import config, tasks
from retrievers import Catalog, Query, RetrieverError
from retrievers.encoders import files, sentence
from retrievers.encoders.sentence import Encoder
from retrievers.text.exact_search import CHUNK, Exact

TEXTS = ["party popper", "sad face", "party face", "party face", "a castle in Japan", "", "running shoes"]


def make_catalog(texts=TEXTS) -> Catalog:
    return Catalog.from_records({"id": f"d{i}", "text": text} for i, text in enumerate(texts))


@pytest.fixture(scope="module")
def cache():
    """The folder where a training of the quickstart may have left the embeddings of its documents already."""
    return config.cache_folder() / "indexes"


@pytest.fixture(scope="module")
def emoji(cache):
    """The bundled task with 1,854 documents, and a dense retriever over its catalogue."""
    task = tasks.load(config.load("quickstart").task)
    return task, retrievers.open("dense", task.catalog, cache / "test-dense-exact")


def brute_force(embeddings, queries) -> list[list[int]]:
    """The ranking of each query by float32 inner products, and then by rows, computed by brute force."""
    scores = (queries[:, None, :] * embeddings.astype(np.float32)[None]).sum(2, dtype=np.float64).astype(np.float32)
    return [sorted(range(len(embeddings)), key=lambda row, q=q: (-scores[q, row], row)) for q in range(len(queries))]


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(0, 99), st.integers(1, 9))
def test_search_and_ranks_are_the_brute_force(n, q, t, seed, chunk):
    rng = np.random.default_rng(seed)
    embeddings = rng.integers(-2, 3, (n, 3)).astype(np.float16)  # Their sums are exact and often equal.
    queries = rng.integers(-2, 3, (q, 3)).astype(np.float32)
    expected = brute_force(embeddings, queries)
    targets = rng.integers(-1, n, (q, t))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrievers.text.exact_search.CHUNK", chunk)
        exact = Exact(embeddings, "cpu")
        for k in {1, (n + 1) // 2, n}:
            rows, scores = exact.search(queries, k)
            assert rows.tolist() == [order[:k] for order in expected]
            assert np.array_equal(scores, np.take_along_axis(queries @ embeddings.T.astype(np.float32), rows, 1))
        ranks = exact.ranks(queries, targets)
    assert ranks.dtype == np.int32
    assert ranks.tolist() == [
        [expected[i].index(row) + 1 if row >= 0 else 0 for row in targets[i].tolist()] for i in range(q)
    ]


def test_ranks_agree_with_search_where_sums_are_rounded():
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((2 * CHUNK + 37, 64)).astype(np.float16)
    embeddings[[5, CHUNK + 1, 2 * CHUNK + 30]] = embeddings[77]  # Equal scores in three chunks.
    queries = rng.standard_normal((9, 64)).astype(np.float32)
    exact = Exact(embeddings, "cpu")
    rows, scores = exact.search(queries, len(embeddings))
    targets = rng.integers(0, len(embeddings), (9, 20))
    targets[:, :4] = [5, 77, CHUNK + 1, 2 * CHUNK + 30]
    place = np.argsort(rows, axis=1) + 1
    assert exact.ranks(queries, targets).tolist() == np.take_along_axis(place, targets, 1).tolist()
    for q in range(9):  # A single query and a few rows give bitwise equal scores.
        alone_rows, alone = exact.search(queries[q : q + 1], 50)
        assert alone_rows[0].tolist() == rows[q, :50].tolist() and alone[0].tolist() == scores[q, :50].tolist()
        assert exact.scores_of(queries[q], rows[q, :7]).tolist() == scores[q, :7].tolist()
    order = np.lexsort((rows, -scores), axis=1)
    assert (order == np.arange(len(embeddings))).all()


@pytest.mark.slow
def test_embeddings_are_the_encoders(emoji):
    """The embeddings are compared with those of sentence-transformers, which encodes one text at a time."""
    from sentence_transformers import SentenceTransformer

    task, dense = emoji
    model = SentenceTransformer(str(files.resolve("all-minilm-l6-v2")), device="cpu")
    chosen = [0, 500, 1853]
    expected = model.encode([task.catalog.texts[row] for row in chosen], normalize_embeddings=True)
    assert np.allclose(dense._exact.embeddings[chosen], expected, atol=1e-3)
    assert np.allclose(
        dense.encoder.queries(["lecturer"])[0], model.encode("lecturer", normalize_embeddings=True), atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factory", "tune", "least"),
    [
        ("Flat", "", 1.0),
        ("HNSW32", "efSearch=128", 0.98),
        ("IVF32,PQ24x4", "nprobe=16", 0.6),  # Four times as coarse as usual, and four times as fast to train.
        ("PCA192,IVF32,SQ8", "nprobe=16", 0.85),  # nprobe must reach the index behind the transformation
    ],
)
def test_approximate_search_finds_most_and_ranks_stay_exact(emoji, cache, factory, tune, least, monkeypatch):
    task, exact = emoji
    with monkeypatch.context() as patch:  # Another engine uses the same embeddings.
        patch.setattr(Encoder, "_encode", lambda *_: pytest.fail("encoded again"))
        folder = cache / f"test-dense-{factory}"
        faiss = retrievers.open("dense", task.catalog, folder, engine="faiss", factory=factory, tune=tune)
    queries = [Query(text) for text in task.test.queries]
    expected, found = exact.search(queries, 10).rows, faiss.search(queries, 10).rows
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(expected.tolist(), found.tolist(), strict=True)])
    print(f"{factory}: recall@10 {recall:.4f}")
    assert recall >= least
    targets = np.random.default_rng(0).integers(0, len(task.catalog), (len(queries), 3))
    assert faiss.ranks(queries, targets).tolist() == exact.ranks(queries, targets).tolist()


@pytest.mark.slow
def test_prefixes_pooling_and_normalisation_matter():
    plain = Encoder("all-minilm-l6-v2")
    e5 = Encoder("all-minilm-l6-v2", query_prefix="query: ", document_prefix="passage: ")
    text = ["running shoes"]
    assert np.allclose(e5.queries(text), plain.queries(["query: running shoes"]), atol=1e-6)
    assert np.allclose(e5.documents(text), plain.documents(["passage: running shoes"]), atol=1e-3)
    cls, mean = (Encoder("all-minilm-l6-v2", pooling=pooling) for pooling in ("cls", "mean"))
    assert not np.allclose(cls.queries(text), plain.queries(text), atol=1e-2)
    assert np.allclose(mean.queries(text), plain.queries(text), atol=1e-5)
    assert np.linalg.norm(mean.queries(text)) == pytest.approx(1, abs=1e-5)
    raw = Encoder("all-minilm-l6-v2", pooling="mean", normalize=False)
    assert np.linalg.norm(raw.queries(text)) > 1.5
    fingerprints = [json.dumps(one.describe(), sort_keys=True) for one in (plain, e5, cls, mean, raw)]
    assert len(set(fingerprints)) == 5


@pytest.mark.slow
def test_an_interrupted_build_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    texts = [f"document number {i} about {'party ' * (i % 5)}" for i in range(40)] + ["document number 5 about "]
    whole = retrievers.open("dense", make_catalog(texts), tmp_path / "whole" / "index", batch_size=4)
    expected = np.load(tmp_path / "whole" / "index" / "embeddings.npy")
    monkeypatch.setattr(sentence, "BATCHES_PER_SLAB", 2)  # Eight texts per slab, so six slabs.
    real, done = Encoder._encode, []

    def interrupted(self, part, prefix):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(part)
        return real(self, part, prefix)

    folder = tmp_path / "cut" / "index"
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "_encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            retrievers.open("dense", make_catalog(texts), folder, batch_size=4)
    assert not folder.exists()
    encoded = []
    monkeypatch.setattr(Encoder, "_encode", lambda self, part, prefix: encoded.append(part) or real(self, part, prefix))
    again = retrievers.open("dense", make_catalog(texts), folder, batch_size=4)
    assert len(encoded) == math.ceil(40 / 8) - 3  # Three slabs were kept. Equal texts count once.
    assert again.fingerprint == whole.fingerprint
    assert np.allclose(np.load(folder / "embeddings.npy"), expected, atol=1e-3)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["index", "index.lock"]


@pytest.mark.slow
def test_a_half_built_matrix_of_something_else_is_not_used(tmp_path, monkeypatch):
    folder = tmp_path / "index"
    partial = tmp_path / ".index.partial"
    partial.mkdir()
    np.save(partial / "embeddings.npy", np.zeros((len(TEXTS), 384), np.float16))
    (partial / "done.json").write_text('{"identity": "of another catalogue", "slabs": 1}')
    dense = retrievers.open("dense", make_catalog(), folder)
    assert dense.search([Query("party face")], 1).scores[0, 0] > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["meta", "missing", "short", "dimension", "faiss"])
def test_a_damaged_index_is_refused(tmp_path, damage):
    folder, params = tmp_path / "index", {"engine": "faiss"} if damage == "faiss" else {}
    retrievers.open("dense", make_catalog(), folder, **params)
    path = folder / ("index.faiss" if damage == "faiss" else "embeddings.npy")
    if damage == "meta":
        (folder / "index.json").write_text("[]")
    elif damage == "missing":
        path.unlink()
    elif damage == "dimension":
        np.save(path, np.load(path)[:, :300])
    else:
        path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(RetrieverError, match="delete the folder"):
        retrievers.open("dense", make_catalog(), folder, **params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"engine": "annoy"}, ValueError, "choose exact or faiss"),
        ({"pooling": "median"}, ValueError, "choose from mean, cls"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1"),
        ({"engine": "faiss", "factory": "HNSW32,Nonsense"}, ValueError, "factory: 'HNSW32,Nonsense' does not fit"),
        ({"engine": "faiss", "factory": "IVF4,PQ7"}, ValueError, "factory: 'IVF4,PQ7' does not fit 7 documents of 384"),
        ({"engine": "faiss", "tune": "nprobes=3"}, ValueError, "tune: 'nprobes=3' does not fit"),
        ({"model": "nobody/no-such-model"}, RetrieverError, "neither a folder nor found on the hub"),
    ],
)
def test_mistakes_are_named(params, error, message, tmp_path):
    with pytest.raises(error, match=message):
        retrievers.open("dense", make_catalog(), tmp_path / "index", **params)
    assert not (tmp_path / "index" / "index.json").exists() or "tune" in params


@pytest.mark.slow
def test_embeddings_that_float16_does_not_hold_are_refused(monkeypatch):
    monkeypatch.setattr(Encoder, "_encode", lambda self, texts, prefix: np.full((len(texts), 384), 1e6, np.float32))
    with pytest.raises(ValueError, match="normalize: true"):
        retrievers.open("dense", make_catalog())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "l3ae", "vqrec"])
def test_a_device_that_is_not_there_is_named(kind, tmp_path):
    few = retrievers.Interactions.from_sequences(len(TEXTS), [[0, 1, 2]])
    with pytest.raises(
        ValueError, match=r"params\.device: 'gpu' is not available on this machine \(.*\): leave it out, or set"
    ):
        retrievers.open(kind, make_catalog(), tmp_path / "i", few, device="gpu")
