"""The problems in a folder's files: how many rows or items have each of them, with the first examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rec_r1.checks.new_recipe.layouts import Event, Finding, Item, Layout
from rec_r1.checks.new_recipe.tables import GUESSED_ENCODING, as_text
from rec_r1.config import UserError
from rec_r1.console import number_of
from rec_r1.tasks.events import kind_of
from rec_r1.tasks.integrity import normal, shown
from rec_r1.tasks.markup import first_markup
from rec_r1.tasks.raw_files import moment, plain
from rec_r1.tasks.tables import finite, same_ids
from rec_r1.tasks.types import look_alike
from retrievers.text import languages
from retrievers.text.analysis import words

EXAMPLES = 2  # How many examples a finding shows.
_VALIDATION_QUERIES = 40  # With fewer than these the best checkpoint is chosen by chance.
_TELLING = 4  # Fewer different stop words may be words of another language: hat, man and die are English ones, too.
_KANA = 0.05  # Texts in Han characters are Japanese if at least this share of their letters is kana.
_FEWEST_QUERIES = 10  # Fewer cannot be divided into training, validation and test.
_AHEAD = 2.0  # A language is taken in place of English if the texts have so many times more of its stop words.


def findings(layout: Layout, language: str | None) -> list[Finding]:
    """All findings about the items and the events of a layout.

    language: the language that bm25 analyses the texts in, as an ISO 639-1 code; None = none.
    """
    items = _of_items(layout.items, language, layout.task == "catalog")
    return [*_misread(layout), *items, *_of_events(layout), *layout.doubts]


def guessed_encoding(layout: Layout) -> str | None:
    """The sentence about an encoding that is a guess; None where it is certain, or where a finding says it."""
    if layout.params.get("encoding") != GUESSED_ENCODING or any(_misread(layout)):
        return None
    texts = [*_titles(layout), *(item.text for item in layout.items), *(event.query or "" for event in layout.events)]
    example = next((text for text in texts if not text.isascii()), "")
    return (
        f"encoding of the files: {GUESSED_ENCODING}, a guess, which reads {shown(example)}; if that is misread, change "
        "task.params.encoding in the recipe, for example to cp1250"
    )


def _titles(layout: Layout) -> list[str]:
    return [item.title for item in layout.items]


def _misread(layout: Layout) -> Iterator[Finding]:
    """The finding about titles or queries in which accented letters are too many for a language in Latin letters.

    Encodings of other scripts have their letters where cp1252 has those from \u00c0 to \u00ff.
    """
    if layout.params.get("encoding") != GUESSED_ENCODING:
        return
    for what, texts in (("titles", _titles(layout)), ("queries", [event.query or "" for event in layout.events])):
        letters = [letter for text in texts for letter in text if letter.isalpha()]
        if sum("\u00c0" <= letter <= "\u00ff" for letter in letters) > len(letters) / 2:
            yield Finding(
                f"most letters of the {what} have accents, because the files are not in UTF-8 and are read as "
                f"{GUESSED_ENCODING}, which is probably wrong",
                "Change task.params.encoding in the recipe to that of the files, such as cp1251 (Cyrillic), cp1253 "
                "(Greek) or gb18030 (Chinese), and retriever.params.language to their language.",
                [next(shown(text) for text in texts if not text.isascii())],
            )
            return


def _finding(found: Sequence[str], one: str, many: str, rest: str, then: str) -> Iterator[Finding]:
    """The finding about ``found``, of which there may be none.

    one, many: the words that follow their number, such as "row has" and "rows have".
    rest: the words that follow in both cases.
    """
    if found:
        yield Finding(f"{number_of(len(found), one, many)} {rest}".rstrip(), then, tuple(found[:EXAMPLES]))


def _of_items(items: Sequence[Item], language: str | None, keeps_one: bool) -> Iterator[Finding]:
    """keeps_one: whether the task keeps one of several items with one id; otherwise it refuses them."""
    once = "Keep one row for each id: the task refuses a second one."
    first: dict[str, Item] = {}
    same: list[str] = []
    other: list[str] = []
    for item in items:
        known = first.setdefault(item.id, item)
        if known is not item:
            equal = (known.title, known.text) == (item.title, item.text)
            (same if equal else other).append(f"{item.id!r} at {item.where}")
    yield from _finding(same, "row repeats", "rows repeat", "an item", "One of each is kept." if keeps_one else once)
    yield from _finding(
        other,
        "row has",
        "rows have",
        "the id of an earlier item and other texts",
        "The first row is kept. If they are different items, give each its own id." if keeps_one else once,
    )
    alike: dict[str, str] = {}
    mixed = []
    for identifier in first:
        spelling = alike.setdefault(look_alike(identifier), identifier)
        if spelling != identifier:
            mixed.append(f"{spelling!r} and {identifier!r}")
    yield from _finding(
        mixed, "id differs", "ids differ", "from another only in spaces or a decimal .0", "Write each id in one way."
    )
    distinct = list(first.values())
    yield from _finding(
        [item.where for item in distinct if not item.id], "item has", "items have", "no id", "Give each an id."
    )
    yield from _finding(
        [repr(item.id) for item in distinct if not plain(item.title)],
        "item has",
        "items have",
        "no title",
        "They are shown by the first words of their text or by their id.",
    )
    for column in dict.fromkeys(name for item in distinct for name in item.empty):
        lacking = [repr(item.id) for item in distinct if column in item.empty]
        yield from _finding(lacking, "item has", "items have", f"no {column}", "Only their other texts are indexed.")
    yield from _finding(
        [repr(item.id) for item in distinct if not plain(item.title) and not plain(item.text)],
        "item has",
        "items have",
        "neither title nor text",
        "No search by text can find them.",
    )
    marked = [f"{item.id!r} ({found})" for item in distinct if (found := first_markup(f"{item.title} {item.text}"))]
    yield from _finding(
        marked, "item contains", "items contain", "HTML", "Tags and entities are resolved before the texts are indexed."
    )
    mismatch = languages.mismatch([f"{item.title} {item.text}" for item in distinct], language)
    if mismatch:
        yield Finding(mismatch, "The recipe sets retriever.params.language.", [shown(distinct[0].title)])


def _of_events(layout: Layout) -> Iterator[Finding]:
    events = layout.events
    known = {item.id for item in layout.items}
    unknown = [event for event in events if event.item not in known]
    spelled = _respelled(layout)
    yield from _finding(
        [f"{e.item!r} at {e.where} for item {spelled[e.item]!r}" for e in unknown if e.item in spelled],
        "row writes",
        "rows write",
        "the id of an item in another way than the table of items",
        "Both forms count as one id."
        if layout.task == "catalog"
        else "Write each id in one way: the task takes them for two.",
    )
    yield from _finding(
        [e.where for e in events if not e.item],
        "row has",
        "rows have",
        "no item",
        "They are left out." if layout.task == "catalog" else "Fill it in, or drop the rows.",
    )
    absent = [e for e in unknown if e.item and e.item not in spelled]
    yield from _finding(
        [f"{e.item!r} at {e.where}" for e in absent],
        "row refers",
        "rows refer",
        f"to {number_of(len({e.item for e in absent}), 'item', 'items')} that the catalogue lacks",
        "The recipe leaves such rows out." if _drops_unknown(layout) else "Add these items, or remove the rows.",
    )
    lists = [(e, [as_text(item) for item in e.history]) for e in events if isinstance(e.history, list)]
    yield from _finding(
        [f"{item!r} at {e.where}" for e, history in lists for item in history if item not in known],
        "time a history names",
        "times a history names",
        "an item that is not among the items",
        "Add these items, or remove them from the histories.",
    )
    repeated = [f"{e.item!r} for {e.query or e.query_id or e.user!r} at {e.where}" for e in _repeated(events)]
    yield from _finding(repeated, "row repeats", "rows repeat", "an earlier row", "Equal rows count once.")
    yield from _of_times(events)
    if not layout.is_sequential:
        yield from _of_queries(events, layout.task == "catalog")
        yield from _of_grades(events)


def _repeated(events: Sequence[Event]) -> Iterator[Event]:
    """The events that equal an earlier one, as the task that reads them compares them."""
    seen: set[Hashable] = set()
    for e in events:
        fields = e.query_id or e.query or e.user, e.item, str((e.history, e.grade, e.time))
        key = fields if e.cells is None else e.cells
        if key in seen:
            yield e
        seen.add(key)


def _respelled(layout: Layout) -> dict[str, str]:
    """Id in an event -> the item whose id is the same, but written in another way.

    Of the task `catalog` this is its own rule, so that the finding says what the task does.
    """
    own = [item.id for item in layout.items]
    others = {event.item for event in layout.events if event.item}.difference(own)
    if layout.task == "catalog":
        return same_ids(own, list(others))
    alike: dict[str, str] = {}
    for identifier in own:
        alike.setdefault(look_alike(identifier), identifier)
    return {name: alike[look_alike(name)] for name in others if look_alike(name) in alike}


def _of_queries(events: Sequence[Event], drops: bool) -> Iterator[Finding]:
    empty = [e for e in events if not normal(plain(e.query or ""))]
    yield from _finding(
        [f"{e.query_id or e.item!r} at {e.where}" for e in empty],
        "row has",
        "rows have",
        "no query",
        "They are left out." if drops else "Add their queries, or remove the rows.",
    )
    spellings: dict[str, dict[str, None]] = {}
    for e in events:
        if e.query:
            spellings.setdefault(normal(e.query), {}).setdefault(e.query)
    several = [" and ".join(map(shown, list(forms)[:2])) for forms in spellings.values() if len(forms) > 1]
    yield from _finding(
        several, "query is", "queries are", "written in several ways", "They count as one query, in one split."
    )


def _of_grades(events: Sequence[Event]) -> Iterator[Finding]:
    odd = [f"{e.grade!r} at {e.where}" for e in events if e.grade is not None and finite(e.grade) is None]
    yield from _finding(odd, "grade is no number", "grades are no numbers", "", "Correct them, or map them to numbers.")
    negative = [f"{e.grade} at {e.where}" for e in events if (finite(e.grade) or 0.0) < 0]
    yield from _finding(negative, "grade is", "grades are", "below 0", "They count as irrelevant.")


def _of_times(events: Sequence[Event]) -> Iterator[Finding]:
    forms: dict[str, list[Event]] = {}
    for event in events:
        if event.time is not None and str(event.time).strip():
            forms.setdefault(_form(event.time), []).append(event)
    if len(forms) > 1:
        usual = max(forms, key=lambda form: len(forms[form]))
        rest = [f"{e.time} at {e.where}" for form, found in forms.items() if form != usual for e in found]
        numbers = ", ".join(f"{len(found):,} as {form}" for form, found in forms.items())
        yield Finding(
            f"times are written in several ways ({numbers})",
            "Write all of them in one way if you want to use them.",
            tuple(rest[:EXAMPLES]),
        )
    missing = [e.where for e in events if e.time is not None and not str(e.time).strip()]
    yield from _finding(
        missing, "row has", "rows have", "no time", "If you split by time, fill in the times or drop the rows."
    )


def _form(time: object) -> str:
    """The way in which a time is written, as the tasks that read times see it."""
    try:
        return kind_of(time, moment({"time": time}, "time", "")).name
    except UserError:
        return "texts that are no certain times"


def guess_language(items: Sequence[Item]) -> str | None:
    """The language of the items' texts, as an ISO 639-1 code; None if bm25 does not know the language.

    The languages that are written in the script of most letters are compared. The one with the most stop words in the
    texts is taken. Latin letters without stop words, as in tables of short names, are taken for English.
    """
    step = max(1, len(items) // languages.SAMPLED_DOCUMENTS)
    texts = [f"{item.title} {item.text}"[: languages.SAMPLED_CHARACTERS] for item in items[::step]]
    fitting = [code for code in languages.LANGUAGES if languages.mismatch(texts, code) is None]
    if not fitting:
        return None
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    if "ja" in fitting and sum("\u3040" <= letter <= "\u30ff" for letter in letters) >= _KANA * len(letters) > 0:
        return "ja"
    found = Counter(word for text in texts for word in words(text))
    counts = {}
    for code in (code for code in fitting if code in languages.STOPWORDS):
        there = [found[word] for word in set(languages.stop_words(code)) if word in found]
        counts[code] = sum(there) if code == "en" or len(there) >= _TELLING else 0
    usual = "en" if "en" in fitting else fitting[0]
    best = max(counts, key=lambda code: counts[code], default=usual)
    # English texts hold short words that are stop words elsewhere, so another language must be clearly ahead.
    return best if counts.get(best, 0) > _AHEAD * counts.get(usual, 0) else usual


def _divides_itself(layout: Layout) -> bool:
    """Whether the task takes a validation split out of the training queries."""
    if layout.is_sequential:
        return False
    given = layout.splits or layout.params.get("qrels") or ()
    return "validation" not in given and "split" not in layout.params.get("columns", ())


def _drops_unknown(layout: Layout) -> bool:
    """Whether the task can leave out events of items that are not among the items."""
    return layout.task == "catalog" or (layout.is_sequential and layout.params.get("layout") != "sessions")


def refuse_too_few(folder: Path, layout: Layout) -> None:
    """Raise UserError where there is one item, or where the queries are too few to divide them into splits."""
    items = {item.id for item in layout.items}
    if len(items) < 2:
        raise UserError(f"{folder}: only {number_of(len(items), 'item', 'items')}: there is nothing to rank: add items")
    queries = _different_queries(layout)
    if _divides_itself(layout) and queries < _FEWEST_QUERIES:
        different = number_of(queries, "different query", "different queries")
        raise UserError(
            f"{folder}: only {different}: training, "
            f"validation and test need queries of their own: add some, {_FEWEST_QUERIES} at least and some hundreds to "
            "learn from"
        )


def _different_queries(layout: Layout) -> int:
    return len({normal(event.query) for event in layout.events if event.query and normal(event.query)})


def settings_for(layout: Layout) -> dict[str, Any]:
    """The `task.params` with which a task takes files that hold unknown items, rows without a query, or several items
    under one id."""
    known = {item.id for item in layout.items} | _respelled(layout).keys()
    lacking = any(event.item and event.item not in known for event in layout.events)
    if layout.is_sequential:
        return {"drop_unknown": True} if lacking and _drops_unknown(layout) else {}
    queries = _different_queries(layout)
    wanted = round(min(0.3, _VALIDATION_QUERIES / max(1.0, 0.8 * queries)), 2)  # Of the fifths that are not the test.
    share = {"validation_share": wanted} if wanted > 0.1 and _divides_itself(layout) else {}
    if layout.task != "catalog":
        return share
    blank = any(not event.item or not normal(plain(event.query or "")) for event in layout.events)
    texts: dict[str, tuple[str, str]] = {}
    several = any(texts.setdefault(i.id, (i.title, i.text)) != (i.title, i.text) for i in layout.items)
    settings = (
        ("unknown", "drop", lacking or any(e.query is None and e.query_id is not None for e in layout.events)),
        ("blank", "drop", blank),
        ("duplicates", "first", several),
    )
    return {key: value for key, value, needed in settings if needed} | share
