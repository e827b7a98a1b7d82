"""The sentences of the page of `rec-r1 tuning-grid`, made from numbers with intervals. Pure functions.

As on the page of the similarity gap, a sentence claims a direction only if the interval excludes 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rec_r1.similarity_gap.sentences import bounds, direction
from rec_r1.similarity_gap.utility import MAIN


def gain(setting: str, found: Mapping[str, Any]) -> str:
    """What pre-training adds under one setting. found: the difference, pre-trained minus random weights."""
    verb = {1: "is ahead of", -1: "is behind", 0: "is not shown to differ from"}[direction(found)]
    return f"{setting}: an encoder that begins pre-trained {verb} one with random weights in {MAIN}, {bounds(found)}."


def answer(gains: Sequence[Mapping[str, Any]]) -> str:
    """The answer to the first question of the page. gains: rows with `setting` and `difference`."""
    by = {way: [row["setting"] for row in gains if direction(row["difference"]) == way] for way in (1, -1, 0)}
    said = [f"a net {what} under {_listed(by[way])}" for way, what in ((1, "gain"), (-1, "loss")) if by[way]]
    if not said:
        return f"Pre-training on texts is not shown to be a net gain or a net loss under any of {_listed(by[0])}."
    rest = f" Under {_listed(by[0])} it is not shown to be either." if by[0] else ""
    return f"Pre-training on texts is shown to be {' and '.join(said)}.{rest}"


def _listed(names: Sequence[str]) -> str:
    """Names as a list in a sentence, each in quotation marks, because they hold plus signs."""
    quoted = [f"“{name}”" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def taught(section: Mapping[str, Any], setting: str, what: str) -> str:
    """Whether some negatives teach anti-affinity.

    section: what `anti_affinity.compared` returns.
    setting: the name of the setting with these negatives.
    what: the negatives in words, such as "Written negatives".
    """
    if section["reason"] is not None:
        return f"Whether {what.lower()} teach anti-affinity was not measured: {section['reason']}."
    found = next((row["difference"] for row in section["rows"] if row["name"] == setting), None)
    if found is None:
        reason = "the recipe has no retriever.params.tuned.written"
        return f"Whether {what.lower()} teach anti-affinity was not measured: {reason}."
    verb = {
        1: "are shown to teach anti-affinity: they raise",
        -1: "do not teach anti-affinity: they are shown to lower",
        0: "are not shown to teach anti-affinity: they change",
    }[direction(found)]
    return (
        f"{what} {verb} the rank correlation of the learned scores with EASE's negative scores by {bounds(found)} "
        f"beside “{section['base']}”."
    )
