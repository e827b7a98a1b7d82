"""The nouns of this package.

Letters used for shapes throughout: B completions, T judged targets a completion.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Action(Protocol):
    """What a completion was parsed into. Rewards read its text and nothing else.

    A protocol, so that `retrievers.Query` (or any tuple or dataclass with a `text`) fits without this
    package importing it. An action that is a list of items rather than a text has `text == ""`.
    """

    @property
    def text(self) -> str:
        """The query that was sent to the retriever."""
        ...


def split_at_blanks(text: str) -> list[str]:
    """What stands between white space, without case."""
    return text.casefold().split()


@dataclass(frozen=True)
class Outcome:
    """What came of B completions: all a reward may look at.

    completions: B strings, as generated.
    actions: B parsed actions; None = malformed, the parser refused the completion.
    ranks: (B, T) int32, where each target stands in the ranking, from 1; 0 = not retrieved, or padding.
        Ranks above 0 are distinct within a row; a malformed completion retrieved nothing, so all 0.
    grades: (B, T) float32, how relevant each target is; 0 = padding, or judged not relevant.
    words: text -> its words, for rewards that count or compare them. Training hands over the words that the `bm25`
        retriever indexes, which knows scripts without spaces. Picklable.
    raw_ranks: (B, T) int32, `ranks` of what the user asked, in place of what the completion asks. None where no reward
        of the sum reads them (`lift`, `harm`).
    """

    completions: Sequence[str]
    actions: Sequence[Action | None]
    ranks: np.ndarray
    grades: np.ndarray
    words: Callable[[str], Sequence[str]] = split_at_blanks
    raw_ranks: np.ndarray | None = None


Reward = Callable[[Outcome], np.ndarray]
"""(B,) float32, one number a completion, by row alone; NaN = does not apply to this completion.

Named by its `__name__`. Never infinite: TRL does not guard against it, and one inf spoils its whole group.
"""
