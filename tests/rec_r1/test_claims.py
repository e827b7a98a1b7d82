"""The claims of the similarity gap: verdicts in all directions, and the sweep over sizes against all samples."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_r1.similarity_gap import claims, utility
from rec_r1.similarity_gap.utility import MAIN, METRICS

QUERIES = 60
USERS = [f"u{q}" for q in range(QUERIES)]


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("lead", "noise", "expected"),
    [
        (0.10, 0.1, claims.STANDS),
        (-0.10, 0.1, claims.RELAXED),
        (0.0, 0.02, claims.RELAXED),  # A difference that is shown to be too small to matter.
        (0.0, 1.0, claims.UNDECIDED),
    ],
)
def test_a_verdict_follows_from_the_interval(lead, noise, expected):
    reduced = np.full((1, QUERIES), 0.5)
    full = reduced + lead + rng().normal(0, noise, (3, QUERIES))
    found = claims.compared(full, reduced, USERS)
    assert found["verdict"] == expected
    assert found["lead"]["mean"] == pytest.approx((full - reduced).mean()) and found["seeds"] == 3
    assert found["beyond"]["mean"] == pytest.approx(found["lead"]["mean"] - claims.MARGIN * 0.5)


def test_a_small_lead_that_is_certain_supports_no_claim():
    reduced = np.full((1, QUERIES), 0.5)
    full = reduced + 0.01 + rng().normal(0, 0.01, (1, QUERIES))
    found = claims.compared(full, reduced, USERS)
    assert found["lead"]["low"] > 0 and found["verdict"] == claims.RELAXED


def test_equal_systems_are_relaxed_and_systems_that_find_nothing_undecided():
    same = np.full((1, QUERIES), 0.3)
    assert claims.compared(same, same, USERS)["verdict"] == claims.RELAXED
    nothing = np.zeros((1, QUERIES))
    assert claims.compared(nothing, nothing, USERS)["verdict"] == claims.UNDECIDED


def test_fits_that_differ_widen_the_interval():
    reduced = np.full((1, QUERIES), 0.5)
    noise = rng().normal(0, 0.1, (3, QUERIES))
    near = claims.compared(reduced + 0.05 + noise, reduced, USERS)["lead"]
    apart = claims.compared(reduced + np.array([[-0.1], [0.05], [0.2]]) + noise, reduced, USERS)["lead"]
    assert apart["high"] - apart["low"] > 3 * (near["high"] - near["low"])


def columns(**scores):
    return {name: np.repeat(np.asarray(each, float)[:, None], len(METRICS), axis=1) for name, each in scores.items()}


def test_the_best_of_several_has_a_corrected_interval_at_both_limits():
    text = np.abs(rng(1).normal(0.4, 0.1, QUERIES))
    people = {f"p{n}": text + rng(n + 2).normal(0.0, 0.3, QUERIES) for n in range(8)}
    best, found = claims.best_compared(columns(text=text, **people), list(people), "text", USERS)
    assert best == max(people, key=lambda name: people[name].mean())
    alone = claims.compared(people[best][None], text[None], USERS)
    for limit in ("lead", "beyond"):
        assert found[limit]["mean"] == pytest.approx(alone[limit]["mean"])
        assert found[limit]["low"] < alone[limit]["low"]
    assert found["full"] == pytest.approx(people[best].mean()) and found["reduced"] == pytest.approx(text.mean())
    assert utility.Table(columns(text=text), USERS, np.ones(QUERIES, bool)).mean("text", MAIN) == found["reduced"]


@given(st.integers(2, 14), st.data())
@settings(max_examples=40, deadline=None)
def test_recall_in_a_smaller_catalogue_is_that_of_all_samples(documents, data):
    rank, sample = data.draw(st.integers(1, documents)), data.draw(st.integers(1, documents))
    # The other documents by rank, of which the first rank - 1 are above the target.
    drawn = list(itertools.combinations(range(documents - 1), sample - 1))
    within = [sum(place < rank - 1 for place in others) < claims.DEPTH for others in drawn]
    assert claims.recall_at_size(np.array([[rank]]), documents, sample)[0] == pytest.approx(np.mean(within))


def test_recall_in_the_whole_catalogue_is_recall():
    ranks = np.array([[1], [10], [11], [0]])
    assert claims.recall_at_size(ranks, 500, 500).tolist() == [1, 1, 0, 0]


def test_the_share_that_is_kept_is_compared_as_a_share():
    steady = np.stack([np.full(QUERIES, 0.8), np.full(QUERIES, 0.8)], axis=1)
    drowned = np.stack([np.full(QUERIES, 0.8), np.full(QUERIES, 0.2)], axis=1)
    nothing = np.zeros((QUERIES, 2))
    found = {"steady": steady, "drowned": drowned, "nothing": nothing}
    stands = claims.kept(found, "steady", "drowned", USERS)
    assert stands["verdict"] == claims.STANDS and stands["lead"]["mean"] == pytest.approx(0.75)
    assert claims.kept(found, "drowned", "steady", USERS)["verdict"] == claims.RELAXED
    assert claims.kept(found, "steady", "nothing", USERS)["verdict"] == claims.UNDECIDED


def test_sentences_say_what_the_numbers_say():
    claim = claims.CHANGES[0]

    def written(lead, beyond, seeds=1, of="all", users=300):
        found = {
            "lead": dict(zip(("mean", "low", "high"), lead, strict=True)),
            "beyond": {"low": beyond, "high": beyond},
            "seeds": seeds, "queries": 1200, "users": users, "of": of,
        }  # fmt: skip
        found["verdict"] = claims.verdict(found["lead"], found["beyond"])
        return claims.row(claim, "ndcg@10", "a", "b", found)["sentence"]

    assert written((0.1, 0.05, 0.15), 0.02, seeds=3) == (
        "Stands: a is ahead of b in ndcg@10: +0.1000 [+0.0500, +0.1500] (1,200 queries of 300 users, 3 fits)."
    )
    assert written((-0.1, -0.15, -0.05), -0.02, of="warm targets") == (
        "Relaxed: a is shown to be less than 5% ahead of b in ndcg@10, or behind it: −0.1000 [−0.1500, −0.0500] on "
        "warm targets (1,200 queries of 300 users)."
    )
    assert written((0.1, 0.05, 0.15), 0.02, of="emoji", users=None).endswith("+0.1500] on emoji (1,200 queries).")
    undecided = written((0.01, -0.05, 0.15), 0.02)
    assert undecided.startswith("Undecided: a is not shown to be ahead of b") and "not ruled out" in undecided
    assert claims.missing(claim, "no ease")["sentence"] == "Not measured: no ease."
