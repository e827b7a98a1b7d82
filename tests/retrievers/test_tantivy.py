"""tantivy compared with BM25's formula, with its own query parser and with bm25; hostile queries."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lucene_like import TEXTS, long_documents, make_catalog, rank_correlations

import retrievers
from rec_r1 import config, tasks
from retrievers import Catalog, Query
from retrievers.text import bm25
from retrievers.text import tantivy as module

WORDS = [f"w{i}" for i in range(60)]
CHANCE = 1 / np.arange(1, 61) / (1 / np.arange(1, 61)).sum()


def random_texts(rng, count: int, low: int, high: int) -> list[str]:
    """Short texts of Zipf's law over a few words, so that many documents have equal scores. Some are empty."""
    return [" ".join(rng.choice(WORDS, n, p=CHANCE)) for n in rng.integers(low, high, count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tantivy") / "index"
    retrievers.open("tantivy", make_catalog(), folder)
    return folder


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A retriever over 120 random documents, and their terms."""
    texts = random_texts(np.random.default_rng(0), 120, 0, 12)
    index = retrievers.open("tantivy", make_catalog(texts), tmp_path_factory.mktemp("shop") / "index", language=None)
    return index, [text.split() for text in texts]


def rounded(length: int) -> int:
    """The length that a byte can hold: up to 40 as it is, and above with the three bits after its first one."""
    if length < 40:
        return length
    drop = max(0, (length - 24).bit_length() - 4)
    return 24 + ((length - 24) >> drop << drop)


def formula(documents: list[list[str]], terms: list[str]) -> list[float]:
    """The score of each document, from the formula at the head of the module."""
    n, average = len(documents), sum(map(len, documents)) / len(documents)
    out = []
    for document in documents:
        tf, score = Counter(document), 0.0
        for term in terms:
            if tf[term]:
                df = sum(term in other for other in documents)
                length = 0.25 + 0.75 * rounded(len(document)) / average
                score += math.log(1 + (n - df + 0.5) / (df + 0.5)) * 2.2 * tf[term] / (tf[term] + 1.2 * length)
        out.append(score)
    return out


WORD = st.sampled_from(["party", "popper", "face", "sad", "rain", "castle"])
TEXT = st.lists(WORD, max_size=8).map(" ".join) | st.lists(WORD, min_size=39, max_size=80).map(" ".join)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(TEXT, TEXT), max_size=8),
    st.lists(WORD | st.just("unseen"), min_size=1, max_size=6),
    st.floats(0.1, 5.0),
)
def test_scores_are_the_formulas(pairs, terms, weight):
    """The sum over two fields, each with its own document frequencies and lengths, and with a weight."""
    pairs = [*pairs, ("party", "party face")]
    catalog = Catalog.from_records({"id": str(i), "text": a, "more": b} for i, (a, b) in enumerate(pairs))
    for fields in (None, {"text": 1, "more": weight}):
        retriever = retrievers.open("tantivy", catalog, language=None, fields=fields)
        hits = retriever.search([Query(" ".join(terms))], len(pairs))
        expected = np.array(formula([a.split() for a, _ in pairs], terms))
        if fields:
            expected += weight * np.array(formula([b.split() for _, b in pairs], terms))
        assert set(hits.rows[hits.rows >= 0].tolist()) == set(np.flatnonzero(expected).tolist())
        for row, score in zip(hits.rows[0].tolist(), hits.scores[0].tolist(), strict=True):
            assert row < 0 or score == pytest.approx(expected[row], rel=1e-4)


@pytest.mark.slow
def test_ranks_and_scores_of_ten_thousand_queries(shop, monkeypatch):
    """Against search(k=n) and a matrix product. For the first 2,000 queries, deep targets are found by bisection. Most
    documents match a query here, and most scores are shared."""
    retriever, documents = shop
    n, rng = len(documents), np.random.default_rng(1)
    asked = [rng.choice(WORDS, size, p=CHANCE).tolist() for size in rng.integers(1, 9, 10_000)]
    weights = np.array([formula(documents, [word]) for word in WORDS])
    tied = 0
    for start in range(0, len(asked), 500):
        if start < 2_000:
            monkeypatch.setattr(module, "SEARCH_DEPTH", 3)
            monkeypatch.setattr(module, "FEW", 3)
        else:
            monkeypatch.undo()
        queries = [Query(" ".join(words)) for words in asked[start : start + 500]]
        hits = retriever.search(queries, n)
        places = np.zeros((len(queries), n + 1), np.int32)
        np.put_along_axis(places, hits.rows.astype(np.int64), np.arange(1, n + 1, dtype=np.int32)[None], axis=1)
        targets = rng.integers(-1, n, (len(queries), 2))
        expected = np.where(targets < 0, 0, np.take_along_axis(places, targets, axis=1))
        assert retriever.ranks(queries, targets).tolist() == expected.tolist()
        counts = np.array([[words.count(word) for word in WORDS] for words in asked[start : start + 500]])
        scores = np.full((len(queries), n + 1), -np.inf)
        np.put_along_axis(scores, hits.rows.astype(np.int64), hits.scores.astype(float), axis=1)
        exact = counts @ weights
        np.testing.assert_allclose(scores[:, :n], np.where(exact > 0, exact, -np.inf), rtol=1e-5)
        found = hits.rows[:, 1:] >= 0
        equal = (hits.scores[:, 1:] == hits.scores[:, :-1]) & found
        assert (np.diff(hits.rows, axis=1)[equal] > 0).all()
        tied += int(equal.sum())
    assert tied > 50_000  # Equal scores are common here, so their order was tested.


@pytest.mark.slow
def test_deep_ranks_of_a_large_catalogue(tmp_path):
    """With the real limits: a list of 300 hits, a bisection of what matches beyond, and a list of at least 1,000."""
    n = 9 * module.FEW
    texts = random_texts(np.random.default_rng(0), n, 1, 9)
    retriever = retrievers.open("tantivy", make_catalog(texts), tmp_path / "index", language=None)
    queries = [Query(text) for text in ("w0", "w0 w1 w2 w9", "w59", "w30 w31", "unseen", "")]
    rows = retriever.search(queries, n).rows
    deep = (rows >= 0).sum(axis=1)
    assert deep[0] > 3 * module.FEW and deep[1] > 6 * module.FEW and deep[3] > module.SEARCH_DEPTH and deep[4] == 0
    targets = np.random.default_rng(1).integers(-1, n, (len(queries), 40))
    expected = [[list(found).index(row) + 1 if row in found[found >= 0] else 0 for row in ts]
                for found, ts in zip(rows, targets, strict=True)]  # fmt: skip
    assert retriever.ranks(queries, targets).tolist() == expected


def test_hits_are_those_of_tantivys_own_parser(shop):
    """An index that only this test makes, with tantivy's parser and tokenizer, has the same hits in the same order."""
    import tantivy

    retriever, documents = shop
    schema = tantivy.SchemaBuilder().add_text_field("body").build()
    index = tantivy.Index(schema)
    writer = index.writer(num_threads=1)
    for terms in documents:
        writer.add_document(tantivy.Document(body=" ".join(terms)))
    writer.commit()
    index.reload()
    searcher, rng = index.searcher(), np.random.default_rng(2)
    for size in rng.integers(1, 9, 60):
        words = rng.choice(WORDS, size, replace=False).tolist()
        theirs = searcher.search(index.parse_query(" ".join(words), ["body"]), 20).hits
        ours = retriever.search([Query(" ".join(words))], 20)
        found = ours.rows[0] >= 0
        np.testing.assert_allclose(ours.scores[0][found], [score for score, _ in theirs], rtol=1e-6)
        if len(words) == 1:  # With several words, the parser may add the scores in another order.
            assert ours.rows[0][found].tolist() == [address.doc for _, address in theirs]


def test_the_order_of_words_changes_nothing(shop):
    retriever, _ = shop
    rng = np.random.default_rng(3)
    for _ in range(50):
        words = rng.choice(WORDS, 9, p=CHANCE)
        first, second = (retriever.search([Query(" ".join(w))], 120) for w in (words, words[::-1]))
        assert first.rows.tolist() == second.rows.tolist() and first.scores.tolist() == second.scores.tolist()


def test_equal_documents_have_equal_scores_wherever_they_are(tmp_path):
    """The lists of some words end early in the index, and tantivy must not add the others in another order then."""
    rng = np.random.default_rng(4)
    half = random_texts(rng, 3_000, 4, 12)
    texts = ["rare1 rare2 rare3", *half, "late1 late2", *half]
    retriever = retrievers.open("tantivy", make_catalog(texts), tmp_path / "index", language=None)
    n = len(texts)
    for _ in range(20):
        words = rng.permutation(["rare1", "rare2", "rare3", "late1", *rng.choice(WORDS, 6, replace=False)])
        hits = retriever.search([Query(" ".join(words))], n)
        scores = np.zeros(n + 1, np.float32)
        scores[hits.rows[0]] = np.where(hits.rows[0] >= 0, hits.scores[0], 0)
        assert scores[1:3_001].tolist() == scores[3_002:-1].tolist()


HOSTILE = [
    '"', "'", "party AND", "(party OR", "-party", "+party -face", "party^100 face", "terms0:party", "row:[0 TO 9]",
    "*", "*:*", "par*", "/par.*/", "party~2", '"party face"~3', "IN [party face]", "\\", "\\\\party", "party\x00face",
    "\ud800 party", "party\udfff", "'; DROP TABLE items; --", "${jndi:ldap://x}", '{"query": {"match_all": {}}}',
    "<script>party</script>", "party\u202eface", "%s%n", "NaN", "1e999", "\U0001e4f0", "\x1b[2J", "a" * 70_000,
    "party " * 170_000, " ".join(f"x{i}" for i in range(30_000)),
]  # fmt: skip


@pytest.mark.slow
def test_a_query_can_only_be_a_search(folder):
    """500 texts made of query syntax: each finds what its words find, and no file of the index changes."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    retriever = retrievers.open("tantivy", make_catalog(), folder)
    rng = np.random.default_rng(0)
    short = HOSTILE[:-3]
    texts = [*HOSTILE, *(" ".join(rng.choice(short, 3)) for _ in range(500 - len(HOSTILE)))]
    assert len(texts) == 500
    documents = [set(terms) for terms in bm25.analyze(TEXTS, bm25.Params())]
    n = len(TEXTS)
    hits = retriever.search([Query(text) for text in texts], n)
    ranks = retriever.ranks([Query(text) for text in texts], np.tile(np.arange(n), (len(texts), 1)))
    for q, terms in enumerate(bm25.analyze(texts, bm25.Params())):
        expected = {row for row, document in enumerate(documents) if document & set(terms)}
        assert {row for row in hits.rows[q].tolist() if row >= 0} == expected, texts[q][:80]
        assert set(np.flatnonzero(ranks[q]).tolist()) == expected
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("language", "text", "query"),
    [
        ("zh", "防水登山鞋 男款", "登山"),
        ("ja", "軽いランニングシューズ", "シューズ"),
        ("th", "รองเท้าวิ่ง", "วิ่ง"),
        ("ko", "방수 등산화", "등산"),
        ("de", "Laufschuhe für Männer", "laufschuh"),
        ("en", "don’t stop, 9½ 🎉", "DONT"),
    ],
)
def test_words_are_those_of_bm25(language, text, query, tmp_path):
    catalog = make_catalog([text, "zebra"])
    for kind in ("bm25", "tantivy"):
        found = retrievers.open(kind, catalog, tmp_path / kind, language=language).search([Query(query)], 2)
        assert found.rows.tolist() == [[0, -1]], kind


@pytest.mark.slow
def test_ranks_like_bm25_up_to_rounded_lengths():
    """tantivy stores the length of a document in one byte, which is exact for up to 40 terms. Short documents have the
    order of bm25, except that scores which differ by a rounding of float32 may change places."""
    task = tasks.load(config.load("quickstart").task)
    queries = [Query(text) for text in task.test.queries]
    correlations = rank_correlations(*(retrievers.open(kind, task.catalog) for kind in ("tantivy", "bm25")), queries)
    assert len(correlations) > 40 and min(correlations) > 0.999
    catalog, queries = long_documents()
    both = (retrievers.open(kind, catalog, language=None) for kind in ("tantivy", "bm25"))
    assert np.mean(rank_correlations(*both, queries)) > 0.99


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"fields": {"title": 0}},
            r"params\.fields must map fields to weights from 1e-06 to 1e\+06, got \{'title': 0\}",
        ),
        ({"fields": {"title": True}}, r"params\.fields must map"),
        ({"fields": {"title": float("nan")}}, r"params\.fields must map"),
        ({"fields": {"title": 1e9}}, r"params\.fields must map"),
        ({"fields": {}}, r"params\.fields must map"),
        ({"fields": ["title"]}, r"params\.fields must map"),
        ({"fields": {"name": 1}}, "no field 'name': choose from id, text, title"),
        ({"language": "xx"}, r"params\.language: unknown 'xx'"),
        ({"stemmer": "klingon"}, "stemmer: unknown 'klingon'"),
        ({"stopwords": "xx"}, "stopwords: unknown list 'xx'"),
        ({"k1": 0.9}, "k1: unknown parameter of 'tantivy'.*choose from language, stemmer, stopwords, fields"),
    ],
)
def test_mistakes_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        retrievers.open("tantivy", make_catalog(), **params)


@pytest.mark.slow
def test_spellings_have_one_fingerprint_and_parameters_their_own(tmp_path):
    catalog = make_catalog()

    def fingerprint(**params) -> str:
        return retrievers.open("tantivy", catalog, **params).fingerprint

    assert fingerprint() == fingerprint(language="english") == fingerprint(stemmer="english")
    assert fingerprint(fields={"title": 2, "text": 1}) == fingerprint(fields={"text": 1.0, "title": 2.0})
    changes = [{}, {"language": "de"}, {"stemmer": None}, {"stopwords": None}, {"fields": {"text": 1}}]
    changes += [{"fields": {"text": 2}}, {"fields": {"title": 1}}]
    assert len({fingerprint(**change) for change in changes}) == len(changes)


def test_the_language_is_known_to_the_checks():
    assert retrievers.languages("tantivy", {"language": "german"}) == ["de"]
    assert retrievers.languages("hybrid", {"retrievers": [{"kind": "tantivy"}, {"kind": "bm25"}]}) == ["en", "en"]
    (line,) = retrievers.mismatches("tantivy", {}, make_catalog(["防水登山鞋", "登山"]))
    assert "retriever.params.language is en" in line
