"""The prompts, and the parsers of the completions that they ask for. A change of one usually needs one of the other.

`format.action` says what the model is asked for: a query, a list of items, an order of candidates, or an edit of the
history. `format.answer` says how a completion is written. `line` is plain text, which a model of 135M parameters can
write. `json` is <answer>{"query": …}</answer>. `think_json` is the format of Rec-R1 (arXiv:2503.24289), which has
<think>…</think> before the JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rec_r1.config import FormatConfig, UserError
from retrievers.text.analysis import first_words, words


class Action(NamedTuple):
    """What was parsed from a well-formed completion.

    text: the query that is sent to the retriever, or "" where the action is a list.
    written: the model's own words.
    items: the titles of a list or of an edit, best first.
    order: the numbers of candidates, from 1, best first.
    weights: for an edit of the history, one number for each of ``items``: 1 = wished for, -1 = unwanted.
    """

    text: str
    written: str
    items: tuple[str, ...] = ()
    order: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


def sent(action: Action) -> str:
    """An action as one text: the query that is sent, or the list as the model wrote it."""
    return action.text or action.written


def counted(text: str, query: str) -> str:
    """``text`` for people: a query that ``text`` repeats at its beginning is written once, with its number.

    "lecturer lecturer lecturer teacher" is "lecturer (×3) teacher" for the query "lecturer".
    """
    rest, count = text, 0
    while query and (rest == query or rest.startswith(f"{query} ")):
        rest, count = rest[len(query) + 1 :], count + 1
    return f"{query} (×{count}) {rest}".rstrip() if count > 1 else text


Prompt = str | list[dict[str, str]]

ACTIONS = ("replace", "expand", "items", "ranking", "edit")
STYLES = ("line", "json", "think_json")
PLACES = ("{query}", "{history}", "{history_line}", "{candidates}")
_LIST_MARK = re.compile(r"^\s*(?:[-*•]|\d+[.)])(?:\s+|$)")
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_KEYS = {"replace": "query", "expand": "query", "items": "items", "ranking": "ranking", "edit": "edit"}
_EDITS = {"more_like": 1.0, "less_like": -1.0}
_EDIT_HEAD = re.compile(r"(more|less)(?:[ _]like)?", re.IGNORECASE | re.ASCII)

# Prompt templates by name. {answer} is replaced by a text of `_WRITE`, which says how to write the completion.
PROMPTS = {
    "words": 'Name five things related to "{query}", on one line.',
    "sparse": (
        "You write queries for a keyword search engine (BM25 over product and document text). Rewrite the "
        "user's query so that the engine ranks what the user needs first: keep the terms that matter and add "
        "words that relevant documents are likely to contain.\n{answer}\n\nUser query: {query}"
    ),
    "dense": (
        "You write queries for a search engine that compares meanings (embeddings of queries and products). "
        "Rewrite the user's query as a short description of the product that would satisfy it: what it is, what "
        "it is for, and the properties that matter.\n{answer}\n\nUser query: {query}"
    ),
    "sequential": (
        "A customer bought these items, oldest first:\n{history}\n\nPredict what this customer buys next, and write "
        "a query for a product search engine that finds it: the kind of product, and words its title is likely to "
        "contain.\n{answer}"
    ),
    "items": (
        "A customer chose these items, oldest first:\n{history}\n\nRecommend ten items this customer is likely to "
        "choose next, by title, the likeliest first, none of those above.\n{answer}"
    ),
    "edit": (
        "A customer chose these items, oldest first:\n{history}\n\nA recommender learns from this list. Improve it: "
        "name titles of products it should take as wished for, and titles it should take as not wanted, so that it "
        "finds what this customer chooses next.\n{answer}"
    ),
    "rerank": (
        "A customer searches for: {query}\n\nThese products were found:\n{candidates}\n\nOrder all of them by how well "
        "they satisfy the customer, the best first.\n{answer}"
    ),
}
_WRITE = {
    "line": {
        "query": "Answer with the query alone, on one line.",
        "items": "Answer with one title a line and nothing else.",
        "ranking": "Answer with their numbers alone, separated by commas.",
        "edit": "Answer with two lines and nothing else:\nmore: title; title\nless: title; title",
    },
    "json": {
        "query": 'Answer with JSON, like this: <answer>{"query": "…"}</answer>',
        "items": 'Answer with JSON, like this: <answer>{"items": ["…", "…"]}</answer>',
        "ranking": 'Answer with JSON, like this: <answer>{"ranking": [3, 1, …]}</answer>',
        "edit": 'Answer with JSON, like this: <answer>{"more_like": ["…"], "less_like": ["…"]}</answer>',
    },
}
_THINK = "Think first, between <think> and </think>. "


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
    if any(tag in part for part in (thought, written) for tag in _TAGS):
        return None
    try:
        answer = json.loads(written)
    except (ValueError, RecursionError):  # Thousands of nested brackets raise RecursionError.
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


def _text(value: Any) -> str | None:
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


@dataclass(frozen=True)
class Format:
    """Makes the prompts of a recipe, and parses their completions into actions. It can be pickled.

    config: the recipe's section `format`.
    examples: pairs of a prompt and its answer, with which every prompt begins.

    Raises UserError for a setting that is unknown, and for a prompt that lacks a place for the query.
    """

    config: FormatConfig
    examples: tuple[tuple[Prompt, str], ...] = ()

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

    @property
    def template(self) -> str:
        """The prompt's template with {answer} replaced. It is no format string: other braces in it are plain text."""
        if self.config.prompt is not None:
            text = PROMPTS.get(self.config.prompt, self.config.prompt)
        elif self.config.action in ("items", "ranking", "edit"):
            text = PROMPTS["rerank" if self.config.action == "ranking" else self.config.action]
        else:
            text = PROMPTS["words" if self.config.answer == "line" else "sparse"]
        style = "line" if self.config.answer == "line" else "json"
        write = _WRITE[style][_KEYS[self.config.action]]
        return text.replace("{answer}", (_THINK if self.config.answer == "think_json" else "") + write)

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

    def write(self, parts: Sequence[str], thought: str = "") -> str:
        """A well-formed completion, for the examples of prompts and for the training data of SFT.

        parts: the texts that make up the query, or the titles of a list or an edit.
        thought: the text between <think> and </think>, where the format has these tags.

        Raises UserError for rankings, because the numbers of candidates differ between prompts.
        """
        if self.config.action == "ranking":
            raise UserError("format.action: a ranking cannot be written from titles: leave out few_shot")
        one = " ".join(" ".join(part.split()) for part in parts)
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
        if self.config.answer != "line":
            said = self._json(completion)
        elif self.config.keep_query:
            said = completion.partition("\n")[0]
            said = parse_line(said) if said.strip() else ""
        else:
            said = parse_line(completion)
        written = _text(said)
        if written is None:
            empty = isinstance(said, str) and not said.strip()
            return Action(query, "") if self.config.keep_query and empty else None
        if self.config.action == "replace":
            return Action(written, written)
        return Action(" ".join([query] * self.config.repeat + [written]), written)

    def _json(self, completion: str) -> Any:
        answer = parse_json(completion, self.config.answer == "think_json")
        return None if answer is None else answer.get(_KEYS[self.config.action])

    def _items(self, completion: str) -> Action | None:
        """Parse a list of titles. Items that are no text are left out. A list without any text is malformed."""
        found = parse_lines(completion) if self.config.answer == "line" else self._json(completion)
        texts = [_text(item) for item in found] if isinstance(found, list) else []
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
        named = [(key, text) for key, title in said if (text := _text(title)) is not None][: self.config.max_items]
        if not named:
            return None
        written = "\n".join(f"{key.removesuffix('_like')}: {text}" for key, text in named)
        return Action("", written, tuple(text for _, text in named), weights=tuple(_EDITS[key] for key, _ in named))

    def _ranking(self, completion: str) -> Action | None:
        """Parse whole numbers in their order. The Scorer, which knows the candidates, drops unknown numbers."""
        if self.config.answer == "line":
            line = next((line for line in completion.splitlines() if re.search(r"\d", line)), "")
            numbers: Any = [int(n) for n in re.findall(r"(?<!\d)\d{1,6}(?!\d)", line)]
        else:
            numbers = self._json(completion)
        if not isinstance(numbers, list):
            return None
        order = tuple(n for n in numbers if isinstance(n, int) and not isinstance(n, bool))
        return Action("", " ".join(map(str, order)), order=order) if order else None
