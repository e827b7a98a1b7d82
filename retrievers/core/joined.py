"""Warnings about an index that is joined with the catalogue by id, where one of them lacks documents of the other."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import islice

logger = logging.getLogger(__name__)
NAMED = 3  # Messages name at most this many ids.


def named(ids: Iterable[str]) -> str:
    """The first ids, as a message shows them."""
    return ", ".join(map(repr, islice(ids, NAMED)))


def warn(where: str, ids: Sequence[str], absent: Sequence[int], foreign: int = 0, first: Sequence[str] = ()) -> None:
    """Log a warning about the documents that one side lacks.

    where: the index.
    ids: those of the catalogue.
    absent: the rows of the catalogue that the index lacks, ascending.
    foreign: how many documents of the index the catalogue lacks. The default is 0.
    first: the ids of the first of these.
    """
    if absent:
        logger.warning(
            "%s lacks %d of the %d documents of the catalogue, which it therefore never retrieves; the first: %s",
            where, len(absent), len(ids), named(ids[row] for row in absent),
        )  # fmt: skip
    if foreign:
        logger.warning(
            "%s holds %d documents that the catalogue lacks, which are left out of every ranking; the first: %s",
            where, foreign, named(first),
        )  # fmt: skip
