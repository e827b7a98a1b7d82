"""Late interaction: compared with brute force and with sentence-transformers, interrupted, damaged, and too large."""

import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

import retrievers
from rec_r1 import config, tasks
from retrievers import Catalog, Query, RetrieverError
from retrievers.encoders import tokens
from retrievers.encoders.tokens import TokenEncoder
from retrievers.text import maxsim
from retrievers.text.maxsim import MaxSim

TEXTS = ["party popper", "sad face", "party face", "party face", "a castle in Japan", "", "running shoes", "?!…"]


def make_catalog(texts=TEXTS) -> Catalog:
    return Catalog.from_records({"id": f"d{i}", "text": text} for i, text in enumerate(texts))


def brute_force(query, documents) -> list[float]:
    """MaxSim of one query with each document, token by token."""
    if not len(query):
        return [-np.inf] * len(documents)
    return [
        float(np.float32(sum(max(float(np.dot(a, b)) for b in document) for a in query))) if len(document) else -np.inf
        for document in documents
    ]


@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 99), st.integers(1, 9), st.integers(1, 30))
def test_scores_are_the_brute_force(texts, q, seed, chunk, rows):
    rng = np.random.default_rng(seed)
    lengths = np.sort(rng.integers(0, 5, texts))
    stored = rng.integers(-2, 3, (lengths.sum(), 3)).astype(np.float16)  # Their sums are exact and often equal.
    place = rng.integers(0, texts, 2 * texts)
    documents = np.split(stored.astype(np.float64), lengths.cumsum()[:-1])
    queries = [rng.integers(-2, 3, (t, 3)).astype(np.float32) for t in rng.integers(0, 6, q)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maxsim, "CHUNK", chunk)
        patch.setattr(maxsim, "QUERY_TOKENS", rows)
        scorer = MaxSim(stored, lengths, place, "cpu")
        blocks = list(scorer.blocks(queries))
        found = [row for block in blocks for row in scorer.scores(queries[block]).tolist()]
    assert [i for block in blocks for i in range(q)[block]] == list(range(q))
    assert all(len(queries[b]) == 1 or max(map(len, queries[b])) * len(queries[b]) <= rows for b in blocks)
    assert found == [[brute_force(query, documents)[i] for i in place] for query in queries]


def test_a_score_does_not_depend_on_the_other_queries():
    rng = np.random.default_rng(0)
    lengths = np.sort(rng.integers(1, 40, 150))
    stored = rng.standard_normal((lengths.sum(), 64)).astype(np.float16)
    scorer = MaxSim(stored, lengths, rng.permutation(150), "cpu")
    queries = [rng.standard_normal((t, 64)).astype(np.float32) for t in rng.integers(1, 30, 40)]
    together = scorer.scores(queries)
    assert len({len(query) for query in queries}) > 10 and len(np.unique(together)) > 5_900
    for q in range(40):
        assert scorer.scores(queries[q : q + 1])[0].tolist() == together[q].tolist()
    assert scorer.scores(queries[5:20]).tolist() == together[5:20].tolist()


@pytest.fixture(scope="module")
def emoji():
    """A twentieth of the bundled task's documents, and a retriever over them."""
    task = tasks.load(config.load("quickstart").task)
    catalog = make_catalog([task.catalog.texts[row] for row in range(0, len(task.catalog), 20)])
    return catalog, task.test.queries[:10], retrievers.open("late", catalog)


@pytest.mark.slow
def test_the_ranking_is_that_of_the_library(emoji):
    """sentence-transformers encodes and scores all pairs in float32, where the index has float16."""
    from sentence_transformers import SentenceTransformer

    catalog, queries, late = emoji
    body = SentenceTransformer(str(late.encoder.model.folder), device="cpu")
    body.tokenizer.model_max_length = 256
    marks = {body.tokenizer.convert_tokens_to_ids(mark) for mark in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"}

    def embedded(text, document):
        ids = body.tokenizer(text)["input_ids"]
        vectors = body.encode(text, output_value="token_embeddings", normalize_embeddings=False).numpy()
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.stack([v for i, v in zip(ids, vectors, strict=True) if not (document and i in marks)])

    documents = [embedded(text, True) for text in catalog.texts]
    asked = [Query(text) for text in queries]
    hits = late.search(asked, len(catalog))
    ranks = late.ranks(asked, np.tile(np.arange(len(catalog)), (len(asked), 1)))
    for q, text in enumerate(queries):
        expected = np.array(brute_force(embedded(text, False), documents))
        assert np.allclose(hits.scores[q], expected[hits.rows[q]], atol=5e-3)
        assert np.abs(expected[hits.rows[q]] - np.sort(expected)[::-1]).max() < 5e-3
        assert ranks[q][hits.rows[q]].tolist() == list(range(1, len(catalog) + 1))


@pytest.mark.slow
def test_which_tokens_count(tmp_path):
    encoder = TokenEncoder(str(tiny_models.encoder(tmp_path / "plain")))
    ((_, vectors, lengths),) = encoder.slabs(["a big, red? x!", "!!", ""])
    assert lengths.tolist() == [10, 2, 2]  # [CLS], one token for each of eight letters, [SEP]: no marks.
    assert vectors.dtype == np.float16 and np.allclose(np.linalg.norm(vectors.astype(float), axis=1), 1, atol=1e-3)
    assert [len(query) for query in encoder.queries(["a big, red?", "!!"])] == [11, 4]  # Queries keep theirs.
    cut = TokenEncoder(str(tmp_path / "plain"), document_length=8, document_prefix="x")
    ((_, _, lengths),) = cut.slabs(["a big red", ""])
    assert lengths.tolist() == [8, 3]
    assert cut.count(["a big red", "", ""], 0) == 11 and cut.count(["a big red", ""], 16) == 16


@pytest.mark.slow
@pytest.mark.parametrize("form", ["multi_vector", "pylate", "stanford"])
def test_a_model_for_late_interaction_keeps_its_own_ways(form, tmp_path):
    """Its projection, [MASK] tokens and marks of queries and documents are those with which the library loads it."""
    from sentence_transformers import MultiVectorEncoder

    folder = getattr(tiny_models, form)(tmp_path / form)
    late = retrievers.open("late", make_catalog(), model=str(folder))
    assert late.scorer.tokens.shape[1] == tiny_models.PROJECTED
    queries = ["party face", "a, b"]
    library = MultiVectorEncoder(str(folder), device="cpu")
    wanted = library.similarity(library.encode_query(queries), library.encode_document(TEXTS)).numpy()
    assert {len(query) for query in late.encoder.queries(queries)} == {12}  # Padded with [MASK].
    assert np.allclose(late.scorer.scores(late.encoder.queries(queries)), wanted, atol=2e-2)
    plain = retrievers.open("late", make_catalog(), model=str(tiny_models.encoder(tmp_path / "plain")))
    assert plain.scorer.tokens.shape[1] == tiny_models.HIDDEN and plain.fingerprint != late.fingerprint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(tiny_models.encoder(tmp_path_factory.mktemp("tiny") / "encoder"))


@pytest.mark.slow
def test_equal_texts_are_stored_once_and_an_index_has_the_stated_size(tiny, tmp_path):
    late = retrievers.open("late", make_catalog(TEXTS * 3), tmp_path / "index", model=tiny)
    tokens_ = np.load(tmp_path / "index" / "tokens.npy")
    assert len(tokens_) == late.encoder.count(TEXTS, 0)
    size = (tmp_path / "index" / "tokens.npy").stat().st_size
    assert size == tokens_.size * 2 + 128  # The head of the file has 128 bytes.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "index.lock"]


@pytest.mark.slow
def test_an_interrupted_build_goes_on_and_ends_the_same(tiny, tmp_path, monkeypatch):
    texts = [f"document number {i} about {'party ' * (i % 5)}" for i in range(40)] + ["document number 5 about "]
    whole = retrievers.open("late", make_catalog(texts), tmp_path / "whole", model=tiny, batch_size=2)
    encode, done = TokenEncoder.slabs, []

    def interrupted(self, order, start=0):
        for slab in encode(self, order, start):
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(slab[0])
            yield slab

    folder = tmp_path / "cut" / "index"
    with monkeypatch.context() as patch:
        patch.setattr(TokenEncoder, "slabs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            retrievers.open("late", make_catalog(texts), folder, model=tiny, batch_size=2)
    assert not folder.exists() and done == [0, 1, 2]
    starts = []
    monkeypatch.setattr(
        TokenEncoder, "slabs", lambda self, order, start: starts.append(start) or encode(self, order, start)
    )
    again = retrievers.open("late", make_catalog(texts), folder, model=tiny, batch_size=2)
    assert starts == [3] and again.fingerprint == whole.fingerprint
    for name in ("tokens", "lengths", "place"):
        assert np.array_equal(np.load(folder / f"{name}.npy"), np.load(tmp_path / "whole" / f"{name}.npy"))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["index", "index.lock"]


@pytest.mark.slow
def test_slabs_of_something_else_are_not_used(tiny, tmp_path):
    partial = tmp_path / ".index.partial"
    partial.mkdir()
    (partial / "identity").write_text("of another catalogue")
    np.save(partial / "000000.npy", np.zeros((9, tiny_models.HIDDEN), np.float16))
    np.save(partial / "000000.lengths.npy", np.ones(9, np.int32))
    late = retrievers.open("late", make_catalog(), tmp_path / "index", model=tiny)
    assert np.linalg.norm(late.scorer.tokens.astype(float), axis=1) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_an_index_that_is_too_large_is_refused_before_it_is_encoded(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(TokenEncoder, "slabs", lambda *_: pytest.fail("encoded"))
    count = TokenEncoder(tiny).count(TEXTS, 0)
    stated = (
        rf"max_gb: the index needs {count * 32 / 1e9:.3g} GB, more than 1e-06: {count} tokens x 16 dimensions x 2 bytes"
    )
    with pytest.raises(ValueError, match=stated):
        retrievers.open("late", make_catalog(), tmp_path / "index", model=tiny, max_gb=1e-6)
    assert not (tmp_path / "index").exists()


@pytest.mark.slow
def test_max_gb_and_speed_are_no_part_of_the_fingerprint(tiny):
    def opened(**params):
        return retrievers.open("late", make_catalog(), model=tiny, **params).fingerprint

    assert opened() == opened(max_gb=1, batch_size=3, device="cpu")
    changed = [{}, {"document_prefix": "a "}, {"query_prefix": "a "}, {"document_length": 9}]
    assert len({opened(**params) for params in changed}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["meta", "missing", "short", "order", "place"])
def test_a_damaged_index_is_refused(tiny, tmp_path, damage):
    folder = tmp_path / "index"
    retrievers.open("late", make_catalog(), folder, model=tiny)
    if damage == "meta":
        (folder / "index.json").write_text("[]")
    elif damage == "missing":
        (folder / "lengths.npy").unlink()
    elif damage == "short":
        (folder / "tokens.npy").write_bytes((folder / "tokens.npy").read_bytes()[:300])
    elif damage == "order":
        np.save(folder / "lengths.npy", np.load(folder / "lengths.npy")[::-1])
    else:
        np.save(folder / "place.npy", np.load(folder / "place.npy") + 2)
    with pytest.raises(RetrieverError, match="delete the folder"):
        retrievers.open("late", make_catalog(), folder, model=tiny)


@pytest.mark.slow
def test_all_mistakes_are_named_at_once(tiny, tmp_path):
    wrong = {"model": " ", "batch_size": 0, "document_length": 0, "max_gb": -1, "device": "gpu"}
    with pytest.raises(ValueError, match="model must be") as error:
        retrievers.open("late", make_catalog(), **wrong)
    assert all(f"retriever.params.{name}" in str(error.value) for name in wrong)
    with pytest.raises(ValueError, match=r"document_length: 300: .* reads at most 128 tokens: set 128 or less"):
        retrievers.open("late", make_catalog(), model=tiny, document_length=300)
    with pytest.raises(RetrieverError, match="neither a folder nor found on the hub"):
        retrievers.open("late", make_catalog(), model="nobody/no-such-model")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(RetrieverError, match="is a pickle, which is not read"):
        retrievers.open("late", make_catalog(), model=str(tmp_path / "pickled"))


@pytest.mark.slow
def test_an_encoder_without_tokens_is_refused(tiny, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = StaticEmbedding(tiny_models.tokenizer(), embedding_dim=8)
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"))
    with pytest.raises(RetrieverError, match="StaticEmbedding has no embedding for each token: take a transformer"):
        retrievers.open("late", make_catalog(), model=str(tmp_path / "static"))


@pytest.mark.slow
def test_embeddings_that_are_no_numbers_are_refused(tiny, monkeypatch):
    class Broken:
        prompts: dict = {}  # noqa: RUF012
        max_seq_length = 128

        def get_embedding_dimension(self):
            return 4

        def encode_document(self, texts, **_):
            return [np.full((2, 4), np.nan, np.float32)] * len(texts)

    monkeypatch.setattr(tokens, "_load", lambda *_: Broken())
    with pytest.raises(ValueError, match="that are not finite: take another model"):
        retrievers.open("late", make_catalog(), model=tiny)
