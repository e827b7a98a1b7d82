"""The floor against copying and stuffing: honest queries cost nothing, copies and stuffed queries do."""

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rewards
from rewards import LengthPenalty, Outcome, RepetitionPenalty, StuffingPenalty, is_copy, repeated


class Action(NamedTuple):
    text: str


def outcome(written, queries=None, texts=None):
    """Written texts (None = malformed) -> Outcome whose actions send them, or ``texts``."""
    texts = written if texts is None else texts
    actions = [None if own is None else Action(text or "") for own, text in zip(written, texts, strict=True)]
    own = [text or "" for text in written]
    ranks = np.zeros((len(written), 1), np.int32)
    queries = ["shoes"] * len(written) if queries is None else queries
    return Outcome(own, actions, ranks, np.ones(ranks.shape, np.float32), queries=queries, written=own)


def stuffing(*written, query="shoes", **params):
    return StuffingPenalty(**params)(outcome(written, [query] * len(written))).tolist()


def test_honest_queries_cost_nothing():
    assert stuffing("sneakers trainers", "red shoes", "shoes for men", "sneakers shoes sneakers") == [0, 0, 0, 0]
    assert stuffing("red shoes", "shoes", query="cheap red shoes") == [0, 0]  # words left out: no copy


def test_copies():
    assert stuffing("shoes", "Shoes SHOES", " ".join(["shoes"] * 10)) == [-1, -1, -1]
    assert stuffing("shoes red", "red red shoes", query="red shoes") == [-1, -1]


def test_length_ramp():
    def distinct(count):
        return " ".join(f"w{n}" for n in range(count))

    assert stuffing(*map(distinct, (1, 4, 5, 6, 8, 182)), max_words=4) == [0, 0, -0.25, -0.5, -1, -1]
    assert stuffing(*map(distinct, (32, 48, 64))) == [0, -0.5, -1]


def test_repetition_ramp():
    assert stuffing("a a b b", "a a a a a a a b", "a b c d") == [0, -0.5, 0]
    assert stuffing("a a b b", "a a a a a a a b", max_repeated=0) == [-0.5, -0.75]
    assert stuffing("a " * 20) == [pytest.approx(-0.9)]


def test_a_format_that_repeats_the_query_costs_nothing():
    """The action of `expand` holds the raw query several times. The policy wrote the last words only."""
    text = " ".join(["shoes"] * 40 + ["sneakers trainers"])
    seen = outcome(["sneakers trainers"], texts=[text])
    assert StuffingPenalty()(seen).tolist() == [0]
    assert LengthPenalty()(seen)[0] < 0 and RepetitionPenalty()(seen)[0] < 0


def test_what_is_no_query_costs_nothing():
    assert StuffingPenalty()(outcome([None, ""], texts=[None, "shoes"])).tolist() == [0, 0]  # malformed; the raw query
    many = "title\n" * 80
    assert StuffingPenalty()(outcome([many], texts=[""])).tolist() == [0]  # a list


def test_words_are_the_outcomes_own():
    seen = outcome(["猫狗猫狗"], ["狗猫"])
    assert StuffingPenalty()(seen).tolist() == [0]
    assert StuffingPenalty()(dataclasses.replace(seen, words=list)).tolist() == [-1]


@given(st.lists(st.sampled_from("abcdef"), max_size=30), st.lists(st.sampled_from("abcdef"), max_size=3))
def test_it_is_the_lowest_of_three(written, query):
    value = StuffingPenalty(max_words=5).of(written, query)
    copied = -1.0 if written and set(written) == set(query) else 0.0
    count, distinct = len(written), len(set(written))
    long = -min(1.0, max(0, count - 5) / 5)
    again = -max(0.0, (count - distinct) / count - 0.5) / 0.5 if count else 0.0
    assert value == pytest.approx(min(copied, long, again))
    assert -1 <= value < 0 or (value == 0 and not np.signbit(value)), "-0.0 would show in logs"
    assert is_copy(written, query) == (copied == -1)
    assert repeated(written) == pytest.approx((count - distinct) / count if count else 0)


@pytest.mark.parametrize("value", [0, -3, 1.5, True, "12", None])
def test_a_bad_max_words_is_refused(value):
    with pytest.raises(ValueError, match=r"max_words must be an integer >= 1, got .*: set it to"):
        StuffingPenalty(max_words=value)


@pytest.mark.parametrize("value", [1, -0.1, True, "0.5", None, float("nan")])
def test_a_bad_max_repeated_is_refused(value):
    with pytest.raises(ValueError, match=r"max_repeated must be at least 0 and below 1, got .*: set it to"):
        StuffingPenalty(max_repeated=value)


def test_an_outcome_without_queries_is_refused():
    seen = outcome(["a", "b"])
    bare = Outcome(seen.completions, seen.actions, seen.ranks, seen.grades)
    with pytest.raises(ValueError, match="stuffing: the outcome has no queries"):
        StuffingPenalty()(bare)


def test_in_a_recipe():
    total = rewards.from_spec({"ndcg@10": 1.0, "stuffing": {"weight": 0.5, "max_words": 4}})
    assert total.names == ("ndcg@10", "stuffing")
    assert total(outcome(["shoes", "a b c d"])).tolist() == [-0.5, 0]
