"""The cache of answers: its keys, its size, several processes, and a disk that fails."""

import multiprocessing
import pickle
import sqlite3

import numpy as np
import pytest

import retrievers
from retrievers import Cache, Catalog, Query, RetrieverError

CATALOG = Catalog.from_records({"id": str(i), "text": f"party {i}"} for i in range(50))
BM25 = retrievers.open("bm25", CATALOG)


class Counting:
    def __init__(self, inner=BM25):
        self.inner, self.fingerprint, self.asked = inner, inner.fingerprint, []

    def search(self, queries, k):
        self.asked += [(query, k) for query in queries]
        return self.inner.search(queries, k)

    def ranks(self, queries, targets):
        self.asked += [(query, tuple(row)) for query, row in zip(queries, targets.tolist(), strict=True)]
        return self.inner.ranks(queries, targets)


def test_the_key_is_the_query_and_what_is_asked_of_it():
    counting = Counting()
    cache = Cache(counting, 50)
    queries = [
        Query("party"), Query("party 7"), Query("party", (1,)), Query("party", (1,), (-1.0,)), Query("party'"),
        Query('party"'), Query("party", (1, 2)),
    ]  # fmt: skip
    for _ in range(2):
        assert cache.search(queries, 3).rows.tolist() == BM25.search(queries, 3).rows.tolist()
        assert cache.search(queries, 4).rows.shape == (7, 4)
        for target in (1, 2):
            targets = np.full((7, 1), target)
            assert cache.ranks(queries, targets).tolist() == BM25.ranks(queries, targets).tolist()
    assert len(counting.asked) == len(set(counting.asked)) == 4 * 7


def test_another_index_never_finds_an_old_answer(tmp_path):
    other = retrievers.open("bm25", CATALOG, b=0.1, k1=9.0)
    for retriever in (BM25, other, BM25):
        cache = Cache(retriever, 50, folder=tmp_path / "results")
        assert (
            cache.search([Query("party 7")], 3).scores.tolist()
            == retriever.search([Query("party 7")], 3).scores.tolist()
        )
    assert cache.counts() == (1, 1)


@pytest.mark.slow
def test_memory_is_bounded():
    counting = Counting()
    cache = Cache(counting, 50, memory_mb=1)
    for i in range(30):  # 50 hits take 400 bytes, and an entry 250 more; 30 x 200 entries take 4 MB.
        cache.search([Query(f"party {i} {j}") for j in range(200)], 50)
    assert cache._memory.currsize <= 1 << 20
    assert len(cache._memory) == (1 << 20) // 650
    tiny = Cache(counting, 50, memory_mb=0)
    assert tiny.search([Query("party 7")], 3).rows.tolist() == BM25.search([Query("party 7")], 3).rows.tolist()


def fill(arguments) -> int:
    folder, number = arguments
    counting = Counting()
    cache = Cache(counting, 50, folder=folder)
    for i in range(40):
        queries = [Query(f"party {i}"), Query(f"{i} of {number}")]
        assert cache.ranks(queries, np.array([[i], [i]])).tolist() == BM25.ranks(queries, np.array([[i], [i]])).tolist()
    return len(counting.asked)


@pytest.mark.slow
def test_several_processes_share_a_disk(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        asked = pool.map(fill, [(tmp_path / "results", number) for number in range(3)], chunksize=1)
    assert all(40 <= number <= 80 for number in asked)
    assert fill((tmp_path / "results", 0)) == 0  # All their answers are in the cache.


def test_a_disk_that_fails_is_done_without(tmp_path, caplog, monkeypatch):
    cache = Cache(BM25, 50, folder=tmp_path / "results")

    def full(*_, **__):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(type(cache._disk), "set", full)
    expected = BM25.search([Query("party 7")], 3).rows.tolist()
    assert cache.search([Query("party 7")], 3).rows.tolist() == expected
    assert "going on without it" in caplog.text and "disk is full" in caplog.text
    assert cache.search([Query("party 7")], 3).rows.tolist() == expected and cache.counts() == (2, 1)


def test_a_folder_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RetrieverError, match=r"retriever.cache.disk: .* does not open"):
        Cache(BM25, 50, folder=tmp_path / "file")


def test_failed_rows_are_asked_again():
    class Half(Counting):
        def ranks(self, queries, targets):
            ranks = super().ranks(queries, targets)
            ranks[0] = -1
            return ranks

    half = Half()
    cache = Cache(half, 50)
    targets = np.array([[1], [2]])
    queries = [Query("party 1"), Query("party 2")]
    assert cache.ranks(queries, targets)[0].tolist() == [-1]
    assert cache.ranks(queries, targets).tolist()[1] == BM25.ranks(queries, targets).tolist()[1]
    assert [query.text for query, _ in half.asked] == ["party 1", "party 2", "party 1"]


def test_pickles_by_its_parts(tmp_path):
    cache = Cache(BM25, 50, memory_mb=3, folder=tmp_path / "results")
    again = pickle.loads(pickle.dumps(cache))
    assert again._memory.maxsize == 3 << 20 and again.fingerprint == cache.fingerprint
