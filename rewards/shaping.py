"""Rewards for the shape of an answer, the paper's shaping, and the sum that training sees.

Shapes: B completions; every reward here returns (B,) float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rewards.lift import Lift
from rewards.ranking import RankingReward, check_k, ndcg
from rewards.types import Outcome, Reward


@dataclass(frozen=True)
class FormatPenalty:
    """-1 where the completion is malformed (its action is None), else 0."""

    @property
    def __name__(self) -> str:
        return "format"

    def __call__(self, outcome: Outcome) -> np.ndarray:
        return np.where(_malformed(outcome), -1.0, 0.0).astype(np.float32)


@dataclass(frozen=True)
class LengthPenalty:
    """0 up to max_words words of the action's text, then falls linearly to -1 at 2 * max_words and stays.

    max_words: words as the outcome splits them; an integer >= 1, else ValueError.

    A malformed completion has no action, so the completion itself is measured: a runaway answer that never
    closes its tag must not escape. Against query stuffing: a released Rec-R1 model answers with up to 182
    words, since nothing measured length. The linear ramp is the one of soft overlong punishment in DAPO
    (Yu et al. 2025, arXiv:2503.14476), in words of the query instead of tokens of the completion.
    """

    max_words: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.max_words, bool) or not isinstance(self.max_words, int) or self.max_words < 1:
            raise ValueError(
                f"max_words must be an integer >= 1, got {self.max_words!r}: "
                "set it to the longest query in words that goes unpunished, such as 32"
            )

    @property
    def __name__(self) -> str:
        return "length"

    def __call__(self, outcome: Outcome) -> np.ndarray:
        texts = (
            completion if action is None else action.text
            for completion, action in zip(outcome.completions, outcome.actions, strict=True)
        )
        words = np.array([len(outcome.words(text)) for text in texts], dtype=np.float64)
        return np.clip(1.0 - words / self.max_words, -1.0, 0.0).astype(np.float32)


@dataclass(frozen=True)
class RepetitionPenalty:
    """Minus the share of repeated words in the action's text, -(1 - distinct / total), in (-1, 0].

    Words are those the outcome splits the text into, without case. 0 for an empty text, and for a malformed
    completion, which has no action: FormatPenalty and LengthPenalty deal with those.
    """

    @property
    def __name__(self) -> str:
        return "repetition"

    def __call__(self, outcome: Outcome) -> np.ndarray:
        words = [[] if action is None else outcome.words(action.text) for action in outcome.actions]
        return np.array([len(set(w)) / len(w) - 1.0 if w else 0.0 for w in words], dtype=np.float32)


@dataclass(frozen=True)
class RecR1:
    """The shaping of the Rec-R1 paper's released code (Lin et al. 2025, arXiv:2503.24289), in one function.

    Malformed: -2. Well-formed: 0.1 + ndcg@k where ndcg@k > 0, else 0. NaN where the completion is well-formed
    and nothing was judged relevant; a malformed one is -2 even there. Linear gain; k = 1000 is the paper's
    depth in training. Raises ValueError for a k that is not an integer >= 1.
    """

    k: int = 1000

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
    """A weighted sum of named rewards: what training sees. Itself a reward.

    rewards: at least one, each with its own `__name__`. weights: one finite number a reward, same order.
    Raises ValueError when built otherwise.
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
        """Names of the rewards, in order: the keys of `components`."""
        return tuple(_name(reward) for reward in self.rewards)

    @property
    def ranking_names(self) -> tuple[str, ...]:
        """Names of the rewards that are ranking metrics, whose best value is 1."""
        return tuple(_name(reward) for reward in self.rewards if isinstance(reward, RankingReward))

    @property
    def reads_raw(self) -> bool:
        """Whether a reward of the sum compares with the raw query, and so needs an outcome's `raw_ranks`."""
        return any(isinstance(reward, Lift) for reward in self.rewards)

    def components(self, outcome: Outcome) -> dict[str, np.ndarray]:
        """Each reward on its own and unweighted, for the log: name -> (B,) float32.

        Raises ValueError that names the reward when one returns anything but B numbers, or infinity.
        """
        total = len(outcome.completions)
        parts = zip(self.names, self.rewards, strict=True)
        return {name: _checked(name, reward(outcome), total) for name, reward in parts}

    def combine(self, components: Mapping[str, np.ndarray]) -> np.ndarray:
        """The weighted sum of `components`, (B,) float32.

        Parts that are NaN do not apply and are left out; a row where all are NaN is NaN, which tells TRL to
        leave it out of its group. A reward of weight 0 still counts as one that applies.
        Raises ValueError for a missing component, and where large weights overflow float32.
        """
        missing = [name for name in self.names if name not in components]
        if missing:
            raise ValueError(f"no component {missing[0]!r}: pass what `components` of this sum returned")
        values = np.stack([components[name] for name in self.names]).astype(np.float64)  # (rewards, B)
        weights = np.asarray(self.weights, dtype=np.float64)[:, None]
        total = np.where(np.isnan(values), 0.0, values * weights).sum(axis=0)
        if (np.abs(total) > np.finfo(np.float32).max).any():
            raise ValueError(f"the sum of {', '.join(self.names)} overflows: use smaller weights")
        return np.where(np.isnan(values).all(axis=0), np.nan, total).astype(np.float32)

    def __call__(self, outcome: Outcome) -> np.ndarray:
        return self.combine(self.components(outcome))


def _malformed(outcome: Outcome) -> np.ndarray:
    """(B,) bool."""
    return np.array([action is None for action in outcome.actions], dtype=bool)


def _name(reward: Reward) -> str:
    name = getattr(reward, "__name__", None)
    if not isinstance(name, str):
        raise ValueError(f"reward {reward!r} has no name: give its class a __name__ property")
    return name


def _checked(name: str, values: object, total: int) -> np.ndarray:
    """What a reward returned, as (total,) float32 without infinities."""
    try:
        with np.errstate(over="ignore"):  # becomes inf, which is refused below with the reward's name
            array = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward {name!r} must return {total} numbers: {error}") from error
    if array.shape != (total,):
        raise ValueError(f"reward {name!r} returned shape {array.shape}: return one number a completion, ({total},)")
    if np.isinf(array).any():
        raise ValueError(f"reward {name!r} returned infinity: return NaN where it does not apply, else clip it")
    return array
