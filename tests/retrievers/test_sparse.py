"""The pruned BM25 ranks, compared with plain ones: in Python with tiny blocks, and compiled on a larger matrix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrievers import rank
from retrievers.text import bm25_kernel, bm25_ranks
from retrievers.text.bm25_ranks import Impacts, pack, peaks_of, scores


def matrix(n: int, lengths: list[int], seed: int) -> Impacts:
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.choice(n, length, replace=False)) for length in lengths]
    # Few distinct values, so that sums are often equal. Frequent terms have small weights, as in BM25.
    data = [rng.integers(1, 4, length).astype(np.float32) / np.float32(1 + length) for length in lengths]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = np.concatenate(data).astype(np.float32)
    return Impacts(flat, np.concatenate(rows).astype(np.int32), starts, peaks_of(flat, starts), n)


@st.composite
def problems(draw):
    n = draw(st.integers(1, 40))
    lengths = draw(st.lists(st.integers(1, n), min_size=1, max_size=8))
    queries = draw(st.lists(st.lists(st.integers(0, len(lengths) - 1), max_size=12), min_size=1, max_size=3))
    targets = draw(
        st.lists(st.lists(st.integers(-1, n - 1), min_size=2, max_size=2), min_size=len(queries), max_size=len(queries))
    )
    return matrix(n, lengths, draw(st.integers(0, 99))), queries, np.array(targets, np.int64)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99]), st.sampled_from([0.001, 1, 1000]), st.integers(1, 9))
def test_pruning_changes_no_rank(problem, share, lookup, block):
    impacts, queries, targets = problem
    packed = pack(queries, impacts.peaks)
    expected = np.stack([rank(scores(impacts, packed, q), targets[q]) for q in range(len(queries))])
    out = np.zeros(targets.shape, np.int32)
    with pytest.MonkeyPatch.context() as patch:  # Both ways to complete a block, and many blocks.
        for name, value in (("POSTPONED_SHARE", share), ("LOOKUP_COST", lookup), ("BLOCK", block)):
            patch.setattr(bm25_kernel, name, value)
        bm25_kernel.count(*impacts, *packed, targets, out, 0, len(queries))
    assert out.tolist() == expected.tolist()


def test_compiled_and_in_threads():
    pytest.importorskip("numba")
    rng = np.random.default_rng(1)
    n = 100_000  # Four blocks.
    impacts = matrix(n, [60_000, 30_000, *([3_000] * 30), *([20] * 200)], seed=2)
    queries = [rng.integers(0, 232, length).tolist() for length in rng.integers(0, 60, 64)]
    targets = rng.integers(0, n, (64, 3))
    for q, query in enumerate(queries):  # Otherwise few targets would match.
        if query:
            term = query[0]
            targets[q, :2] = rng.choice(impacts.rows[impacts.starts[term] : impacts.starts[term + 1]], 2)
    packed = pack(queries, impacts.peaks)
    expected = np.stack([rank(scores(impacts, packed, q), targets[q]) for q in range(64)])
    assert (expected > 0).mean() > 0.6 and expected.max() > 10_000
    assert bm25_ranks.ranks(impacts, packed, targets).tolist() == expected.tolist()


def test_without_numba_the_same(monkeypatch):
    impacts = matrix(50, [50, 20, 3], seed=3)
    packed = pack([[0, 1, 1], [2], []], impacts.peaks)
    targets = np.array([[4, -1], [7, 8], [0, 1]])
    compiled = bm25_ranks.ranks(impacts, packed, targets)
    monkeypatch.setattr(bm25_ranks, "_kernel", lambda: None)
    assert bm25_ranks.ranks(impacts, packed, targets).tolist() == compiled.tolist()


def test_one_loop_is_compiled_for_arrays_in_memory_and_in_files():
    pytest.importorskip("numba")
    impacts = matrix(50, [50, 20, 3], seed=4)
    in_files = impacts._replace(data=impacts.data.copy(), rows=impacts.rows.copy(), starts=impacts.starts.copy())
    for array in in_files[:3]:
        array.flags.writeable = False  # As that of a memory-mapped file.
    packed, targets = pack([[0, 1]], impacts.peaks), np.array([[4, 7]])
    assert bm25_ranks.ranks(impacts, packed, targets).tolist() == bm25_ranks.ranks(in_files, packed, targets).tolist()
    assert len(bm25_ranks._kernel().signatures) == 1 and impacts.data.flags.writeable
