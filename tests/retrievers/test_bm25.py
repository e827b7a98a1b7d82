"""BM25 compared with its formula, and indexes that are damaged, incomplete or built for something else."""

import json
import math
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import retrievers
from retrievers import Catalog, Query, RetrieverError
from retrievers.text.bm25 import Params, analyze

TEXTS = ["party popper", "sad face", "party face face", "running shoes for a party in the rain"]


def make_catalog(texts=TEXTS) -> Catalog:
    return Catalog.from_records({"id": f"d{i}", "text": text} for i, text in enumerate(texts))


WORD = st.sampled_from(["party", "popper", "face", "sad", "rain", "runs", "the"])


@pytest.mark.slow
@given(
    st.lists(st.lists(WORD, max_size=8).map(" ".join), max_size=10),
    st.lists(WORD | st.just("unseen"), min_size=1, max_size=6).map(" ".join),
    st.just(0.0) | st.floats(0.1, 3.0),
    st.floats(0.0, 1.0),
)
def test_scores_are_the_formulas(texts, query, k1, b):
    texts = [*texts, "party"]  # The other texts may be empty or only have stop words.
    retriever = retrievers.open("bm25", make_catalog(texts), k1=k1, b=b)
    hits = retriever.search([Query(query)], len(texts))
    docs, (terms,) = analyze(texts, Params()), analyze([query], Params())
    n, average = len(docs), sum(map(len, docs)) / len(docs)
    for row, doc in enumerate(docs):
        tf, expected = Counter(doc), 0.0
        for term in terms:
            df = sum(term in other for other in docs)
            idf = math.log(1 + (n - df + 0.5) / (df + 0.5))
            expected += idf * tf[term] / (tf[term] + k1 * (1 - b + b * len(doc) / average)) if tf[term] else 0.0
        found = hits.scores[0][hits.rows[0] == row]
        assert (found[0] if len(found) else 0.0) == pytest.approx(expected, rel=1e-4)


def test_a_repeated_term_counts_exactly_again():
    scores = retrievers.open("bm25", make_catalog()).search([Query("face"), Query("face faces FACE")], 4).scores
    assert scores[1, :2] == pytest.approx(3 * scores[0, :2], rel=1e-6)
    assert np.isfinite(scores[:, :2]).all() and np.isneginf(scores[:, 2:]).all()


def test_the_analyser():
    assert analyze(["The C Programming languages, 5 of them!"], Params()) == [["c", "program", "languag", "5", "them"]]
    assert analyze(["not in"], Params()) == [[]]
    assert analyze(["not in"], Params(stopwords=None, stemmer=None)) == [["not", "in"]]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"k1": -1}, "k1 must be a number >= 0"),
        ({"b": 1.5}, "b must be a number from 0 to 1"),
        ({"stemmer": "klingon"}, "stemmer: unknown 'klingon'"),
        ({"stopwords": "xx"}, "stopwords: unknown list 'xx'"),
        ({"k2": 1}, "unknown parameter of 'bm25': choose from k1, b"),
    ],
)
def test_bad_parameters(params, message):
    with pytest.raises(ValueError, match=message):
        retrievers.open("bm25", make_catalog(), **params)


def test_unknown_kind_names_the_nearest():
    with pytest.raises(ValueError, match="unknown 'nonsense': choose from bm25, lucene"):
        retrievers.open("nonsense", make_catalog())
    with pytest.raises(ValueError, match="did you mean 'bm25'"):
        retrievers.open("bm52", make_catalog())
    with pytest.raises(ValueError, match=r"cannot import 'no_such.module'"):
        retrievers.open("no_such.module", make_catalog())
    with pytest.raises(ValueError, match="has no function build"):
        retrievers.open("json.decoder", make_catalog())


def test_nothing_to_index_is_refused():
    with pytest.raises(ValueError, match="no document holds a single term"):
        retrievers.open("bm25", make_catalog(["the", "of"]))


def test_save_and_open_give_the_same(tmp_path):
    saved = retrievers.open("bm25", make_catalog(), tmp_path / "index")
    again = retrievers.open("bm25", make_catalog(), tmp_path / "index")
    memory = retrievers.open("bm25", make_catalog())
    for one in (again, memory):
        assert one.fingerprint == saved.fingerprint
        assert (
            one.search([Query("party face")], 4).scores.tolist()
            == saved.search([Query("party face")], 4).scores.tolist()
        )
    assert isinstance(again._model[1].data.base, np.memmap)


def test_building_twice_is_a_no_op(tmp_path):
    retrievers.open("bm25", make_catalog(), tmp_path / "index")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}
    retrievers.open("bm25", make_catalog(), tmp_path / "index")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()} == before


def test_other_parameters_or_another_catalogue_are_refused(tmp_path):
    first = retrievers.open("bm25", make_catalog(), tmp_path / "index")
    for params in ({"k1": 2.0}, {"b": 0.5}, {"stemmer": None}, {"stopwords": None}):
        with pytest.raises(RetrieverError, match=rf"{tmp_path / 'index'} was built with another params"):
            retrievers.open("bm25", make_catalog(), tmp_path / "index", **params)
    with pytest.raises(RetrieverError, match=rf"{tmp_path / 'index'} was built with another catalog"):
        retrievers.open("bm25", make_catalog(TEXTS[::-1]), tmp_path / "index")
    assert retrievers.open("bm25", make_catalog(), k1=2.0).fingerprint != first.fingerprint


@pytest.mark.parametrize("damage", ["no meta", "bad meta", "truncated", "missing array"])
def test_a_damaged_index_is_refused(tmp_path, damage):
    folder = tmp_path / "index"
    retrievers.open("bm25", make_catalog(), folder)
    data = folder / "data.csc.index.npy"
    if damage == "no meta":
        (folder / "index.json").unlink()
    elif damage == "bad meta":
        (folder / "index.json").write_text('{"kind": ')
    elif damage == "truncated":
        np.save(data, np.load(data)[:-1])
    else:
        data.unlink()
    with pytest.raises(RetrieverError, match=rf"{folder}.*delete the folder"):
        retrievers.open("bm25", make_catalog(), folder)


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    import bm25s

    real = bm25s.BM25.save

    def half(self, folder, **options):
        real(self, folder, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bm25s.BM25, "save", half)
        with pytest.raises(KeyboardInterrupt):
            retrievers.open("bm25", make_catalog(), tmp_path / "index")
    assert list(tmp_path.iterdir()) == []
    retrievers.open("bm25", make_catalog(), tmp_path / "index")
    assert json.loads((tmp_path / "index" / "index.json").read_text())["documents"] == len(TEXTS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_build_interrupted_midway_leaves_nothing(tmp_path, monkeypatch, error):
    import bm25s

    real, written = bm25s.BM25.save, []

    def midway(self, folder, **options):
        real(self, folder, **options)
        (folder / "data.csc.index.npy").unlink()  # An interrupted build has not written this file.
        written.extend(folder.iterdir())
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(bm25s.BM25, "save", midway)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            retrievers.open("bm25", make_catalog(), tmp_path / "index")
    assert written and list(tmp_path.iterdir()) == []  # There is neither the folder nor a temporary one.
    assert retrievers.open("bm25", make_catalog(), tmp_path / "index").search([Query("sad")], 1).rows.tolist() == [[1]]
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_list_of_stopwords_is_refused_by_name():
    with pytest.raises(ValueError, match=r"retriever\.params\.stopwords: unknown list"):
        retrievers.open("bm25", make_catalog(), stopwords=["the", "of"])


@pytest.mark.parametrize("name", ["data", "indptr"])
def test_an_index_of_zeros_is_refused(tmp_path, name):
    """A crash of the machine can leave a file that has its length, but only zeros. Every query would score 0."""
    retrievers.open("bm25", make_catalog(), tmp_path / "index")
    path = tmp_path / "index" / f"{name}.csc.index.npy"
    array = np.load(path)
    array[: -1 if name == "indptr" else None] = 0
    np.save(path, array)
    with pytest.raises(RetrieverError, match="is damaged"):
        retrievers.open("bm25", make_catalog(), tmp_path / "index")


def test_a_relative_folder_opens_in_a_child_that_works_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(retrievers.open("bm25", make_catalog(), "index"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(pickled).search([Query("sad")], 1).rows.tolist() == [[1]]


def test_fields_count_as_often_as_their_weight():
    records = [
        {"id": "a", "title": "red shoe", "text": "for running"},
        {"id": "b", "title": "blue hat", "text": "goes with a red shoe"},
    ]
    catalog = Catalog.from_records(records)
    weighted = retrievers.open("bm25", catalog, fields={"title": 3, "text": 1})
    written = Catalog.from_records(
        {"id": r["id"], "text": " ".join([r["title"]] * 3 + [r["text"]]), "title": r["title"]} for r in records
    )
    plain = retrievers.open("bm25", written)
    queries = [Query("red shoe"), Query("blue running"), Query("hat")]
    assert weighted.search(queries, 2).scores.tolist() == plain.search(queries, 2).scores.tolist()
    assert weighted.search([Query("shoe")], 1).rows.tolist() == [[0]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"title": 0}, "integer weights from 1 to 1000"),
        ({"title": 1.5}, "integer weights from 1 to 1000"),
        ({}, "integer weights from 1 to 1000"),
        (["title"], "integer weights from 1 to 1000"),
        ({"name": 1}, "no field 'name': choose from id, text, title"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        retrievers.open("bm25", make_catalog(), fields=fields)
