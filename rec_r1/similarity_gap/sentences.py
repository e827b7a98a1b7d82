"""The sentences of the page, made from numbers with intervals. Pure functions.

A sentence claims a direction only if the interval excludes 0, or if the value is outside the range of the null. No
sentence says that an effect is absent: it says how large the effect could still be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rec_r1.evaluation.number_format import number, percent
from rec_r1.evaluation.number_format import signed as signed_number
from rec_r1.tasks.sequences import PUBLISHED

DIGITS = 4  # How many digits a difference has after the point.
Interval = Mapping[str, Any]  # The keys are mean, low and high.


def signed(value: float | None) -> str:
    """A difference with its sign."""
    return signed_number(value, DIGITS)


def direction(found: Interval) -> int:
    """1 if the interval is above 0, -1 if it is below, and 0 if it holds 0 or does not exist."""
    if found["low"] is None or found["high"] is None:
        return 0
    return 1 if found["low"] > 0 else -1 if found["high"] < 0 else 0


def bounds(found: Interval) -> str:
    """A difference with its interval: −0.0010 [−0.0040, +0.0020]."""
    return f"{signed(found['mean'])} [{signed(found['low'])}, {signed(found['high'])}]"


def shares(found: Interval) -> str:
    """A share of the gap with its interval: 62% [40%, 80%]. It is – if no gap is shown: it then has no bounds."""
    if found["low"] is None:
        return "–"
    return f"{percent(found['mean'])} [{percent(found['low'])}, {percent(found['high'])}]"


def corrected(among: int) -> str:
    """The correction of the best system's interval. It is empty if there was only one system to choose.

    among: the number of systems that the best was chosen among.
    """
    return f" (corrected for the choice among {among} systems)" if among > 1 else ""


def effect(what: str, metric: str, found: Interval, differing: int) -> str:
    """The effect of a change of a system.

    what: the change, such as "Clipping the negative weights".
    metric: the metric.
    found: the paired difference, changed minus unchanged.
    differing: the number of queries whose value it changed.
    """
    if not differing:
        return f"{what} changed no query's {metric}."
    verb = {1: f"raised {metric}", -1: f"lowered {metric}", 0: f"is not shown to change {metric}"}
    return f"{what} {verb[direction(found)]}: {bounds(found)}."


def gap(metric: str, text: str, best: str, found: Interval, among: int) -> str:
    """How far the best system is ahead of the similarity of texts.

    metric: the metric.
    text, best: the names of the best encoder and of the best system.
    found: best minus text, corrected for the choice of the best.
    among: the number of systems that it was chosen among.
    """
    if text == best:
        return (
            f"No system is shown to be ahead of the similarity of texts: {text} has the best {metric} of all here, and "
            "shares of a gap are undefined."
        )
    if found["mean"] == 0:
        return (
            f"No system is shown to be ahead of the similarity of texts: {best} and {text} have the same mean "
            f"{metric}, and shares of a gap are undefined."
        )
    if direction(found) > 0:
        return (
            f"{best} is ahead of the similarity of texts ({text}) in {metric}, {bounds(found)}{corrected(among)}: this "
            "is the gap."
        )
    # The sentence is about the best system alone: another one may have a smaller lead with an interval above 0.
    return (
        f"No gap is shown: {best} has the best {metric}, but is not shown to be ahead of the similarity of texts "
        f"({text}), {bounds(found)}{corrected(among)}."
    )


def closes(name: str, share: Interval, lead: Interval, text: str) -> str:
    """The share of the gap that one system closes.

    name: the system.
    share: its share of the gap.
    lead: the paired difference, the system minus text.
    text: the name of the best encoder.
    """
    if share["mean"] is None:
        return (
            f"{name}: {bounds(lead)} against {text}; the share is undefined, since no system here has a higher mean "
            f"than {text}."
        )
    if share["low"] is None:
        return f"{name}: {bounds(lead)} against {text}; no gap is shown, so there is no share of it."
    if direction(lead) > 0:
        return f"{name} closes {shares(share)} of the gap."
    if direction(lead) < 0:
        return f"{name} closes none of the gap: it is behind {text}, {shares(share)}."
    return f"{name} is not shown to close any of the gap: {shares(share)}; its lead over {text} is {bounds(lead)}."


def place(found: Mapping[str, float]) -> int:
    """1 if the value is above the range of the null, -1 if it is below, and 0 if it is within."""
    return 1 if found["value"] > found["null_high"] else -1 if found["value"] < found["null_low"] else 0


def against_null(found: Mapping[str, float], as_percent: bool = False, short: bool = False) -> str:
    """A value, and its range when the texts are assigned to the items at random.

    found: the value and its null.
    as_percent: whether the value is a share.
    short: whether the words are left out.
    """
    write = (lambda v: percent(v, 1)) if as_percent else (lambda v: number(v, 3))
    low, high = write(found["null_low"]), write(found["null_high"])
    return f"{write(found['value'])} ({'' if short else 'texts assigned at random: '}{low} to {high})"


def correlation(what: str, pairs: str, found: Mapping[str, float]) -> str:
    """The rank correlation of the similarity of texts with something else.

    what: what that is, such as "co-consumption".
    pairs: the pairs of items, in words.
    found: the correlation and its null.
    """
    if found["value"] != found["value"]:
        return f"The rank correlation with {what} over {pairs} is undefined: all values are equal."
    verb = {
        1: f"Similar texts go with more {what}",
        -1: f"Similar texts go with less {what}",
        0: f"Similar texts are not shown to go with more or less {what}",
    }
    return f"{verb[place(found)]} over {pairs}: rank correlation {against_null(found)}."


def neighbours(k: int, found: Mapping[str, float]) -> str:
    """How many of an item's co-consumption neighbours are among its ``k`` text neighbours."""
    verb = {1: "more than", -1: "fewer than", 0: "not shown to be more or fewer than"}[place(found)]
    return (
        f"Of an item's co-consumption neighbours (up to {k}), {percent(found['value'], 1)} are among its {k} nearest "
        f"texts, {verb} by chance ({percent(found['null_low'], 1)} to {percent(found['null_high'], 1)})."
    )


def never_together(k: int, found: Mapping[str, float]) -> str:
    """How many of the ``k`` text neighbours were never chosen together with their item."""
    verb = {1: "more than", -1: "fewer than", 0: "not shown to be more or fewer than"}[place(found)]
    return (
        f"Of an item's {k} nearest texts, {percent(found['value'], 1)} were never chosen together with it, {verb} "
        f"of random items ({percent(found['null_low'], 1)} to {percent(found['null_high'], 1)})."
    )


def tells_apart(found: Mapping[str, float], matched: int) -> str:
    """The AUC of pairs that are matched by popularity. matched: the number of pairs."""
    if not matched:
        return "No pair could be matched by popularity: every item of as many users was chosen with the kept one."
    verb = {
        1: "Text similarity tells items that were chosen together from about equally popular ones that were not",
        -1: "Text similarity is lower for items that were chosen together than for about equally popular ones that "
        "were not",
        0: "Text similarity is not shown to tell items that were chosen together from about equally popular ones that "
        "were not",
    }[place(found)]
    return f"{verb}: AUC {against_null(found)}; 0.5 is chance, and 1 is a perfect separation."


def not_similar(section: Mapping[str, Any]) -> str:
    """The targets that are similar to nothing in the history. section: what `measure` found about them.

    The best system is compared with popularity, and not with an encoder, which can hardly find these targets by their
    definition. Both intervals are corrected for the choice of the best system.
    """
    found, lead, queries = section["found"], section["lead"], section["queries"]
    start = (
        f"{percent(section['share'])} of the targets ({queries}) are not among the 100 nearest texts of any item of "
        "the history"
    )
    interval = f"[{percent(found['low'], 1)}, {percent(found['high'], 1)}]"
    finds = f"{section['best']} finds {percent(found['mean'], 1)} {interval} of these"
    verb = {1: "more than", -1: "fewer than", 0: "not shown to be more or fewer than"}[direction(lead)]
    against = f"{section['against']}: {bounds(lead)}{corrected(section['among'])}"
    return f"{start}. {finds} in its first 100, {verb} {against}."


SPLITS = {
    "leave_one_out": "each user's last choice is held out; later choices of other users may be in training",
    "global_time": "one moment splits all choices; the systems are fitted on nothing later",
    "by_user": "the held-out users are not in training; later choices of other users may be",
}


def splitting(task: str, split: str | None, layout: str) -> str:
    """Which split was used, and what the systems know because of it.

    task: the name of the task.
    split, layout: of a sequential task, see `rec_r1.tasks.sequential`. None = another task, which splits by itself.
    """
    if split is None:
        return f"as the task {task} makes it"
    if split == PUBLISHED:
        return "published: as the data give it; later choices of other users may be in training"
    if layout != "sessions":
        return f"{split}: {SPLITS[split]}"
    ordered = split == "global_time"  # The task refuses this split for sessions unless their lines are in order.
    what = "its lines are assumed to be in the order of time" if ordered else "global_time needs times"
    return f"{split}: {SPLITS[split]}. The file has no times: {what}"


def fits(reports: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """What each fit found, such as "ease: regularization 100". reports: see `retrievers.fits`."""
    return [
        f"{kind}: " + ", ".join(f"{key} {value}" for key, value in report.items() if not isinstance(value, list | dict))
        for kind, report in reports
        if report
    ]


def added(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of `measure` with the sentences of each section."""
    section, gap_, unlike = result["divergence"], result["gap"], result["unlike"]
    encoders = [{**each, "sentences": divergence(each)} for each in section["encoders"]]
    rows = [{**row, "sentence": _row(row, gap_["text"], gap_["best"])} for row in gap_["rows"]]
    said = gap(gap_["metric"], gap_["text"], gap_["best"], gap_["difference"], gap_["among"])
    return {
        **result,
        "divergence": {**section, "encoders": encoders},
        "gap": {**gap_, "rows": rows, "sentence": said},
        "unlike": None if unlike is None else {**unlike, "sentence": not_similar(unlike)},
        "ablations": [{**each, "sentences": _effects(each)} for each in result["ablations"]],
    }


def divergence(found: Mapping[str, Any]) -> list[str]:
    """The sentences about one encoder. found: what `divergence.measure` returns."""
    measures, k = found["measures"], found["neighbours"]
    over = {"met": "items that somebody chose together", "any": "any two items"}
    kinds = {"cosine": "co-consumption", "ease": "weight in EASE"}
    return [
        neighbours(k, measures["overlap"]),
        never_together(k, measures["apart"]),
        tells_apart(measures["auc"], found["matched_pairs"]),
        *(
            correlation(what, pairs, measures[f"{measured}_{sort}"])
            for measured, what in kinds.items()
            for sort, pairs in over.items()
            if f"{measured}_{sort}" in measures
        ),
    ]


def _row(row: Mapping[str, Any], text: str, best: str) -> str:
    """The sentence about one system's share of the gap; "" for the two systems that define the gap."""
    return "" if row["system"] in (text, best) else closes(row["system"], row["share"], row["lead"], text)


def _effects(ablation: Mapping[str, Any]) -> list[str]:
    differing = ablation["differing_queries"]
    return [effect(ablation["what"], metric, d, differing[metric]) for metric, d in ablation["differences"].items()]
