"""The types of this package: what a reward reads, and what a reward is.

Shapes: B completions, T judged targets per completion.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Action(Protocol):
    """What was parsed from a completion. Rewards read its text only.

    This is a protocol: `retrievers.Query`, and any tuple or dataclass with a `text`, satisfies it without being
    imported here. An action that is a list of items instead of a text has `text == ""`.
    """

    @property
    def text(self) -> str:
        """The query that was sent to the retriever."""
        ...


def split_at_blanks(text: str) -> list[str]:
    """The casefolded words of ``text``, which white space separates."""
    return text.casefold().split()


@dataclass(frozen=True)
class Outcome:
    """B completions with the actions, ranks and grades that a reward may read.

    completions: B strings, as the policy wrote them.
    actions: B parsed actions; None = the completion is malformed.
    ranks: (B, T) int32, the rank of each target, from 1; 0 = not retrieved, or padding. Ranks above 0 are distinct
        within a row. All ranks of a malformed completion are 0.
    grades: (B, T) float32, how relevant each target is; 0 = padding, or judged not relevant.
    words: a picklable function, text -> its words, for rewards that count or compare words. By default, white space
        separates words. Training passes the function of the `bm25` retriever, which also splits scripts without spaces.
    raw_ranks: (B, T) int32, the ranks of the same targets for the raw query. Only `lift` and `harm` read them; None
        where the weighted sum has neither.
    queries: B raw queries. Only `stuffing` reads them; () where they are not known.
    written: B texts, the words that the policy itself wrote into its action, without the query that some formats add;
        "" where the completion is malformed. Only `stuffing` reads them; () where they are not known.
    """

    completions: Sequence[str]
    actions: Sequence[Action | None]
    ranks: np.ndarray
    grades: np.ndarray
    words: Callable[[str], Sequence[str]] = split_at_blanks
    raw_ranks: np.ndarray | None = None
    queries: Sequence[str] = ()
    written: Sequence[str] = ()


Reward = Callable[[Outcome], np.ndarray]
"""A function with a `__name__`: Outcome -> (B,) float32, one number per completion; NaN = the reward does not apply.

The number of a completion must depend on its own row only. It must not be infinite: TRL does not check for infinity,
and one infinite reward makes the advantages of its whole group NaN.
"""
