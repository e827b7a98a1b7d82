"""A prompt and the parser of its answer, kept together: one cannot change without the other.

`line` asks for one line of plain words: what a model of 135M parameters can do. `think_json` is the answer
format of Rec-R1 (arXiv:2503.24289): <think>…</think><answer>{"query": …}</answer>.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from rec_r1.config import FormatConfig, UserError


class Action(NamedTuple):
    """A completion that could be read. ``text``: the query that is sent; ``written``: the model's own part."""

    text: str
    written: str


Prompt = str | list[dict[str, str]]

_WORD = re.compile(r"\w")
_LIST_MARK = re.compile(r"^\s*(?:[-*•]|\d+[.)])(?:\s+|$)")
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_THINK_JSON = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


def parse_line(completion: str) -> str | None:
    """The first line that holds a word, without a list mark. None where there is none."""
    for line in completion.splitlines():
        line = _LIST_MARK.sub("", line).strip()
        if _WORD.search(line):
            return line
    return None


def parse_think_json(completion: str) -> str | None:
    """The query of `<think>…</think><answer>{"query": "…"}</answer>`; None for anything else: a tag missing,
    repeated or out of order, broken JSON, a query that is not a string or holds no word."""
    match = _THINK_JSON.fullmatch(completion)
    if match is None or any(tag in part for part in match.groups() for tag in _TAGS):
        return None
    try:
        answer = json.loads(match.group(2))
        query = answer.get("query") if isinstance(answer, dict) else None
        if isinstance(query, str):
            query.encode()  # JSON can spell half a character (\ud83d), which no file and no index takes
    except (ValueError, RecursionError):  # nested brackets by the thousand are the model's failure, too
        return None
    return query if isinstance(query, str) and _WORD.search(query) else None


# answer format -> (its prompt, its parser)
ANSWERS: dict[str, tuple[str, Callable[[str], str | None]]] = {
    "line": ('Name five things related to "{query}", on one line.', parse_line),
    "think_json": (
        "You write queries for a keyword search engine (BM25 over product and document text). Rewrite the "
        "user's query so that the engine ranks what the user needs first: keep the terms that matter and add "
        "words that relevant documents are likely to contain.\n"
        "Think first, between <think> and </think>. Then give the query between <answer> and </answer>, as "
        'JSON with the single key "query".\n'
        'Example: <think>…</think><answer>{"query": "…"}</answer>\n\n'
        "User query: {query}",
        parse_think_json,
    ),
}


@dataclass(frozen=True)
class Format:
    """What the model is asked and how its answer becomes an action. Picklable."""

    config: FormatConfig

    def __post_init__(self) -> None:
        if self.config.answer not in ANSWERS:
            raise UserError(f"format.answer: {self.config.answer!r}: choose from {', '.join(ANSWERS)}")
        if "{query}" not in self.template:
            raise UserError(f"format.prompt: {self.template!r} lacks {{query}}: say where the query goes")

    @property
    def template(self) -> str:
        return self.config.prompt or ANSWERS[self.config.answer][0]

    def prompt(self, query: str) -> Prompt:
        """Chat messages, or one string where `chat` is off. The template is text, not a format string: braces
        in it, and in the query, mean themselves."""
        text = self.template.replace("{query}", query)
        if not self.config.chat:
            return text
        system = [] if self.config.system is None else [{"role": "system", "content": self.config.system}]
        return [*system, {"role": "user", "content": text}]

    def parse(self, completion: str, query: str) -> Action | None:
        """The action that ``completion`` asks for; None = malformed."""
        written = ANSWERS[self.config.answer][1](completion)
        if written is None:
            return None
        if self.config.action == "replace":
            return Action(written, written)
        return Action(" ".join([query] * self.config.repeat + [written]), written)
