"""`open` and `build`: how backends and parameters are found, and which catalogues and arguments are refused."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import retrievers
from retrievers import Catalog, CatalogError, Query
from retrievers.text.bm25 import Params, analyze, build


@pytest.fixture
def catalog():
    return Catalog.from_records({"id": f"d{i}", "text": text} for i, text in enumerate(["red shoe", "hose", "to be"]))


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A user's modules on the path: one with a function and a class, and one that cannot be imported."""
    (tmp_path / "plug_in.py").write_text(
        "def build(catalog, folder=None, depth=3):\n    return ('function', len(catalog), folder, depth)\n\n\n"
        "class Plain:\n    @staticmethod\n    def build(catalog, folder=None):\n        return 'class'\n\n\n"
        "class Loose:\n    @classmethod\n    def build(cls, catalog, folder=None, **params):\n        return params\n"
    )
    (tmp_path / "plug_broken.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("plug_in", "plug_broken"):
        sys.modules.pop(name, None)


def test_importing_retrievers_loads_no_index_library():
    heavy = ["bm25s", "datasets", "numba", "Stemmer", "scipy", "torch", "pyarrow"]
    code = f"import sys, retrievers, retrievers.text.bm25; print([name for name in {heavy} if name in sys.modules])"
    root = Path(retrievers.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_module_or_a_class_of_ones_own(catalog, plugin):
    assert retrievers.open("plug_in", catalog, depth=5) == ("function", 3, None, 5)
    assert retrievers.open("plug_in.Plain", catalog) == "class"
    assert retrievers.open("plug_in.Loose", catalog, anything=1) == {"anything": 1}


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("plug_in", {"dept": 5}, r"params\.dept: unknown parameter of 'plug_in': did you mean 'depth'\? .* depth$"),
        ("plug_in.Plain", {"depth": 5}, r"params\.depth: unknown parameter of 'plug_in.Plain': it takes none"),
        (
            "plug_in.Absent",
            {},
            r"cannot import 'plug_in.Absent' \(No module named 'plug_in.Absent'.*\): check the path",
        ),
        ("plug_broken", {}, r"cannot import 'plug_broken' \(No module named .*\): install a_package_that_nobody_has,"),
        ("plug_broken.Class", {}, r"cannot import 'plug_broken.Class' \(No module named 'a_package_that_nobody_has'"),
        (".bm25", {}, "unknown '.bm25': did you mean 'bm25'"),
        ("", {}, "unknown ''"),
        (
            "bm25",
            {"stopword": None},
            r"mean 'stopwords'\? Choose from k1, .*, fields, structured$",
        ),
    ],
)
def test_a_wrong_kind_or_parameter_is_named(catalog, plugin, kind, params, message):
    with pytest.raises(ValueError, match=message):
        retrievers.open(kind, catalog, **params)


@pytest.mark.parametrize("of", [retrievers.open, Catalog])
def test_the_example_of_the_docstring_runs(of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example, _, _ = inspect.getdoc(of).partition("\nkind:")  # The parameters' descriptions have indented lines, too.
    lines = [line.strip() for line in example.splitlines() if line.startswith("    ") or not line]
    names = {"retrievers": retrievers}
    exec("\n".join(lines), names)
    assert names["catalog"].ids[:] == ["d1", "d2"]
    if of is retrievers.open:
        asked = [Query("shoes")]
        assert names["bm25"].search(asked, k=10).rows.tolist() == [[0, -1]]
        assert names["bm25"].ranks(asked, [[0, 1]]).tolist() == [[1, 0]]


def test_build_is_open_into_a_folder(catalog, tmp_path):
    built = retrievers.open("bm25", catalog, tmp_path / "deep" / "index", k1=0.9)
    assert retrievers.open("bm25", catalog, tmp_path / "deep" / "index", k1=0.9).fingerprint == built.fingerprint


@pytest.mark.parametrize("name", ["k1", "b"])
@pytest.mark.parametrize("value", ["0.5", True, None, float("nan"), float("inf"), -0.1])
def test_numbers_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"retriever\.params\.{name} must"):
        Params(**{name: value})


def test_every_parameter_changes_the_fingerprint_and_a_spelling_does_not(catalog):
    changes = [{}, {"k1": 1.3}, {"b": 0.5}, {"stemmer": None}, {"stemmer": "german"}, {"stopwords": None}]
    assert len({build(catalog, None, **change).fingerprint for change in changes}) == len(changes)
    assert build(catalog, None, k1=1, b=1).fingerprint == build(catalog, None, k1=1.0, b=1.0).fingerprint


def test_a_query_of_stop_words_alone_needs_stopwords_none(catalog):
    to_be = [Query("to be")]
    assert build(catalog).search(to_be, 1).rows.tolist() == [[-1]]
    assert build(catalog, None, stopwords=None).search(to_be, 1).rows.tolist() == [[2]]


def test_an_empty_stem_is_no_term(catalog):
    porter = build(catalog, None, stemmer="porter")
    assert analyze(["s", "shoes s"], porter.params) == [[], ["shoe"]]
    hits = porter.search([Query("s"), Query("s shoes")], 3)  # bm25s itself would raise, because "" has no column.
    assert hits.rows.tolist() == [[-1, -1, -1], [0, -1, -1]]


def test_what_a_model_may_write_is_never_an_error(catalog):
    texts = ["\ud800 shoe", "\0shoe\0", "shoe\u202e", "SHOE!!", "shoe AND (shoe OR", '"shoe"~2 ^3 *:*', "\n\t shoe \r"]
    rows = build(catalog).search([Query(text) for text in texts], 1).rows
    assert rows.tolist() == [[0]] * len(texts)


def test_history_and_weights_are_not_read(catalog):
    retriever = build(catalog)
    for query in (Query("hose", (0, 2), (1.0, -1.0)), Query("hose")):
        assert retriever.search([query], 3).rows.tolist() == [[1, -1, -1]]


def test_targets_must_be_integers(catalog):
    retriever = build(catalog)
    for dtype in (np.int8, np.int32, np.int64, np.uint16):
        assert retriever.ranks([Query("hose")], np.array([[1, 0]], dtype)).tolist() == [[1, 0]]
    assert retriever.ranks([Query("hose")], np.zeros((1, 0))).shape == (1, 0)
    with pytest.raises(ValueError, match="targets must be integer rows, got float64"):
        retriever.ranks([Query("hose")], np.array([[1.0]]))


def test_row_and_its_error(catalog):
    assert catalog.row("d1") == 1 and type(catalog.row("d1")) is int
    for kind in (KeyError, ValueError, CatalogError):
        with pytest.raises(kind) as error:
            catalog.row("d9")
        assert str(error.value) == error.value.args[0] == "1 of 1 ids are not in the catalogue, first: 'd9'"


def test_missing_values_are_empty_not_the_word_none():
    catalog = Catalog.from_records(
        [{"id": "a", "text": None}, {"id": "b", "text": "hose", "brand": "x"}, {"id": "c", "text": "", "brand": None}]
    )
    assert list(catalog.texts) == ["", "hose", ""] and list(catalog.titles) == ["", "hose", ""]
    assert list(catalog._table["brand"]) == ["", "x", ""]  # A field that only a later record has is kept.
    with pytest.raises(ValueError, match="document 0 has no 'id'"):
        Catalog.from_records([{"id": None, "text": "x"}])


def test_half_a_character_is_refused_by_name():
    with pytest.raises(ValueError, match="document 'd7' holds half a character"):
        Catalog.from_records([{"id": "d7", "text": "smile \ud83d"}])
