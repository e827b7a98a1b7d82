"""Rewards for the form of a completion, the reward of the Rec-R1 paper, and the weighted sum that training uses.

Shapes: B completions. Every reward here returns (B,) float32.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.lift import Lift
from rewards.ranking import RankingReward, check_k, ndcg
from rewards.types import Outcome, Reward


@dataclass(frozen=True)
class FormatPenalty:
    """-1 for a malformed completion (its action is None), else 0."""

    @property
    def __name__(self) -> str:
        return "format"

    def __call__(self, outcome: Outcome) -> np.ndarray:
        return np.where(_malformed(outcome), -1.0, 0.0).astype(np.float32)


@dataclass(frozen=True)
class LengthPenalty:
    """A penalty for long queries: 0 up to max_words words, then linearly down to -1 at 2 * max_words words or more.

    Without such a penalty a policy may stuff its queries: a released Rec-R1 model writes up to 182 words. The linear
    ramp follows the soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476), which counts tokens of the
    completion instead of words of the query. A malformed completion has no action, so the words of the whole
    completion are counted; otherwise one that never closes its tag would not be penalised.

    Raises ValueError when built with a bad max_words.
    """

    max_words: int = 32  # Up to so many words of the query are not penalised. `Outcome.words` splits the text.

    def __post_init__(self) -> None:
        _check_max_words(self.max_words)

    @property
    def __name__(self) -> str:
        return "length"

    def __call__(self, outcome: Outcome) -> np.ndarray:
        texts = (
            completion if action is None else action.text
            for completion, action in zip(outcome.completions, outcome.actions, strict=True)
        )
        return np.array([_overlong(len(outcome.words(text)), self.max_words) for text in texts], dtype=np.float32)


@dataclass(frozen=True)
class RepetitionPenalty:
    """Minus the share of repeated words in the action's text: -(1 - distinct words / all words), in (-1, 0].

    `Outcome.words` splits the text. The value is 0 for an empty text and for a malformed completion, which has no
    action; FormatPenalty and LengthPenalty apply to malformed completions.
    """

    @property
    def __name__(self) -> str:
        return "repetition"

    def __call__(self, outcome: Outcome) -> np.ndarray:
        words = [[] if action is None else outcome.words(action.text) for action in outcome.actions]
        return np.array([0.0 - repeated(w) for w in words], dtype=np.float32)


@dataclass(frozen=True)
class StuffingPenalty:
    """A floor against copying and stuffing: 0 for an honest query, down to -1 for one that copies or stuffs.

    It judges the words that the policy itself wrote, and is the lowest of three penalties:

    - -1 for a copy of the raw query: the written words are the query's words and no others, however often;
    - 0 up to max_words words, then linearly down to -1 at twice as many, as in LengthPenalty;
    - 0 while at most the share max_repeated of the words repeats an earlier one, then linearly down to -1 at a share
      of 1.

    LengthPenalty and RepetitionPenalty count the whole query that is sent, in which some formats repeat the raw query.
    Here such a format costs nothing. The value is 0 where the policy wrote nothing, for a malformed completion, and for
    lists, orders and edits, whose length the format limits.

    Raises ValueError when built with a bad parameter, and when called with an outcome without `queries` or `written`.
    """

    max_words: int = 32  # Up to so many written words are not penalised. `Outcome.words` splits the text.
    max_repeated: float = 0.5  # Up to this share of repeated words is not penalised; from 0 up to, but not, 1.

    def __post_init__(self) -> None:
        _check_max_words(self.max_words)
        share = self.max_repeated
        number = isinstance(share, int | float) and not isinstance(share, bool) and math.isfinite(share)
        if not number or not 0 <= share < 1:
            raise ValueError(
                f"max_repeated must be at least 0 and below 1, got {share!r}: "
                "set it to the share of repeated words that is not penalised, such as 0.5"
            )

    @property
    def __name__(self) -> str:
        return "stuffing"

    def __call__(self, outcome: Outcome) -> np.ndarray:
        total = len(outcome.completions)
        if len(outcome.queries) != total or len(outcome.written) != total:
            raise ValueError(
                "stuffing: the outcome has no queries or no written words: pass one of each per completion"
            )
        values = [
            0.0 if action is None or not action.text else self.of(outcome.words(written), outcome.words(query))
            for action, written, query in zip(outcome.actions, outcome.written, outcome.queries, strict=True)
        ]
        return np.array(values, dtype=np.float32)

    def of(self, written: Sequence[str], query: Sequence[str]) -> float:
        """The penalty of one completion, from its words and those of its raw query."""
        if is_copy(written, query):
            return -1.0
        excess = (repeated(written) - self.max_repeated) / (1.0 - self.max_repeated)
        return min(_overlong(len(written), self.max_words), 0.0 - max(0.0, excess))


def repeated(words: Sequence[str]) -> float:
    """The share of ``words`` that repeats an earlier one, in [0, 1); 0 without a word."""
    return 1.0 - len(set(words)) / len(words) if words else 0.0


def is_copy(written: Sequence[str], query: Sequence[str]) -> bool:
    """Whether the written words are those of the query and no others, in any order and however often."""
    return bool(written) and set(written) == set(query)


def _overlong(words: int, max_words: int) -> float:
    """0 up to max_words words, then linearly down to -1 at 2 * max_words words or more."""
    return min(0.0, max(-1.0, 1.0 - words / max_words))


def _check_max_words(max_words: object) -> None:
    """Raise ValueError for anything but an integer of at least 1."""
    if isinstance(max_words, bool) or not isinstance(max_words, int) or max_words < 1:
        raise ValueError(
            f"max_words must be an integer >= 1, got {max_words!r}: "
            "set it to the number of words up to which a query is not penalised, such as 32"
        )


@dataclass(frozen=True)
class RecR1:
    """The reward in the released code of the Rec-R1 paper (Lin et al. 2025, arXiv:2503.24289).

    A malformed completion gets -2, whether or not a target is relevant. A well-formed one gets 0.1 + ndcg@k with
    linear gain where ndcg@k > 0, else 0; NaN where no target is relevant.

    Raises ValueError when built with a bad k.
    """

    k: int = 1000  # ndcg reads the first k ranks; an integer >= 1. The default is the paper's value in training.

    def __post_init__(self) -> None:
        check_k(self.k)

    @property
    def __name__(self) -> str:
        return f"rec_r1@{self.k}"

    def __call__(self, outcome: Outcome) -> np.ndarray:
        score = ndcg(outcome.ranks, outcome.grades, self.k).astype(np.float64)
        shaped = np.where(score > 0, 0.1 + score, score)  # NaN > 0 is False, so NaN stays NaN
        return np.where(_malformed(outcome), -2.0, shaped).astype(np.float32)


@dataclass(frozen=True)
class WeightedSum:
    """A weighted sum of named rewards, which is itself a reward. A policy is trained on this sum.

    rewards: at least one reward; their `__name__`s must differ.
    weights: one finite number per reward, in the same order.

    Raises ValueError when built with anything else.
    """

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.rewards or len(self.rewards) != len(self.weights):
            raise ValueError(
                f"{len(self.rewards)} rewards with {len(self.weights)} weights: "
                "give at least one reward, and one weight for each"
            )
        names = self.names
        for name, weight in zip(names, self.weights, strict=True):
            if names.count(name) > 1:
                raise ValueError(f"reward name {name!r} is used twice: remove one, or rename it by __name__")
            if not np.isfinite(weight):
                raise ValueError(f"weight of reward {name!r} is {weight}: set it to a finite number")

    @property
    def __name__(self) -> str:
        return "weighted_sum"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the rewards, in order. They are the keys of :meth:`components`."""
        return tuple(_name(reward) for reward in self.rewards)

    @property
    def ranking_names(self) -> tuple[str, ...]:
        """The names of the rewards that are ranking metrics. The best value of each is 1."""
        return tuple(_name(reward) for reward in self.rewards if isinstance(reward, RankingReward))

    @property
    def reads_raw(self) -> bool:
        """Whether one of the rewards compares with the raw query, so that an outcome needs `raw_ranks`."""
        return any(isinstance(reward, Lift) for reward in self.rewards)

    def components(self, outcome: Outcome) -> dict[str, np.ndarray]:
        """The unweighted value of each reward, for the log: name -> (B,) float32.

        Raises ValueError, naming the reward, where one returns anything but B numbers, or infinity.
        """
        total = len(outcome.completions)
        parts = zip(self.names, self.rewards, strict=True)
        return {name: _checked(name, reward(outcome), total) for name, reward in parts}

    def combine(self, components: Mapping[str, np.ndarray]) -> np.ndarray:
        """The weighted sum of ``components``, as :meth:`components` returns them: (B,) float32.

        A NaN means that the reward does not apply, and the sum leaves it out. Where all rewards are NaN, the sum is
        NaN, and TRL leaves the completion out of its group. A reward of weight 0 counts as one that applies.

        Raises ValueError for a missing component, and where large weights overflow float32.
        """
        missing = [name for name in self.names if name not in components]
        if missing:
            raise ValueError(f"no component {missing[0]!r}: pass the return value of this sum's `components`")
        values = np.stack([components[name] for name in self.names]).astype(np.float64)  # (rewards, B)
        weights = np.asarray(self.weights, dtype=np.float64)[:, None]
        total = np.where(np.isnan(values), 0.0, values * weights).sum(axis=0)
        if (np.abs(total) > np.finfo(np.float32).max).any():
            raise ValueError(f"the sum of {', '.join(self.names)} overflows: use smaller weights")
        return np.where(np.isnan(values).all(axis=0), np.nan, total).astype(np.float32)

    def __call__(self, outcome: Outcome) -> np.ndarray:
        return self.combine(self.components(outcome))


def _malformed(outcome: Outcome) -> np.ndarray:
    """(B,) bool: which completions are malformed."""
    return np.array([action is None for action in outcome.actions], dtype=bool)


def _name(reward: Reward) -> str:
    name = getattr(reward, "__name__", None)
    if not isinstance(name, str):
        raise ValueError(f"reward {reward!r} has no name: give its class a __name__ property")
    return name


def _checked(name: str, values: object, total: int) -> np.ndarray:
    """The return value of a reward as (total,) float32. Raises ValueError for another shape, type or infinity."""
    try:
        with np.errstate(over="ignore"):  # an overflow becomes inf, which is refused below
            array = np.array(values, dtype=np.float32)  # A copy: the caller sets NaN where the retriever failed.
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward {name!r} must return {total} numbers: {error}") from error
    if array.shape != (total,):
        raise ValueError(f"reward {name!r} returned shape {array.shape}: return one number per completion, ({total},)")
    if np.isinf(array).any():
        raise ValueError(f"reward {name!r} returned infinity: return NaN where it does not apply, else clip it")
    return array
