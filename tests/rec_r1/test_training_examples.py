"""Training examples from scored completions: the best ones, pairs, and a resampling in proportion to weights."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from rec_r1.baselines.training_examples import Group, best_answers, pairs, resampled, weights

REWARDS = st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=24)


def group(rewards, prompt="p") -> Group:
    return Group(prompt, [f"{prompt}{i}" for i in range(len(rewards))], np.array(rewards, np.float32), math.nan)


def drawn(one: Group, temperature: float, seed: int) -> list[int]:
    """How often each completion of a group is among the examples."""
    counts = Counter(row["completion"] for row in resampled([one], temperature, seed))
    return [counts[answer] for answer in one.answers]


def test_groups_become_examples():
    groups = [
        Group("p1", ["a", "b", "c"], np.array([0.1, 0.9, 0.5]), 0.2),
        Group("p2", ["a", "b"], np.array([0.3, 0.3]), 0.3),  # nothing to learn
        Group([{"role": "user", "content": "p3"}], ["a", "b"], np.array([0.0, 0.1]), 0.4),  # all worse than raw
    ]
    assert best_answers(groups) == [{"prompt": "p1", "completion": "b"}]
    first, second = pairs(groups)
    assert first == {"prompt": "p1", "chosen": "b", "rejected": "a"}
    assert second["chosen"] == [{"role": "assistant", "content": "b"}]


@given(REWARDS, st.floats(0.05, 5))
def test_weights_are_the_published_ones(rewards, temperature):
    mean = sum(rewards) / len(rewards)
    raised = [math.exp((reward - mean) / temperature) for reward in rewards]
    found = weights(np.array(rewards, np.float32), temperature)
    assert np.allclose(found, [one / sum(raised) for one in raised], rtol=1e-6)
    assert np.allclose(found, softmax(np.array(rewards) / temperature), rtol=1e-6)


def test_a_low_temperature_does_not_overflow():
    assert weights(np.array([0.0, 1.0, 1.0], np.float32), 1e-5).tolist() == [0.0, 0.5, 0.5]
    assert drawn(group([0.0, 1.0, 0.5]), 1e-5, seed=0) == [0, 3, 0]


@given(REWARDS.filter(lambda r: len(set(r)) > 1), st.floats(0.05, 5), st.integers(0, 1000))
def test_every_completion_is_drawn_as_often_as_its_weight_says(rewards, temperature, seed):
    counts = drawn(group(rewards), temperature, seed)
    expected = len(rewards) * softmax(np.array(rewards) / temperature)
    assert sum(counts) == len(rewards)
    assert all(abs(count - mean) < 1 + 1e-6 for count, mean in zip(counts, expected, strict=True))


def test_the_mean_over_seeds_is_the_weight():
    rewards = [0.0, 0.1, 0.1, 0.35, 0.6]
    mean = np.mean([drawn(group(rewards), 0.3, seed) for seed in range(500)], axis=0)
    raised = [math.exp(reward / 0.3) for reward in rewards]
    assert np.allclose(mean, [5 * one / sum(raised) for one in raised], atol=0.09)  # Four standard errors at most.


def test_dead_groups_are_left_out_and_a_seed_repeats_its_draws():
    chat = [{"role": "user", "content": "c"}]
    found = [group([0.5] * 4, "dead"), group([0.1, 0.2, 0.3], "live"), group([0.0, 1.0], "x")._replace(prompt=chat)]
    rows = resampled(found, 0.1, seed=3)
    assert [row["prompt"] for row in rows] == ["live"] * 3 + [chat] * 2
    assert all(row["completion"] == [{"role": "assistant", "content": "x1"}] for row in rows[3:])
    assert rows == resampled(found, 0.1, seed=3)
    assert any(rows != resampled(found, 0.1, seed) for seed in range(20))
    assert resampled(found[:1], 0.1, seed=3) == []


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_a_group_s_draws_depend_on_its_own_rewards_alone(temperature):
    low, high = (resampled([group([base, base + 0.1, base + 0.3])], temperature, 0) for base in (0.0, 0.5))
    assert low == high
