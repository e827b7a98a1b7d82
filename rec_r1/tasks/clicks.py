"""From events, such as clicks and purchases, to grades; with inverse-propensity weights against position bias."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

COMBINATIONS = ("best", "sum", "rate")


@dataclass
class Counts:
    """The events of one pair of query and item. events: name -> weighted number. impressions: how often the item was
    shown, not weighted."""

    events: dict[str, float] = field(default_factory=dict)
    impressions: float = 0.0

    def add(self, event: str, number: float, weight: float = 1.0) -> None:
        """Count ``number`` events of one name, each ``weight`` times."""
        self.events[event] = self.events.get(event, 0.0) + number * weight


def position_propensity(position: int, eta: float) -> float:
    """How likely a result is examined at a position.

    position: counted from 1.
    eta: how steep position bias is. 0 is none, and 1 is usual.

    Returns (1 / position)^eta, the model of Joachims, Swaminathan and Schnabel, "Unbiased Learning-to-Rank with Biased
    Feedback", WSDM 2017.

    Example: position_propensity(4, 1.0) is 0.25.
    """
    return (1.0 / position) ** eta


def inverse_weight(propensity: float, clip: float) -> float:
    """The weight of an event at a position that is examined with probability ``propensity``.

    propensity: above 0, up to 1.
    clip: the lowest propensity, above 0, up to 1; lower ones are raised to it. 1 gives every event a weight of 1. A
        lower clip has less bias and more variance.

    Returns 1 / max(clip, propensity): the inverse-propensity weight of Joachims, Swaminathan and Schnabel (WSDM 2017),
    with clipped propensities. Where clicks are examination times relevance, and nothing is clipped, the expected sum of
    the weights of a pair's clicks is its relevance times how often it was shown.

    Example: inverse_weight(0.25, 0.1) is 4.0, and inverse_weight(0.01, 0.1) is 10.0.
    """
    return 1.0 / max(clip, propensity)


@dataclass(frozen=True)
class Grading:
    """How a pair's events become its grade.

    grades: event -> its grade; other events are ignored.
    combine: best is the highest grade of an event that happened. sum adds the grades of all events. rate is that sum
        divided by the pair's impressions, as in a click-through rate.
    min_count: events of one name count only if a pair has at least so many of them, after weighting.
    levels: rising thresholds: the grade becomes the number of them that the result of ``combine`` reaches. None keeps
        the result.
    """

    grades: Mapping[str, float]
    combine: str = "best"
    min_count: float = 1.0
    levels: Sequence[float] | None = None

    def grade(self, counts: Counts) -> float | None:
        """The grade of one pair, from 0. None for a rate of a pair with events and without impressions.

        Example: Grading({"click": 1, "purchase": 3}).grade(Counts({"click": 7, "purchase": 1})) is 3.
        """
        enough = {
            event: number
            for event, number in counts.events.items()
            if event in self.grades and number >= self.min_count and number > 0
        }
        if self.combine == "best":
            value = max((self.grades[event] for event in enough), default=0.0)
        else:
            value = sum(self.grades[event] * number for event, number in enough.items())
        if self.combine == "rate":
            if counts.impressions <= 0:
                return None if value else 0.0
            value /= counts.impressions
        return float(value if self.levels is None else bisect_right(self.levels, value))
