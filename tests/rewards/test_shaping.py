"""The format, length and repetition penalties, the paper's reward, and the weighted sum."""

import pickle
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import NamedTuple

import numpy as np
import pytest

from rewards import (
    FormatPenalty,
    LengthPenalty,
    Outcome,
    RankingReward,
    RecR1,
    RepetitionPenalty,
    WeightedSum,
)


class Query(NamedTuple):  # like retrievers.Query, it satisfies Action by its attribute `text` only
    text: str = ""
    history: tuple[int, ...] = ()


def outcome(texts, completions=None, ranks=None, grades=None):
    """Texts of the actions (None = malformed) -> Outcome; by default one relevant target, not retrieved."""
    completions = completions or ["" if text is None else f"<answer>{text}</answer>" for text in texts]
    ranks = np.zeros((len(texts), 1), np.int32) if ranks is None else np.array(ranks, np.int32)
    grades = np.ones(ranks.shape, np.float32) if grades is None else np.array(grades, np.float32)
    return Outcome(completions, [None if text is None else Query(text) for text in texts], ranks, grades)


def check(reward, seen, expected):
    values = reward(seen)
    assert values.dtype == np.float32
    assert not np.signbit(values[values == 0]).any(), "-0.0 would show in logs"
    np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        (FormatPenalty(), "format"),
        (LengthPenalty(), "length"),
        (RepetitionPenalty(), "repetition"),
        (RecR1(), "rec_r1@1000"),
        (RecR1(k=5), "rec_r1@5"),
        (WeightedSum((FormatPenalty(),), (1.0,)), "weighted_sum"),
    ],
)
def test_named_frozen_picklable_and_at_home_with_no_rows(reward, name):
    assert reward.__name__ == name
    assert pickle.loads(pickle.dumps(reward)) == reward
    with pytest.raises(FrozenInstanceError):
        reward.k = 7
    empty = reward(outcome([], ranks=np.zeros((0, 3))))
    assert empty.shape == (0,)
    assert empty.dtype == np.float32


def test_format():
    check(FormatPenalty(), outcome(["blue shoes", None, ""]), [0, -1, 0])


def test_length_ramp():
    texts = ["a " * words for words in (0, 1, 4, 5, 6, 8, 9, 182)]
    check(LengthPenalty(max_words=4), outcome(texts), [0, 0, 0, -0.25, -0.5, -1, -1, -1])
    check(LengthPenalty(), outcome(["a " * 32, "a " * 48, "a " * 64]), [0, -0.5, -1])


def test_length_of_a_malformed_completion_is_its_own():
    completions = ["think " * 500, "so short", "<think>" + "long " * 500 + "</think><answer>tent</answer>"]
    check(LengthPenalty(max_words=4), outcome([None, None, "tent"], completions), [-1, 0, 0])


@pytest.mark.parametrize("value", [0, -3, 1.5, True, "12", None])
def test_length_refuses_a_bad_limit(value):
    with pytest.raises(ValueError, match=r"max_words must be an integer >= 1, got .*: set it to") as caught:
        LengthPenalty(max_words=value)
    assert repr(value) in str(caught.value)


def test_repetition():
    texts = ["red red RED shoes", "red shoes", "", None, "a\na\tb  b", "Straße STRASSE"]
    check(RepetitionPenalty(), outcome(texts), [-0.5, 0, 0, 0, -0.5, -0.5])


def letters(text):
    return [letter for letter in text if letter.isalpha()]


def test_words_are_the_outcomes_own():
    """By default white space splits words and case is ignored; `Outcome.words` replaces that for other scripts."""
    seen = outcome(["猫狗" * 4, "猫狗鱼", None], completions=["", "", "猫" * 8])
    check(LengthPenalty(max_words=4), seen, [0, 0, 0])
    check(RepetitionPenalty(), seen, [0, 0, 0])
    seen = replace(seen, words=letters)
    check(LengthPenalty(max_words=4), seen, [-1, 0, -1])
    check(RepetitionPenalty(), seen, [-0.75, 0, 0])
    assert pickle.loads(pickle.dumps(seen)).words is letters


def test_paper_shaping_table():
    seen = outcome(
        [None, None, "hit first", "hit second", "missed", "nothing judged", "too deep"],
        ranks=[[0], [0], [1], [2], [0], [0], [1001]],
        grades=[[1], [0], [1], [1], [1], [0], [1]],
    )
    check(RecR1(), seen, [-2, -2, 1.1, 0.1 + 1 / np.log2(3), 0, np.nan, 0])
    check(RecR1(k=1), seen, [-2, -2, 1.1, 0, 0, np.nan, 0])


def test_paper_shaping_refuses_a_bad_k():
    with pytest.raises(ValueError, match="k must be an integer >= 1, got 0"):
        RecR1(k=0)


# ---------------------------------------------------------------- WeightedSum


@dataclass(frozen=True)
class Fixed:
    """A reward that returns the values it is built with."""

    name: str
    values: object

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, outcome):
        return self.values


def total(*parts):
    """(weight, values) pairs -> their WeightedSum, whose rewards are named a, b, c."""
    rewards = tuple(Fixed("abc"[i], values) for i, (_, values) in enumerate(parts))
    return WeightedSum(rewards, tuple(weight for weight, _ in parts))


def test_the_array_of_a_reward_stays_its_own():
    """The Scorer sets NaN in components where the retriever failed. A reward may return a constant array again."""
    constant = np.full(2, 0.5, np.float32)
    broadcast = np.broadcast_to(np.float32(0.5), (2,))
    for values in total((1.0, constant), (1.0, broadcast)).components(outcome(["a", "b"])).values():
        values[0] = np.nan
    assert constant.tolist() == broadcast.tolist() == [0.5, 0.5]


def test_sum_of_components():
    seen = outcome(["tent tent", None], ranks=[[1], [0]])
    reward = WeightedSum((RankingReward("ndcg", 10), FormatPenalty(), RepetitionPenalty()), (2.0, 0.5, -1.0))
    components = reward.components(seen)
    assert list(components) == ["ndcg@10", "format", "repetition"] == list(reward.names)
    expected = {"ndcg@10": [1, 0], "format": [0, -1], "repetition": [-0.5, 0]}  # unweighted
    for name, values in components.items():
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected[name])
    np.testing.assert_allclose(reward.combine(components), [2.5, -0.5])
    check(reward, seen, [2.5, -0.5])


def test_sums_nest():
    seen = outcome([None, "tent"])
    inner = WeightedSum((FormatPenalty(),), (2.0,))
    check(WeightedSum((inner, LengthPenalty()), (3.0, 1.0)), seen, [-6, 0])


def test_nan_parts_are_left_out():
    nan = np.nan
    seen = outcome(["a", "b", "c", "d"])
    check(total((2.0, [1, nan, nan, 1]), (0.5, [4, 4, nan, nan])), seen, [4, 2, nan, 2])
    check(total((2.0, [1, nan, nan, 1]), (0.0, [4, 4, nan, nan])), seen, [2, 0, nan, 2])


def test_combine_needs_every_component():
    reward = total((1.0, [0.0]), (1.0, [0.0]))
    with pytest.raises(ValueError, match="no component 'b': pass the return value of this sum's `components`"):
        reward.combine({"a": np.zeros(1)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], r"reward 'b' returned shape \(2,\): return one number per completion, \(3,\)"),
        (np.zeros((3, 1)), r"reward 'b' returned shape \(3, 1\)"),
        (0.5, r"reward 'b' returned shape \(\)"),
        ([1.0, np.inf, 0.0], "reward 'b' returned infinity: return NaN"),
        ([1.0, -np.inf, 0.0], "reward 'b' returned infinity: return NaN"),
        ([1.0, 1e300, 0.0], "reward 'b' returned infinity: return NaN"),
        (["x", "y", "z"], "reward 'b' must return 3 numbers: could not convert"),
    ],
)
def test_what_trl_would_choke_on_is_refused_by_name(values, message):
    reward = total((1.0, [0.0, 0.0, 0.0]), (1.0, values))
    with pytest.raises(ValueError, match=message):
        reward(outcome(["x", "y", "z"]))


def test_a_sum_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="the sum of a, b overflows: use smaller weights"):
        total((1e38, [3.0]), (1e38, [3.0]))(outcome(["x"]))


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        ((), (), "0 rewards with 0 weights: give at least one reward"),
        ((FormatPenalty(),), (1.0, 2.0), "1 rewards with 2 weights: .*one weight for each"),
        ((LengthPenalty(8), LengthPenalty(9)), (1.0, 1.0), "name 'length' is used twice: remove one"),
        ((FormatPenalty(),), (np.nan,), "weight of reward 'format' is nan: set it to a finite number"),
        ((FormatPenalty(),), (-np.inf,), "weight of reward 'format' is -inf"),
        ((Fixed(3, [0.0]),), (1.0,), "reward Fixed.* has no name: give its class a __name__ property"),
        ((object(),), (1.0,), "reward <object.*has no name"),
    ],
)
def test_a_bad_sum_is_refused(rewards, weights, message):
    with pytest.raises(ValueError, match=message):
        WeightedSum(rewards, weights)
