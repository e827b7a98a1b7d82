"""What is claimed of the best of several systems, and of few users: by simulated tables."""

import numpy as np
import pytest

from rec_r1.evaluation import significance
from rec_r1.similarity_gap import utility
from rec_r1.similarity_gap.held_out import HeldOut
from rec_r1.similarity_gap.utility import MAIN, METRICS, UNLIKE
from rec_r1.tasks import Split

SEED = np.random.default_rng


def table(columns, users=None):
    """Of (Q, S) values, the same by every metric; the systems are called s0, s1, …"""
    values = {f"s{s}": np.repeat(column[:, None], len(METRICS), 1) for s, column in enumerate(columns.T)}
    return utility.Table(values, users or [f"u{q}" for q in range(len(columns))], np.ones(len(columns), bool))


def alike(seed, users=40, systems=11):
    """Systems that are worth the same: a hit, by a chance that depends on the user alone, at a random rank."""
    rng = SEED(seed)
    hits = rng.random((users, systems)) < 0.4 * rng.random((users, 1))
    return hits / np.log2(1 + rng.integers(1, 11, (users, systems)))


@pytest.mark.slow
def test_the_best_of_equals_is_seldom_said_to_be_ahead(monkeypatch):
    monkeypatch.setattr(significance, "RESAMPLES", 1_000)  # 200 tables; 2.5% do not need more
    claimed = np.zeros((200, 2), bool)
    for seed in range(200):
        found = table(alike(seed))
        best = found.best(found.names)
        claimed[seed] = (
            found.chosen(best, found.names, "s0")["low"] > 0,
            found.difference(best, "s0")["low"] > 0,
        )
    assert claimed[:, 0].mean() <= 0.06 < claimed[:, 1].mean()


def test_the_interval_of_the_best_finds_a_real_lead_and_is_its_own_where_nothing_was_chosen():
    values = alike(0, 300)
    values[:, 3] += 0.2
    found = table(values)
    assert found.best(found.names) == "s3"
    among, alone = (found.chosen("s3", names, "s0") for names in (found.names, ["s3"]))
    assert 0 < among["low"] < alone["low"] < among["mean"] < alone["high"] < among["high"]
    assert alone == pytest.approx(found.difference("s3", "s0"), abs=0.005)
    assert found.chosen("s0", found.names, "s0") == {"mean": 0, "low": 0, "high": 0}
    whole = found.chosen("s3", found.names)
    assert whole["low"] < found.of("s3", MAIN)["low"] and whole["mean"] == found.mean("s3")
    same = table(np.repeat(SEED(1).random((50, 1)), 3, axis=1) + np.array([0, 0, 0.1]))
    assert same.chosen("s2", same.names, "s0") == pytest.approx({"mean": 0.1, "low": 0.1, "high": 0.1})


def test_queries_that_differ_are_counted_where_their_differences_cancel():
    found = table(np.array([[0.5, 0.7], [0.5, 0.3], [0.2, 0.2]]), ["u", "u", "v"])
    assert found.difference("s0", "s1")["mean"] == pytest.approx(0) and found.differing("s0", "s1") == 2
    assert found.differing("s0", "s0") == 0


def test_slices_of_few_users_are_left_out():
    users = [f"u{q // 4}" for q in range(80)]
    labels = ["warm"] * 40 + ["tail"] * 36 + ["cold"] * 4
    found = utility.slices(labels, np.arange(80) < 50, users)
    assert list(found) == ["all", "warm targets", UNLIKE]  # 20, 10 and 13 users; tail has 9, cold 1
    assert found["warm targets"].sum() == 40
    assert list(utility.slices([""] * 80, None, users)) == ["all"]


def test_listed_is_the_share_of_the_targets_with_a_rank():
    split = Split(list("ab"), ["q"] * 2, [(1, 2), (3,)], [(1.0, 1.0), (1.0,)], histories=[(0,)] * 2)
    assert utility.listed(HeldOut.of(split), np.array([[4, 0], [900, 0]])).tolist() == [0.5, 1]
