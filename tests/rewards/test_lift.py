"""Tests of `lift` and `harm`, which compare a completion with the raw query."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rewards
from rewards import METRICS, Lift, Outcome, harm

RANKS = st.lists(st.permutations([0, 0, 1, 2, 3, 7, 40]).map(lambda p: p[:3]), min_size=1, max_size=6)


def outcome(ranks, raw):
    ranks = np.array(ranks, np.int32)
    grades = np.tile(np.array([1.0, 2.0, 3.0], np.float32), (len(ranks), 1))
    raw = None if raw is None else np.array(raw, np.int32)
    return Outcome(["x"] * len(ranks), [None] * len(ranks), ranks, grades, raw_ranks=raw)


@given(RANKS, st.data(), st.sampled_from(sorted(METRICS)), st.sampled_from([1, 3, 10]))
def test_gain_and_loss_are_the_metric_s(ranks, data, metric, k):
    raw = data.draw(st.lists(st.permutations([0, 0, 1, 2, 3, 7, 40]).map(lambda p: p[:3]),
                             min_size=len(ranks), max_size=len(ranks)))  # fmt: skip
    given_ = outcome(ranks, raw)
    difference = METRICS[metric](given_.ranks, given_.grades, k) - METRICS[metric](given_.raw_ranks, given_.grades, k)
    assert np.allclose(Lift(k, metric)(given_), difference, atol=1e-6)
    assert np.allclose(harm(k, metric)(given_), [min(0.0, d) for d in difference], atol=1e-6)


def test_in_a_recipe():
    total = rewards.from_spec({"ndcg@10": 1.0, "harm@10": 2.0, "lift@5": {"weight": 0, "metric": "recall"}})
    assert total.names == ("ndcg@10", "harm@10", "lift_recall@5") and total.reads_raw
    assert not rewards.from_spec({"ndcg@10": 1.0}).reads_raw
    # The raw query ranks all three targets at the top; of two completions, one keeps one target there, one keeps none.
    values = total(outcome([[1, 0, 0], [0, 0, 0]], [[1, 2, 3], [1, 2, 3]]))
    ndcg = METRICS["ndcg"](np.array([[1, 0, 0], [1, 2, 3]]), np.array([[1.0, 2.0, 3.0]] * 2), 10)
    assert np.allclose(values, [ndcg[0] + 2 * (ndcg[0] - ndcg[1]), -2 * ndcg[1]], atol=1e-6)
    assert pickle.loads(pickle.dumps(total)) == total


@pytest.mark.parametrize("key", ["lift", "harm", "lift@0", "harm@x", "lift@10.5"])
def test_a_depth_is_needed(key):
    with pytest.raises(ValueError, match=r"@10|did you mean"):
        rewards.from_spec({key: 1.0})


def test_unknown_metrics_and_outcomes_without_raw_ranks_are_refused():
    with pytest.raises(ValueError, match="unknown metric 'ndgc'"):
        rewards.from_spec({"harm@10": {"metric": "ndgc"}})
    with pytest.raises(ValueError, match="raw_ranks"):
        Lift(10)(outcome([[1, 2, 3]], None))
