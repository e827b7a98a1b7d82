"""`top` and `rank`, compared with a simple sort."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrievers import rank, top

# Few distinct values, so that most scores have ties. Documents with a score of zero or less are not retrieved.
SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 1.5]), min_size=1, max_size=40)


def sorted_rows(scores: list[float]) -> list[int]:
    return sorted((row for row, score in enumerate(scores) if score > 0), key=lambda row: (-scores[row], row))


@given(SCORES, st.integers(1, 50))
def test_top_is_the_head_of_the_sorted_list(scores, k):
    rows, best = top(np.array(scores, np.float32), k)
    expected = sorted_rows(scores)[:k]
    width = min(k, len(scores))
    assert rows.tolist() == expected + [-1] * (width - len(expected))
    assert best.tolist() == [scores[row] for row in expected] + [-np.inf] * (width - len(expected))
    assert rows.dtype == np.int32 and best.dtype == np.float32


@given(SCORES)
def test_rank_is_the_position_in_the_sorted_list(scores):
    ranks = rank(np.array(scores, np.float32), np.arange(-1, len(scores)))
    order = sorted_rows(scores)
    assert ranks.tolist() == [0] + [order.index(row) + 1 if row in order else 0 for row in range(len(scores))]


def test_a_row_outside_the_catalogue_is_refused():
    for row in (3, -2):
        with pytest.raises(ValueError, match=f"target row {row} is outside the catalogue's rows 0 to 2"):
            rank(np.ones(3, np.float32), np.array([0, row]))


@pytest.mark.parametrize("k", [0, -1, 1.5, True])
def test_k_below_one_is_refused(k):
    with pytest.raises(ValueError, match="k must be an integer >= 1"):
        top(np.ones(3, np.float32), k)
