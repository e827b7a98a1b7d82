"""From an answer that is a list to catalogue rows: titles by the retriever's best hit, candidates by their numbers.

Rules, the same in training and evaluation. Items: each is grounded to the retriever's first hit; one whose hit scores
`format.floor` or less, or that has no hit, is left out; a row named twice counts at its first place; where rankings
leave out the history's items (see `environment.excludes_history`), so do lists, and what follows moves up. Edits of a
history: titles are grounded likewise; "more like" adds its row with weight 1, "less like" with -1, the history's own
rows weigh 1, and what is said of one row adds up: less of something bought takes it out. Candidates: a number counts
at its first place; unknown numbers are left out; candidates that the answer does not name follow in the order they
were given, as whoever serves the list would show them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from retrievers import Query, Retriever


def ground(retriever: Retriever, lists: Sequence[Sequence[str]], floor: float) -> tuple[list[list[int]], float]:
    """Lists of titles -> lists of distinct rows, in order; and the share of titles that were not grounded.

    One search for all distinct titles. Raises what the retriever raises.
    """
    row_of = ground_titles(retriever, [title for titles in lists for title in titles], floor)
    grounded = [list(dict.fromkeys(row_of[title] for title in titles if title in row_of)) for titles in lists]
    total = sum(len(titles) for titles in lists)
    missed = sum(title not in row_of for titles in lists for title in titles)
    return grounded, missed / max(1, total)


def ground_titles(retriever: Retriever, titles: Sequence[str], floor: float) -> dict[str, int]:
    """Title -> the row it stands for, for those that stand for one. One search for all. Raises what the retriever
    raises."""
    distinct = list(dict.fromkeys(titles))
    hits = retriever.search([Query(title) for title in distinct], 1)
    return {
        title: int(row)
        for title, row, score in zip(distinct, hits.rows[:, 0], hits.scores[:, 0], strict=True)
        if row >= 0 and score > floor
    }


def edited(history: Sequence[int], titles: Sequence[str], weights: Sequence[float], row_of: Mapping[str, int]) -> Query:
    """The history with what an answer adds to it; see the rules above. What is seen remains the history alone."""
    own = tuple(dict.fromkeys(int(row) for row in history))
    added = dict.fromkeys(
        (row_of[title], weight) for title, weight in zip(titles, weights, strict=True) if title in row_of
    )
    rows, signs = (*own, *(row for row, _ in added)), (*(1.0 for _ in own), *(weight for _, weight in added))
    return Query("", rows, signs, own)


def reorder(order: Sequence[int], candidates: Sequence[int]) -> list[int] | None:
    """Numbers from 1 and the candidates' rows -> all these rows in the new order. None where no number is known:
    malformed."""
    named = list(dict.fromkeys(n for n in order if 1 <= n <= len(candidates)))
    if not named:
        return None
    rest = [n for n in range(1, len(candidates) + 1) if n not in set(named)]
    return [int(candidates[n - 1]) for n in (*named, *rest)]


def without(rows: Sequence[int], history: Sequence[int]) -> list[int]:
    """``rows`` in their order, without those of the history."""
    own = set(map(int, history))
    return [row for row in rows if row not in own]


def list_ranks(rows: Sequence[int], targets: np.ndarray) -> np.ndarray:
    """(T,) target rows, -1 = padding -> (T,) int32 places in the list ``rows``, from 1; 0 = not in it."""
    place = {row: rank for rank, row in enumerate(rows, 1)}
    return np.array([place.get(int(t), 0) if t >= 0 else 0 for t in targets], np.int32)
