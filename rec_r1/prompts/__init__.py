"""The prompts, and the parsers of the completions that they ask for. A change of one usually needs one of the other.

`format.action` says what the model is asked for: a query, a query in parts, a list of items, an order of candidates, or
an edit of the history. `format.answer` says how a completion is written. `line` is plain text, which a model of 135M
parameters can write. `json` is <answer>{"query": …}</answer>. `think_json` is the format of Rec-R1 (arXiv:2503.24289),
which has <think>…</think> before the JSON.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rec_r1.config import FormatConfig, UserError
from rec_r1.prompts import structured
from rec_r1.prompts.actions import Action, counted, sent
from rec_r1.prompts.completions import (
    ANSWER_END,
    ENDS,
    edit_line,
    end_of,
    parse_json,
    parse_line,
    parse_lines,
    text_of,
    up_to_end,
)
from rec_r1.prompts.templates import PLACES, PROMPTS, THINK, WRITE
from retrievers import Schema, Structured
from retrievers.text.analysis import first_words

__all__ = [
    "ACTIONS",
    "ANSWER_END",
    "ENDS",
    "GROUNDED_ACTIONS",
    "PLACES",
    "PROMPTS",
    "STYLES",
    "Action",
    "Format",
    "Prompt",
    "counted",
    "edit_line",
    "end_of",
    "parse_json",
    "parse_line",
    "parse_lines",
    "sent",
    "up_to_end",
]

Prompt = str | list[dict[str, str]]

ACTIONS = ("replace", "expand", "items", "ranking", "edit", "structured")
GROUNDED_ACTIONS = ("items", "edit")  # The actions whose titles are grounded to the catalogue.
STYLES = ("line", "json", "think_json")
_KEYS = {"replace": "query", "expand": "query", "items": "items", "ranking": "ranking", "edit": "edit"}
_EDITS = {"more_like": 1.0, "less_like": -1.0}


@dataclass(frozen=True)
class Format:
    """Makes the prompts of a recipe, and parses their completions into actions. It can be pickled.

    config: the recipe's section `format`.
    examples: pairs of a prompt and its answer, with which every prompt begins.
    schema: for `structured`: what the retriever allows. None = it is not known yet, and completions cannot be parsed.

    Raises UserError for a setting that is unknown, and for a prompt that lacks a place for the query.
    """

    config: FormatConfig
    examples: tuple[tuple[Prompt, str], ...] = ()
    schema: Schema | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (("answer", self.config.answer, STYLES), ("action", self.config.action, ACTIONS)):
            if value not in choices:
                raise UserError(f"format.{name}: {value!r}: choose from {', '.join(choices)}")
        if not any(place in self.template for place in PLACES):
            raise UserError(
                f"format.prompt: {self.template!r} lacks {{query}}: say where the query goes (other places: "
                f"{', '.join(PLACES[1:])}), or name one of {', '.join(PROMPTS)}"
            )
        if self.config.action == "ranking" and "{candidates}" not in self.template:
            raise UserError(f"format.prompt: {self.template!r} lacks {{candidates}}: a ranking needs the candidates")
        if self.config.action == "structured" and self.config.answer == "line":
            raise UserError("format.answer: line: a structured action is JSON: set format.answer=json or think_json")

    @property
    def template(self) -> str:
        """The prompt's template with {answer} replaced. It is no format string: other braces in it are plain text."""
        if self.config.prompt is not None:
            text = PROMPTS.get(self.config.prompt, self.config.prompt)
        elif self.config.action in ("items", "ranking", "edit", "structured"):
            text = PROMPTS["rerank" if self.config.action == "ranking" else self.config.action]
        else:
            text = PROMPTS["words" if self.config.answer == "line" else "sparse"]
        if self.config.action == "structured":
            write = structured.instruction(self.schema or Schema())
        else:
            write = WRITE["line" if self.config.answer == "line" else "json"][_KEYS[self.config.action]]
        return text.replace("{answer}", (THINK if self.config.answer == "think_json" else "") + write)

    def prompt(self, query: str, history: Sequence[str] = (), candidates: Sequence[str] = ()) -> Prompt:
        """The prompt for one query: a list of chat messages, or one string where `format.chat` is off.

        query: the raw query.
        history: titles, oldest first. The prompt shows the last `format.titles` of them.
        candidates: titles in the order in which they are numbered.
        """
        history = history[-self.config.titles :]
        parts = {
            "{query}": query,
            "{history}": "\n".join(f"- {self.cut(title)}" for title in history),
            "{history_line}": "; ".join(self.cut(title) for title in history),
            "{candidates}": "\n".join(f"{number}. {self.cut(title)}" for number, title in enumerate(candidates, 1)),
        }
        # All places are replaced in one pass, because a title may hold the text {query}, which must stay.
        text = re.sub("|".join(map(re.escape, parts)), lambda match: parts[match.group()], self.template)
        if not self.config.chat:
            return "\n".join([*(f"{asked} {answer}" for asked, answer in self.examples), text])
        system = [] if self.config.system is None else [{"role": "system", "content": self.config.system}]
        shown = [
            turn
            for asked, answer in self.examples
            for turn in (asked[-1], {"role": "assistant", "content": answer})
            if isinstance(turn, dict)
        ]
        return [*system, *shown, {"role": "user", "content": text}]

    def of_examples(self) -> Format:
        """The format in which examples are asked.

        Without a chat template, an example is asked with the last line of the template, such as "{query}:". The lines
        above it are examples or the instruction, which need not be repeated.
        """
        bare = dataclasses.replace(self, examples=())
        last = self.template.splitlines()[-1]
        if self.config.chat or not any(place in last for place in PLACES):
            return bare
        return dataclasses.replace(bare, config=dataclasses.replace(self.config, prompt=last))

    def write(self, parts: Sequence[str], thought: str = "") -> str:
        """A well-formed completion, for the examples of prompts and for the training data of SFT.

        parts: the texts that make up the query, or the titles of a list or an edit.
        thought: the text between <think> and </think>, where the format has these tags.

        Raises UserError for rankings, because the numbers of candidates differ between prompts.
        """
        if self.config.action == "ranking":
            raise UserError("format.action: a ranking cannot be written from titles: leave out few_shot")
        one = " ".join(" ".join(part.split()) for part in parts)
        if self.config.action == "structured":
            one = structured.shortened(one, self._known_schema())
        action = self.config.action
        if self.config.answer == "line":
            lines = [" ".join(part.split()) for part in parts]
            return "\n".join(lines) if action == "items" else f"more: {'; '.join(lines)}" if action == "edit" else one
        said: dict[str, Any] = {"query": one}
        if action in ("items", "edit"):
            said = {"items" if action == "items" else "more_like": list(parts)}
        return self._tagged(said, thought)

    def write_order(self, numbers: Sequence[int], thought: str = "") -> str:
        """A well-formed completion of a ranking.

        numbers: the numbers of candidates, from 1, best first.
        thought: as in :meth:`write`.
        """
        if self.config.answer == "line":
            return ", ".join(map(str, numbers))
        return self._tagged({"ranking": list(numbers)}, thought)

    def _tagged(self, said: dict[str, Any], thought: str) -> str:
        answer = json.dumps(said, ensure_ascii=False)
        thinking = f"<think>{thought}</think>\n" if self.config.answer == "think_json" else ""
        return f"{thinking}<answer>{answer}</answer>"

    def cut(self, title: str) -> str:
        """A title in the form that prompts show: its first `format.title_words` words."""
        return first_words(title, self.config.title_words)

    def parse(self, completion: str, query: str) -> Action | None:
        """Parse the completion of a query's prompt.

        completion: the text that the model wrote.
        query: the raw query, which some actions keep or extend.

        Returns the action, or None where the completion is malformed.
        """
        if self.config.action == "items":
            return self._items(completion)
        if self.config.action == "ranking":
            return self._ranking(completion)
        if self.config.action == "edit":
            return self._edit(completion)
        if self.config.action == "structured":
            found = self._structured(completion)
            return None if isinstance(found, str) else Action(found.text, found.text, structured=found)
        if self.config.answer != "line":
            said = self._json(completion)
        elif self.config.keep_query:
            said = completion.partition("\n")[0]
            said = parse_line(said) if said.strip() else ""
        else:
            said = parse_line(completion)
        written = text_of(said)
        if written is None:
            empty = isinstance(said, str) and not said.strip()
            return Action(query, "") if self.config.keep_query and empty else None
        if self.config.action == "replace":
            return Action(written, written)
        return Action(" ".join([query] * self.config.repeat + [written]), written)

    def cause(self, completion: str) -> str | None:
        """Why a completion is malformed: one of `structured.MALFORMED`. None = it is not, or the action is no
        structured query, for which no causes are told apart."""
        if self.config.action != "structured":
            return None
        found = self._structured(completion)
        return found if isinstance(found, str) else None

    def _structured(self, completion: str) -> Structured | str:
        """The query in a completion, or why it is malformed."""
        return structured.read(parse_json(completion, self.config.answer == "think_json"), self._known_schema())

    def _known_schema(self) -> Schema:
        if self.schema is None:
            raise ValueError("Format.schema is not set: give retrievers.schema_of(retriever)")
        return self.schema

    def _json(self, completion: str) -> Any:
        answer = parse_json(completion, self.config.answer == "think_json")
        return None if answer is None else answer.get(_KEYS[self.config.action])

    def _items(self, completion: str) -> Action | None:
        """Parse a list of titles. Items that are no text are left out. A list without any text is malformed."""
        found = parse_lines(completion) if self.config.answer == "line" else self._json(completion)
        texts = [text_of(item) for item in found] if isinstance(found, list) else []
        items = tuple(text for text in texts if text is not None)[: self.config.max_items]
        return Action("", "\n".join(items), items=items) if items else None

    def _edit(self, completion: str) -> Action | None:
        """Parse the titles that are wished for or unwanted. A completion that names no title is malformed."""
        if self.config.answer == "line":
            lines = filter(None, map(edit_line, completion.splitlines()))
            said: Any = [(key, title.strip()) for key, titles in lines for title in titles.split(";")]
        else:
            answer = parse_json(completion, self.config.answer == "think_json") or {}
            said = [(key, title) for key in _EDITS if isinstance(answer.get(key), list) for title in answer[key]]
        named = [(key, text) for key, title in said if (text := text_of(title)) is not None][: self.config.max_items]
        if not named:
            return None
        written = "\n".join(f"{key.removesuffix('_like')}: {text}" for key, text in named)
        return Action("", written, tuple(text for _, text in named), weights=tuple(_EDITS[key] for key, _ in named))

    def _ranking(self, completion: str) -> Action | None:
        """Parse whole numbers in their order. The Scorer, which has the candidates, drops unknown numbers."""
        if self.config.answer == "line":
            line = next((line for line in completion.splitlines() if re.search(r"\d", line)), "")
            numbers: Any = [int(n) for n in re.findall(r"(?<!\d)\d{1,6}(?!\d)", line)]
        else:
            numbers = self._json(completion)
        if not isinstance(numbers, list):
            return None
        order = tuple(n for n in numbers if isinstance(n, int) and not isinstance(n, bool))
        return Action("", " ".join(map(str, order)), order=order) if order else None
