"""Read what a completion holds: lines, JSON, an edit. Nothing here knows what an action means."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from rec_r1.config import FormatConfig
from retrievers.text.analysis import words

_LIST_MARK = re.compile(r"^\s*(?:[-*•]|\d+[.)])(?:\s+|$)")
MAX_BRACKETS = 500  # An answer with more opening brackets is malformed in every format.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_EDIT_HEAD = re.compile(r"(more|less)(?:[ _]like)?", re.IGNORECASE | re.ASCII)


def parse_line(completion: str) -> str | None:
    """The first line that holds a word, without its list mark. None where no line holds a word."""
    return next(iter(parse_lines(completion)), None)


def parse_lines(completion: str) -> list[str]:
    """Every line that holds a word, without its list mark."""
    lines = (_LIST_MARK.sub("", line).strip() for line in completion.splitlines())
    return [line for line in lines if words(line)]


def parse_json(completion: str, thinking: bool) -> dict[str, Any] | None:
    """The JSON object in the `<answer>{…}</answer>` of a completion.

    completion: the completion's text.
    thinking: whether `<think>…</think>` must come first.

    Returns None where a tag is missing, repeated or out of order, and where the JSON is broken or no object.
    """
    # A regular expression with several \s* takes quadratic time on many blanks. String methods take linear time.
    text, thought = completion.strip(), ""
    if thinking:
        if not text.startswith("<think>"):
            return None
        thought, _, rest = text.removeprefix("<think>").partition("</think>")
        text = rest.lstrip()
    if not (text.startswith("<answer>") and text.endswith("</answer>")):
        return None
    written = text.removeprefix("<answer>").removesuffix("</answer>")
    if any(tag in part for part in (thought, written) for tag in TAGS):
        return None
    # Deep nesting raises RecursionError, and so do finalizers of other objects that happen to run at that depth.
    if written.count("[") + written.count("{") > MAX_BRACKETS:
        return None
    try:
        answer = json.loads(written)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def edit_line(line: str) -> tuple[str, str] | None:
    """The key of `_EDITS` and the titles in a line such as "- more like: title; title". None for any other line."""
    text = line.lstrip()
    if text.startswith(("-", "*", "•")):
        text = text[1:].lstrip()
    head, colon, titles = text.partition(":")
    match = _EDIT_HEAD.fullmatch(head.rstrip()) if colon else None
    return None if match is None else (f"{match[1].lower()}_like", titles)


def text_of(value: Any) -> str | None:
    """``value`` if it is valid text that holds a word, else None.

    JSON can hold one half of a surrogate pair (\\ud83d), which can be written to no file and no index.
    """
    if not isinstance(value, str) or not words(value):
        return None
    try:
        value.encode()
    except ValueError:
        return None
    return value


ANSWER_END = "</answer>"
# Functions by name that say whether the text generated so far holds the whole action. Generation stops there. After a
# line or an order of numbers the parser would ignore further text, and text after </answer> would make the completion
# malformed.
ENDS: dict[str, Callable[[str], bool]] = {
    "line": lambda text: bool(parse_lines(text.rpartition("\n")[0])),  # The first line that holds a word is complete.
    "first line": lambda text: "\n" in text,  # The first line is complete. An empty one keeps the query.
    "numbers": lambda text: any(re.search(r"\d", line) for line in text.rpartition("\n")[0].splitlines()),
    "tag": lambda text: ANSWER_END in text,
}


def end_of(config: FormatConfig) -> str | None:
    """The key of ENDS for a format. None for lists and edits in lines, because another line may always follow."""
    if config.answer != "line":
        return "tag"
    if config.action == "ranking":
        return "numbers"
    if config.action in ("items", "edit"):
        return None
    return "first line" if config.keep_query else "line"


def up_to_end(completion: str, end: str | None) -> str:
    """A completion up to the end of its action, where the generation of a policy stops.

    completion: the text of a model that generated beyond that end.
    end: a key of ENDS. None = no such end: the completion is returned as it is.
    """
    if end is None:
        return completion
    place = 0
    separator = ANSWER_END if end == "tag" else "\n"
    for part in completion.split(separator)[:-1]:
        place += len(part) + len(separator)
        if ENDS[end](part + separator):
            return completion[:place]
    return completion
