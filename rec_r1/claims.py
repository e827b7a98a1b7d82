"""From numbers with intervals to sentences that say no more than these do. Pure functions.

An interval that holds 0, or a figure inside the range of the null, shows nothing, and the sentence says so. None of
them says that something is absent: it says how large it could still be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DIGITS = 4
Interval = Mapping[str, Any]  # mean, low, high


def number(value: float | None, digits: int = DIGITS) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = DIGITS) -> str:
    return "–" if value is None or value != value else f"{value:+.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None or value != value else f"{100 * value:.{digits}f}%".replace("-", "−")


def direction(found: Interval) -> int:
    """1: the interval lies above 0; -1: below; 0: it holds 0, or there is none."""
    if found["low"] is None or found["high"] is None:
        return 0
    return 1 if found["low"] > 0 else -1 if found["high"] < 0 else 0


def bounds(found: Interval) -> str:
    """A difference: −0.0010 [−0.0040, +0.0020]."""
    return f"{signed(found['mean'])} [{signed(found['low'])}, {signed(found['high'])}]"


def shares(found: Interval) -> str:
    """A share of the gap: 62% [40%, 80%]; without bounds where there are none."""
    if found["low"] is None:
        return percent(found["mean"])
    return f"{percent(found['mean'])} [{percent(found['low'])}, {percent(found['high'])}]"


def effect(what: str, metric: str, found: Interval) -> str:
    """What a change did. what: "Clipping the negative weights"; found: changed minus unchanged, paired."""
    if found["mean"] == found["low"] == found["high"] == 0:
        return f"{what} changed no query's {metric}."
    verb = {1: f"raised {metric}", -1: f"lowered {metric}", 0: f"is not shown to change {metric}"}
    return f"{what} {verb[direction(found)]}: {bounds(found)}."


def gap(metric: str, text: str, best: str, found: Interval) -> str:
    """How far the best system is ahead of the similarity of texts. found: best minus text."""
    if text == best:
        return (
            f"Here the similarity of texts ({text}) has the best {metric} of all systems: there is no gap to close, "
            "and shares of it are undefined."
        )
    if found["mean"] == 0:
        return f"{best} and the similarity of texts ({text}) have the same {metric}: shares of the gap are undefined."
    if direction(found) > 0:
        return f"{best} is ahead of the similarity of texts ({text}) in {metric}, {bounds(found)}: this is the gap."
    return (
        f"No gap is shown: {best} has the best {metric}, but its lead over the similarity of texts ({text}) may be "
        f"nothing, {bounds(found)}."
    )


def closes(name: str, share: Interval, lead: Interval, text: str) -> str:
    """What one system closes of the gap. lead: the system minus text, paired."""
    if share["mean"] is None:
        return f"{name}: {bounds(lead)} against {text}; the share is undefined, since there is no gap."
    if direction(lead) > 0:
        return f"{name} closes {shares(share)} of the gap."
    if direction(lead) < 0:
        return f"{name} closes none of the gap: it is behind {text}, {shares(share)}."
    return f"{name} is not shown to close any of the gap: {shares(share)}; its lead over {text} is {bounds(lead)}."


def place(found: Mapping[str, float]) -> int:
    """1: the value lies above the range of the null; -1: below; 0: within."""
    return 1 if found["value"] > found["null_high"] else -1 if found["value"] < found["null_low"] else 0


def against_null(found: Mapping[str, float], as_percent: bool = False) -> str:
    """The value, and what texts dealt at random give."""
    write = (lambda v: percent(v, 1)) if as_percent else (lambda v: number(v, 3))
    low, high = write(found["null_low"]), write(found["null_high"])
    return f"{write(found['value'])} (texts dealt at random: {low} to {high})"


def correlation(what: str, pairs: str, found: Mapping[str, float]) -> str:
    """Spearman's correlation of text similarity. what: "co-consumption"; pairs: over which."""
    if found["value"] != found["value"]:
        return f"The rank correlation with {what} over {pairs} is undefined: all values are equal."
    verb = {
        1: f"Alike texts go with more {what}",
        -1: f"Alike texts go with less {what}",
        0: f"No relation of alike texts and {what} shows",
    }
    return f"{verb[place(found)]} over {pairs}: rank correlation {against_null(found)}."


def neighbours(k: int, found: Mapping[str, float]) -> str:
    """How many of an item's co-consumption neighbours are text neighbours."""
    verb = {1: "more than", -1: "fewer than", 0: "no more and no fewer than"}[place(found)]
    return (
        f"Of an item's co-consumption neighbours (up to {k}), {percent(found['value'], 1)} are among its {k} nearest "
        f"texts, {verb} chance gives ({percent(found['null_low'], 1)} to {percent(found['null_high'], 1)})."
    )


def never_together(k: int, found: Mapping[str, float]) -> str:
    """How many text neighbours nobody chose together with their item."""
    verb = {1: "more than", -1: "fewer than", 0: "as many as"}[place(found)]
    return (
        f"Of an item's {k} nearest texts, {percent(found['value'], 1)} were never chosen with it by anybody, {verb} of "
        f"items taken at random ({percent(found['null_low'], 1)} to {percent(found['null_high'], 1)})."
    )


def tells_apart(found: Mapping[str, float], matched: int) -> str:
    """The popularity-matched AUC."""
    if not matched:
        return "No pair could be matched by popularity: every item of a class met every other."
    verb = {
        1: "Text similarity tells items that were chosen together from equally popular ones that were not",
        -1: "Text similarity is lower for items that were chosen together than for equally popular ones that were not",
        0: "Text similarity does not tell items that were chosen together from equally popular ones that were not",
    }[place(found)]
    return f"{verb}: AUC {against_null(found)}; 0.5 is a coin, 1 is never wrong."


def not_similar(share: float, queries: int, name: str, found: Interval, against: str, lead: Interval) -> str:
    """The slice of targets that no text leads to. found: recall@100 of ``name`` there; lead: it minus ``against``,
    which is not the text itself: that can hardly score there, by the slice's definition."""
    start = (
        f"{percent(share)} of the targets ({queries}) are not among the 100 nearest texts of any item of the history"
    )
    finds = (
        f"{name} finds {percent(found['mean'], 1)} [{percent(found['low'], 1)}, {percent(found['high'], 1)}] of these"
    )
    verb = {1: "more than", -1: "fewer than", 0: "not shown to be more or fewer than"}[direction(lead)]
    return f"{start}. {finds} in its first 100, {verb} {against}: {bounds(lead)}."
