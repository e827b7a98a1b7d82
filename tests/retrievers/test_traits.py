"""The traits that the class of a retriever declares. No other attribute of it is read."""

import sys
import textwrap
from unittest.mock import Mock

import numpy as np
import pytest
from starlette.testclient import TestClient

import retrievers
from rec_r1 import config
from rec_r1.environment import open_environment
from retrievers import BackendModule, Cache, Catalog, Interactions, Query, Traits, Unseen
from retrievers.combine.capabilities import traits_of
from retrievers.combine.hybrid import Hybrid
from retrievers.registry import BACKENDS, backend_module
from retrievers.serving import server

CATALOG = Catalog.from_records({"id": f"d{i}", "text": text} for i, text in enumerate(["red shoe", "hose", "shoe"]))
BM25 = retrievers.open("bm25", CATALOG)
CHOICES = Interactions.from_sequences(3, [[0, 1], [1, 2], [1, 0]])
ASKED = [Query("shoe", (0,)), Query("hose")]
# A user's retriever. Its attributes have the names of our methods and traits, but other types.
FOREIGN = textwrap.dedent(
    """
    import numpy as np
    import retrievers


    class Foreign:
        parts = 3
        retriever = None
        report = "report.html"
        kind = 7
        reads_text = "no"
        fitted_on = 2024
        fits = inner = model = embeddings = object()
        language = "en"
        FORMAT = "%(message)s"

        def __init__(self, catalog):
            self.inner_engine = retrievers.open("bm25", catalog)
            self.fingerprint = "foreign-" + catalog.fingerprint

        def search(self, queries, k):
            return self.inner_engine.search(queries, k)

        def ranks(self, queries, targets):
            return self.inner_engine.ranks(queries, targets)

        @classmethod
        def build(cls, catalog, folder=None):
            return cls(catalog)


    parts, language, FORMAT = 3, "en", "%(message)s"
    build = Foreign.build
    """
)


@pytest.fixture
def foreign_module(tmp_path, monkeypatch):
    (tmp_path / "foreign_retriever.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "foreign_retriever"
    sys.modules.pop("foreign_retriever", None)


@pytest.fixture(params=["", ".Foreign"])
def kind(request, foreign_module):
    return foreign_module + request.param


def assert_plain(retriever):
    assert retrievers.reads_text(retriever) and retrievers.fitted_on(retriever) == set()
    assert list(retrievers.fits(retriever)) == []


def test_a_foreign_retriever_with_unlucky_names_is_a_plain_one(kind):
    foreign = retrievers.open(kind, CATALOG)
    assert traits_of(foreign) == Traits()
    assert not retrievers.takes_interactions(kind, {}) and retrievers.languages(kind, {}) == []
    assert retrievers.format_of(kind) is None and retrievers.parameters(kind) == {}
    for wrapped in (foreign, Cache(foreign, 3), Unseen(foreign, 3), Cache(Unseen(foreign, 3), 3)):
        assert_plain(wrapped)
        assert wrapped.ranks(ASKED, np.array([[2], [1]])).tolist()[1] == [1]
    assert Unseen(foreign, 3).search(ASKED, 3).rows.tolist() == [[2, -1, -1], [1, -1, -1]]


def test_it_is_a_part_of_a_hybrid_and_is_served(kind):
    part = {"kind": kind}
    assert not retrievers.takes_interactions("hybrid", {"retrievers": [part]})
    assert retrievers.languages("hybrid", {"retrievers": [part, {"kind": "bm25"}]}) == ["en"]
    fused = retrievers.open("hybrid", CATALOG, retrievers=[part, {"kind": "bm25"}])
    assert_plain(fused)
    assert fused.search(ASKED, 1).rows.tolist() == BM25.search(ASKED, 1).rows.tolist()
    with TestClient(server.app(fused, "hybrid", CATALOG.fingerprint, 3)) as client:
        about = client.get("/health").json()
        assert about["reads_text"] is True and about["fitted_on"] == []
        asked = {"queries": [["hose", [], []]], "targets": [[1, -1]]}
        assert client.post("/ranks", json=asked).json() == {"ranks": [[1, 0]]}


@pytest.mark.slow
def test_a_run_with_it_opens_and_scores(kind, tmp_path):
    overrides = [f"retriever.kind={kind}", "retriever.params={}", f"retriever.index={tmp_path / 'index'}"]
    env = open_environment(config.load("quickstart", overrides))
    assert env.reads_text and env.fitted_on == set()
    hits = env.retriever.search([Query("cat")], 2).rows
    (paid,) = env.scorer([None], ["cat"], query=["x"], target_rows=[hits[0].tolist()], target_grades=[[1.0, 1.0]])
    assert paid > 0


def test_only_what_the_class_defines_counts():
    class Forwarding:
        def __getattr__(self, name):
            return getattr(retrievers.open("popularity", CATALOG, None, CHOICES), name)

    on_the_instance = Forwarding()
    on_the_instance.retriever_traits = lambda: Traits(reads_text=False)
    for retriever in (Forwarding(), on_the_instance, Mock()):
        assert traits_of(retriever) == Traits()


class Reranked:
    """A user's wrapper, as in the docstring of HasTraits."""

    fingerprint = "reranked"
    search, ranks = None, None

    def __init__(self, first_stage, **traits):
        self.first_stage, self.traits = first_stage, traits

    def retriever_traits(self):
        return Traits(inner=[self.first_stage], **self.traits)


def test_declared_traits_are_added_to_those_inside():
    popular = retrievers.open("popularity", CATALOG, None, CHOICES)
    assert traits_of(popular) == Traits((), False, (CHOICES.fingerprint,), (("popularity", {}),))
    both = Hybrid([BM25, popular], [1, 1], 3)
    assert retrievers.reads_text(both) and retrievers.fitted_on(both) == {CHOICES.fingerprint}
    for inside, reads in ((popular, False), (both, True), (BM25, True), (Cache(Unseen(popular, 3), 3), False)):
        assert retrievers.reads_text(Reranked(inside)) is retrievers.reads_text(inside) is reads
        assert retrievers.fitted_on(Reranked(inside)) == retrievers.fitted_on(inside)
        assert list(retrievers.fits(Reranked(inside))) == list(retrievers.fits(inside))
    mine = Reranked(popular, reads_text=True, fitted_on=["abc"], fit_reports=[("mine", {"epoch": 3})])
    assert retrievers.reads_text(mine) and retrievers.fitted_on(mine) == {"abc", CHOICES.fingerprint}
    assert list(retrievers.fits(mine)) == [("mine", {"epoch": 3}), ("popularity", {})]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"inner": BM25}, "Traits.inner must be a tuple or a list"),
        ({"fitted_on": "abc"}, "Traits.fitted_on must be a tuple or a list, got 'abc': write \\('abc',\\)"),
        ({"fitted_on": [CHOICES]}, "Traits.fitted_on must hold strings"),
        ({"reads_text": "no"}, "Traits.reads_text must be True, False or None, got 'no'"),
        ({"reads_text": 1}, "Traits.reads_text"),
    ],
)
def test_traits_of_another_type_are_refused(wrong, message):
    with pytest.raises(TypeError, match=message):
        Traits(**wrong)


def test_retriever_traits_must_return_traits():
    class Careless:
        def retriever_traits(self):
            return {"reads_text": False}

    with pytest.raises(TypeError, match=r"Careless\.retriever_traits\(\) returned .*: return retrievers\.Traits"):
        retrievers.reads_text(Careless())


def test_every_backend_of_ours_declares_what_a_module_may():
    found = {kind: backend_module(kind) for kind in BACKENDS}
    assert {kind for kind, module in found.items() if module.inner_backends} == {"hybrid", "propagate", "rerank"}
    analysed = {kind for kind, module in found.items() if module.analysis_language}
    assert analysed == {"bm25", "lucene", "tantivy", "milvus", "opensearch", "elasticsearch", "postgres"}
    assert {kind for kind, module in found.items() if module.index_format is None} == {"remote"}
    assert all(isinstance(module, BackendModule) and module.params is not None for module in found.values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("build = 3", "build in 'declared' must be a function, got 3"),
        ("Params = dict", r"Params in 'declared' must be a dataclass, got <class 'dict'>: make it one"),
        ("INDEX_FORMAT = '2'", "INDEX_FORMAT in 'declared' must be an integer, got '2'"),
        ("inner_backends = []", "inner_backends in 'declared' must be a function"),
        ("analysis_language = 'en'", "analysis_language in 'declared' must be a function"),
    ],
)
def test_a_declared_name_of_another_type_is_refused(line, message, tmp_path, monkeypatch):
    (tmp_path / "declared.py").write_text(f"def build(catalog, folder=None):\n    return None\n\n\n{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(ValueError, match=message):
            retrievers.open("declared", CATALOG)
    finally:
        sys.modules.pop("declared", None)
