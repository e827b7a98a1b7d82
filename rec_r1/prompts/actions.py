"""What is parsed from a completion."""

from __future__ import annotations

from typing import NamedTuple

from rec_r1.prompts.structured import as_json
from retrievers import Structured


class Action(NamedTuple):
    """What was parsed from a well-formed completion.

    text: the query that is sent to the retriever, or "" where the action is a list.
    written: the model's own words.
    items: the titles of a list or of an edit, best first.
    order: the numbers of candidates, from 1, best first.
    weights: for an edit of the history, one number for each of ``items``: 1 = wished for, -1 = unwanted.
    structured: the query in parts, whose words are ``text`` and ``written``. None = the query is ``text``.
    """

    text: str
    written: str
    items: tuple[str, ...] = ()
    order: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    structured: Structured | None = None


def sent(action: Action) -> str:
    """An action as one text: the query that is sent, one in parts as JSON, or the list as the model wrote it."""
    return action.text or action.written if action.structured is None else as_json(action.structured)


def counted(text: str, query: str) -> str:
    """``text`` for people: a query that ``text`` repeats at its beginning is written once, with its number.

    "lecturer lecturer lecturer teacher" is "lecturer (×3) teacher" for the query "lecturer".
    """
    rest, count = text, 0
    while query and (rest == query or rest.startswith(f"{query} ")):
        rest, count = rest[len(query) + 1 :], count + 1
    return f"{query} (×{count}) {rest}".rstrip() if count > 1 else text
