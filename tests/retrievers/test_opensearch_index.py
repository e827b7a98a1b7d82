"""The indexes of `opensearch`, by a stand-in: an existing one, one that is built, snapshots, and fingerprints."""

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from opensearch_data import BM25, ENGLISH, EVERY, QUERIES, SOURCES, TEMPLATE, TEXTS, assert_like_bm25, both, connect
from starlette.responses import JSONResponse

import retrievers
from retrievers import Catalog, Query, RetrieverError
from retrievers.text.opensearch import documents


def test_documents_that_only_one_side_has(standin, caplog):
    sources = {one: source for one, source in SOURCES.items() if one not in ("d3", "d50")}
    standin.add("drifted", sources | {"new1": {"text": "party party"}, "new2": {"text": "party"}}, **ENGLISH)
    retriever = connect(standin, index="drifted")
    assert "lacks 2 of the 120 documents of the catalogue" in caplog.text and "the first: 'd3', 'd50'" in caplog.text
    assert "holds 2 documents that the catalogue lacks" in caplog.text and "the first: 'new1', 'new2'" in caplog.text
    assert retrievers.absent(retriever) == retrievers.absent(retrievers.Cache(retriever, len(TEXTS))) == {3, 50}
    ranks = retriever.ranks(QUERIES, EVERY)
    assert (ranks[:, [4, 51]] == 0).all()
    assert ranks.tolist() == retrievers.ranks_from_search(retriever.search, QUERIES, EVERY, len(TEXTS)).tolist()
    assert ranks.max(axis=1)[0] == (ranks[0] > 0).sum()  # The documents that are left out take no rank.


@both
def test_ids_in_a_field(standin, caplog):
    sources = {f"x{i}": {"text": text, "code": f"d{i}"} for i, text in enumerate(TEXTS)}
    standin.add("coded", sources, **ENGLISH)
    assert_like_bm25(connect(standin, index="coded", id_field="code"))
    with pytest.raises(
        RetrieverError, match=r"none of its 120 documents \(the first has the id 'x0'\) is in the catalogue"
    ):
        connect(standin, index="coded")
    with pytest.raises(ValueError, match=r"has no field 'text' of type keyword: choose from code, or leave it out"):
        connect(standin, index="coded", id_field="text")
    standin.write("coded", "x119", {"text": "party", "code": "d0"})
    with pytest.raises(RetrieverError, match="several documents have the id 'd0'"):
        connect(standin, index="coded", id_field="code")


def test_ids_that_are_numbers(standin):
    numbered = Catalog.from_records({"id": str(i), "text": text} for i, text in enumerate(TEXTS))
    sources = {f"x{i}": {"text": text, "sku": i} for i, text in enumerate(TEXTS)}
    standin.add("numbered", sources | {"y": {"text": "party", "sku": 2**40}}, long=["sku"], **ENGLISH)
    retriever = connect(standin, numbered, index="numbered", id_field="sku")
    ranks = retriever.ranks(QUERIES, EVERY)
    assert ((ranks > 0) == (BM25.ranks(QUERIES, EVERY) > 0)).all()
    assert ranks.tolist() == retrievers.ranks_from_search(retriever.search, QUERIES, EVERY, len(TEXTS)).tolist()


def test_an_alias_that_is_moved(standin, monkeypatch):
    """A run goes on with the index that it began with, as long as the engine has its snapshot."""
    monkeypatch.setitem(standin.aliases, "live", {"shop"})
    retriever = connect(standin, index="live")
    before = retriever.ranks(QUERIES, EVERY).tolist()
    standin.add("second", SOURCES | {"d0": {"text": "blue blue"}}, **ENGLISH)
    standin.aliases["live"] = {"second"}
    assert retriever.ranks(QUERIES, EVERY).tolist() == before
    assert connect(standin, index="live").fingerprint != retriever.fingerprint
    standin.pits.clear()
    with pytest.raises(RetrieverError, match="was changed while it was in use"):
        retriever.ranks(QUERIES, EVERY)


def test_too_many_foreign_documents_are_refused_unless_a_filter_leaves_them_out(standin, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LEFT_OUT", 2)
    foreign = {f"n{i}": {"text": "party", "brand": "new"} for i in range(3)}
    standin.add("large", SOURCES | foreign, **ENGLISH)
    with pytest.raises(
        RetrieverError, match=r"holds 3 documents .* the first: 'n0', 'n1', 'n2': set retriever.params.filter"
    ):
        connect(standin, index="large")
    retriever = connect(standin, index="large", filter=[{"terms": {"brand": ["acme", "other"]}}])
    ranks = retriever.ranks(QUERIES, EVERY)
    assert ranks.tolist() == retrievers.ranks_from_search(retriever.search, QUERIES, EVERY, len(TEXTS)).tolist()
    assert ((ranks > 0) == (BM25.ranks(QUERIES, EVERY) > 0)).all()


@pytest.mark.slow
def test_the_comparison_is_kept_for_each_state(standin, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PAGE", 7)
    connect(standin, folder=tmp_path / "index", index="shop")
    read = [path for _, path, _ in standin.received if "scroll" in path or path.endswith("_search")]
    assert len(read) == 1 + 18 + 1  # 120 documents in pages of 7, and the end.
    standin.received.clear()
    again = connect(standin, folder=tmp_path / "index", index="shop")
    assert not [path for _, path, _ in standin.received if "scroll" in path or path == "/shop/_search"]
    standin.write("shop", "d0", None)
    other = connect(standin, folder=tmp_path / "index", index="shop")
    assert other.fingerprint != again.fingerprint and retrievers.absent(other) == {0}
    assert len(list((tmp_path / "index").iterdir())) == 2


def test_a_field_that_the_index_lacks_is_named(standin):
    with pytest.raises(ValueError, match=r"fields: shop has no field 'titel': choose from text, brand"):
        connect(standin, index="shop", fields={"titel": 1})
    with pytest.raises(ValueError, match="the catalogue has no field 'titel'"):
        connect(standin, fields={"titel": 1})
    with pytest.raises(RetrieverError, match="shop2"):
        connect(standin, index="shop2")
    with pytest.raises(RetrieverError, match=r"has no index 'shap\*': correct retriever.params.index"):
        connect(standin, index="shap*")


def test_a_field_in_a_nested_object_needs_a_nested_query(standin):
    sources = {"d0": {"text": "party", "shop.reviews.text": "party"}}
    standin.add("reviewed", sources, nested=["shop.reviews"], **ENGLISH)
    message = r"'shop.reviews.text' is inside the nested field 'shop.reviews' .*template to \{nested: \{path: shop.rev"
    with pytest.raises(ValueError, match=message):
        connect(standin, index="reviewed", fields={"shop.reviews.text": 1})
    connect(standin, index="reviewed", fields={"text": 1})


def test_an_interrupted_build_leaves_nothing(standin, monkeypatch):
    catalog = Catalog.from_records([{"id": "a", "text": "interrupted"}])
    before = set(standin.indexes)
    with monkeypatch.context() as patch:
        patch.setattr(documents, "_bulks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            connect(standin, catalog)
    assert set(standin.indexes) == before
    assert connect(standin, catalog).search([Query("interrupted")], 1).rows.tolist() == [[0]]
    assert len(standin.indexes) == len(before) + 1
    connect(standin, catalog)
    assert len(standin.indexes) == len(before) + 1  # It is found again.


@pytest.mark.slow
def test_two_builds_at_the_same_time_end_with_one_index(standin):
    catalog = Catalog.from_records({"id": str(i), "text": f"twice {i}"} for i in range(50))
    before = set(standin.indexes)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: connect(standin, catalog).fingerprint, range(4)))
    assert len(set(found)) == 1 and len(standin.indexes) == len(before) + 1


def test_leftovers_of_killed_builds_are_deleted_after_a_day(standin):
    catalog = Catalog.from_records([{"id": "a", "text": "leftover"}])
    name = connect(standin, catalog)._searches.index.name
    (built,) = standin.aliases.pop(name)
    standin.indexes[built]["made"] -= 25 * 3600
    standin.add(f"{name}-running", {})
    connect(standin, catalog)
    assert built not in standin.indexes and f"{name}-running" in standin.indexes


@both
def test_documents_for_which_there_is_no_room_are_sent_again(standin, monkeypatch):
    monkeypatch.setattr("retrievers.text.opensearch.documents.time.sleep", lambda _: None)
    catalog = Catalog.from_records({"id": str(i), "text": f"full {i}"} for i in range(9))
    answers = iter([429, 201])

    def crowded(method, path):
        code = next(answers, None) if path.endswith("_bulk") else None
        if code != 429:
            return None
        items = [{"index": {"_id": str(i), "status": 429, "error": {"type": "rejected"}}} for i in range(9)]
        return JSONResponse({"errors": True, "items": items}, headers={"x-elastic-product": "Elasticsearch"})

    standin.trouble = crowded
    assert connect(standin, catalog).search([Query("full")], 9).rows[0].tolist() == list(range(9))
    standin.trouble = lambda method, path: (
        JSONResponse(
            {
                "errors": True,
                "items": [{"index": {"status": 400, "error": {"type": "mapper_parsing_exception", "reason": "no"}}}],
            },
            headers={"x-elastic-product": "Elasticsearch"},
        )
        if path.endswith("_bulk")
        else None
    )
    with pytest.raises(RetrieverError, match="refuses document 0: mapper_parsing_exception: no"):
        connect(standin, Catalog.from_records([{"id": "a", "text": "bad"}]))


def test_an_index_that_lost_documents_is_refused(standin):
    catalog = Catalog.from_records({"id": str(i), "text": f"lost {i}"} for i in range(3))
    (built,) = standin.aliases[connect(standin, catalog)._searches.index.name]
    standin.write(built, "1", None)
    with pytest.raises(RetrieverError, match="holds 2 instead of 3 documents: delete this index"):
        connect(standin, catalog)


def test_a_snapshot_does_not_see_what_is_written(standin):
    retriever = connect(standin, index="shop")
    before = retriever.search(QUERIES, 9).rows.tolist()
    standin.write("shop", "d0", {"text": "blue " * 9})
    assert retriever.search(QUERIES, 9).rows.tolist() == before
    assert connect(standin, index="shop").search(QUERIES, 9).rows.tolist() != before


@both
def test_a_snapshot_that_expires_is_opened_again(standin):
    retriever = connect(standin, index="shop", retries=0)
    standin.pits.clear()
    opened = standin.opened
    assert_like_bm25(retriever)
    assert standin.opened == opened + 1
    standin.pits.clear()
    standin.write("shop", "d0", None)
    with pytest.raises(RetrieverError, match="was changed while it was in use"):
        retriever.ranks(QUERIES, EVERY)
    assert not standin.pits  # The new one is closed again.


def test_a_name_of_the_users_stands_for_the_state(standin):
    named = connect(standin, index="shop", snapshot="2026-11")
    assert not [path for _, path, _ in standin.received if "_stats" in path]  # The user need not be allowed to ask.
    standin.write("shop", "d0", {"text": "blue"})
    assert connect(standin, index="shop", snapshot="2026-11").fingerprint == named.fingerprint
    assert connect(standin, index="shop", snapshot="2026-12").fingerprint != named.fingerprint


@both
def test_a_snapshot_is_closed(standin):
    standin.pits.clear()
    retriever = connect(standin, index="shop")
    copy = pickle.loads(pickle.dumps(retriever))
    copy.search(QUERIES, 3)
    assert len(standin.pits) == 2  # Each process has its own.
    copy._searches.close()
    assert len(standin.pits) == 1
    assert_like_bm25(copy)  # It opens another one.


ENDS = """
import sys, retrievers
catalog = retrievers.Catalog.from_records([{"id": "a", "text": "ends"}])
retrievers.open("opensearch", catalog, url=sys.argv[1])
"""


@both
@pytest.mark.slow
def test_a_process_that_ends_closes_its_snapshot(standin):
    """It also ends: at the end, the client of Elasticsearch would wait for ever for a connection of an emptied pool."""
    standin.pits.clear()
    opened = standin.opened
    subprocess.run([sys.executable, "-c", ENDS, standin.url], check=True, timeout=60)
    assert standin.opened == opened + 1 and not standin.pits


@pytest.mark.slow
def test_the_fingerprint_follows_what_changes_a_rank(standin):
    usual = connect(standin, index="shop").fingerprint
    assert (
        connect(standin, index="shop", timeout=9.0, batch_size=3, connections=1, keep_alive="1h").fingerprint == usual
    )
    others = [{"fields": {"text": 2}}, {"fields": {"text": 1, "brand": 1}}, {"template": TEMPLATE}]
    others += [{"filter": [{"term": {"brand": "acme"}}]}]
    found = {connect(standin, index="shop", **params).fingerprint for params in others}
    built = {connect(standin, **params).fingerprint for params in ({}, {"language": "de"}, {"k1": 0.9}, {"b": 0.4})}
    assert len(found | built | {usual}) == 9
