"""Turn actions that are lists into catalogue rows: titles by the retriever's best hit, candidates by their numbers.

The rules are the same in training and evaluation.

Lists of items: each title is grounded to the retriever's first hit. A title without a hit, or whose hit scores at most
`format.floor`, is left out. A row that is named twice counts at its first place. Where rankings leave out the history's
items (see `environment.excludes_history`), lists leave them out, too, and later items move up.

Edits of a history: titles are grounded in the same way. "more like" adds a row with weight 1, and "less like" adds it
with weight -1. The history's own rows have weight 1. The weights of one row are added, so that "less like" removes an
item of the history.

Orders of candidates: a number counts at its first place, and unknown numbers are left out. Candidates that the action
does not name follow in their original order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from retrievers import Query, Retriever


def ground(retriever: Retriever, lists: Sequence[Sequence[str]], floor: float) -> tuple[list[list[int]], float]:
    """Ground lists of titles, with one search for all distinct titles.

    retriever: searches for the titles.
    lists: lists of titles.
    floor: a title whose best hit scores at most this is not grounded.

    Returns one list of distinct rows for each list of titles, in order, and the share of titles that were not grounded.
    Raises what the retriever raises.
    """
    row_of = ground_titles(retriever, [title for titles in lists for title in titles], floor)
    grounded = [list(dict.fromkeys(row_of[title] for title in titles if title in row_of)) for titles in lists]
    total = sum(len(titles) for titles in lists)
    missed = sum(title not in row_of for titles in lists for title in titles)
    return grounded, missed / max(1, total)


def ground_titles(retriever: Retriever, titles: Sequence[str], floor: float) -> dict[str, int]:
    """The row of each title that can be grounded. Arguments and errors are those of :func:`ground`."""
    distinct = list(dict.fromkeys(titles))
    hits = retriever.search([Query(title) for title in distinct], 1)
    return {
        title: int(row)
        for title, row, score in zip(distinct, hits.rows[:, 0], hits.scores[:, 0], strict=True)
        if row >= 0 and score > floor
    }


def edited(history: Sequence[int], titles: Sequence[str], weights: Sequence[float], row_of: Mapping[str, int]) -> Query:
    """The query of an edited history, by the rules above.

    history: rows, oldest first. They alone count as seen.
    titles, weights: the titles of the edit, and the weight of each.
    row_of: the row of each grounded title.
    """
    own = tuple(dict.fromkeys(int(row) for row in history))
    added = dict.fromkeys(
        (row_of[title], weight) for title, weight in zip(titles, weights, strict=True) if title in row_of
    )
    rows, signs = (*own, *(row for row, _ in added)), (*(1.0 for _ in own), *(weight for _, weight in added))
    return Query("", rows, signs, own)


def reorder(order: Sequence[int], candidates: Sequence[int]) -> list[int] | None:
    """The candidates in a new order.

    order: numbers of candidates, from 1.
    candidates: the candidates' rows.

    Returns all the rows, or None where no number is that of a candidate: the completion is then malformed.
    """
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
    """The ranks of targets in a list.

    rows: the rows of the list, best first.
    targets: (T,) rows, -1 = padding.

    Returns (T,) int32 ranks from 1; 0 = not in the list.
    """
    place = {row: rank for rank, row in enumerate(rows, 1)}
    return np.array([place.get(int(t), 0) if t >= 0 else 0 for t in targets], np.int32)
