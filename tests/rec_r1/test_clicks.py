"""Grades from events, against a few lines of brute force; and weights, against the expectation they are made for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_r1.tasks.clicks import COMBINATIONS, Counts, Grading, inverse_weight, position_propensity

EVENTS = st.lists(
    st.tuples(st.sampled_from(["click", "purchase", "scroll"]), st.integers(0, 5), st.sampled_from([1.0, 2.5, 10.0])),
    max_size=8,
)


def brute_force(events, impressions, grades, combine, min_count, levels):
    """Event by event, each expanded into as many entries as happened."""
    every = [(name, weight) for name, number, weight in events for _ in range(number)]
    totals = {name: sum(weight for other, weight in every if other == name) for name in grades}
    kept = [(name, weight) for name, weight in every if name in grades and totals[name] >= min_count]
    if combine == "best":
        value = max([grades[name] for name, _ in kept], default=0)
    else:
        value = sum(grades[name] * weight for name, weight in kept)
    if combine == "rate":
        value = value / impressions
    return value if levels is None else len([level for level in levels if level <= value])


@given(
    EVENTS,
    st.integers(1, 50),
    st.sampled_from(COMBINATIONS),
    st.sampled_from([1.0, 2.0, 7.5]),
    st.sampled_from([None, [1.0, 3.0], [0.125, 0.5, 12.0]]),
)
def test_grades_are_those_of_brute_force(events, impressions, combine, min_count, levels):
    counts = Counts(impressions=impressions)
    for name, number, weight in events:
        counts.add(name, number, weight)
    grades = {"click": 1.0, "purchase": 3.0}
    found = Grading(grades, combine, min_count, levels).grade(counts)
    assert found == pytest.approx(brute_force(events, impressions, grades, combine, min_count, levels))


def test_a_rate_without_impressions_is_no_grade_unless_nothing_happened():
    rate = Grading({"click": 1.0}, "rate")
    assert rate.grade(Counts({"click": 2.0})) is None
    assert rate.grade(Counts()) == 0 and rate.grade(Counts({"scroll": 3.0})) == 0


@given(st.integers(1, 1000), st.floats(0, 3), st.floats(0.01, 1))
def test_weights_are_clipped_and_rise_with_the_position(position, eta, clip):
    weight = inverse_weight(position_propensity(position, eta), clip)
    assert 1 <= weight <= 1 / clip * (1 + 1e-9)
    assert weight <= inverse_weight(position_propensity(position + 1, eta), clip)
    assert weight == pytest.approx(min(position**eta, 1 / clip))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
def test_the_weighted_rate_is_the_relevance_on_average(eta):
    """Exactly, by adding up the probabilities of all outcomes of a position-based model, not by drawing them."""
    relevance, shown = 0.37, {1: 4, 2: 1, 5: 3, 9: 2}
    expected = 0.0
    for position, times in shown.items():
        propensity = position_propensity(position, eta)
        expected += times * (propensity * relevance) * inverse_weight(propensity, clip=1e-6)
    counts = Counts(impressions=sum(shown.values()))
    counts.add("click", expected)
    assert Grading({"click": 1.0}, "rate", min_count=1e-9).grade(counts) == pytest.approx(relevance)
    unweighted = sum(times * position_propensity(position, eta) * relevance for position, times in shown.items())
    assert eta == 0 or unweighted / sum(shown.values()) < 0.9 * relevance


def test_simulated_clicks_lead_back_to_the_relevance():
    random = np.random.default_rng(0)
    positions = random.integers(1, 8, 40_000)
    clicked = random.random(len(positions)) < 0.3 / positions
    counts = Counts(impressions=len(positions))
    for position in positions[clicked].tolist():
        counts.add("click", 1, inverse_weight(position_propensity(position, 1.0), 0.05))
    assert Grading({"click": 1.0}, "rate").grade(counts) == pytest.approx(
        0.3, abs=0.02
    )  # more than three standard errors
