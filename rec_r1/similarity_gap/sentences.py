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

DIGITS = 4
Interval = Mapping[str, Any]  # mean, low, high


def signed(value: float | None) -> str:
    return signed_number(value, DIGITS)


def direction(found: Interval) -> int:
    """1: the interval lies above 0; -1: below; 0: it holds 0, or there is none."""
    if found["low"] is None or found["high"] is None:
        return 0
    return 1 if found["low"] > 0 else -1 if found["high"] < 0 else 0


def bounds(found: Interval) -> str:
    """A difference: −0.0010 [−0.0040, +0.0020]."""
    return f"{signed(found['mean'])} [{signed(found['low'])}, {signed(found['high'])}]"


def shares(found: Interval) -> str:
    """A share of the gap: 62% [40%, 80%]; – where it has no bounds, since no gap is shown."""
    if found["low"] is None:
        return "–"
    return f"{percent(found['mean'])} [{percent(found['low'])}, {percent(found['high'])}]"


def corrected(among: int) -> str:
    """What the interval of the best of ``among`` systems is corrected for; "" where there was nothing to choose."""
    return f" (corrected for its having been chosen among {among} systems)" if among > 1 else ""


def effect(what: str, metric: str, found: Interval, differing: int) -> str:
    """What a change did. what: "Clipping the negative weights"; found: changed minus unchanged, paired; differing: the
    number of queries whose value it changed."""
    if not differing:
        return f"{what} changed no query's {metric}."
    verb = {1: f"raised {metric}", -1: f"lowered {metric}", 0: f"is not shown to change {metric}"}
    return f"{what} {verb[direction(found)]}: {bounds(found)}."


def gap(metric: str, text: str, best: str, found: Interval, among: int) -> str:
    """How far the best system is ahead of the similarity of texts. found: best minus text, corrected for the best's
    having been chosen among so many."""
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
    # Another system may be ahead by less and more surely: only the best is spoken of.
    return (
        f"No gap is shown: {best} has the best {metric}, but is not shown to be ahead of the similarity of texts "
        f"({text}), {bounds(found)}{corrected(among)}."
    )


def closes(name: str, share: Interval, lead: Interval, text: str) -> str:
    """What one system closes of the gap. lead: the system minus text, paired."""
    if share["mean"] is None:
        return (
            f"{name}: {bounds(lead)} against {text}; the share is undefined, since no system here has a higher mean "
            f"than {text}."
        )
    if share["low"] is None:
        return f"{name}: {bounds(lead)} against {text}; no gap is shown, so that there is no share of it to give."
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
        0: f"Alike texts are not shown to go with more or less {what}",
    }
    return f"{verb[place(found)]} over {pairs}: rank correlation {against_null(found)}."


def neighbours(k: int, found: Mapping[str, float]) -> str:
    """How many of an item's co-consumption neighbours are text neighbours."""
    verb = {1: "more than", -1: "fewer than", 0: "not shown to be more or fewer than"}[place(found)]
    return (
        f"Of an item's co-consumption neighbours (up to {k}), {percent(found['value'], 1)} are among its {k} nearest "
        f"texts, {verb} chance gives ({percent(found['null_low'], 1)} to {percent(found['null_high'], 1)})."
    )


def never_together(k: int, found: Mapping[str, float]) -> str:
    """How many text neighbours nobody chose together with their item."""
    verb = {1: "more than", -1: "fewer than", 0: "not shown to be more or fewer than"}[place(found)]
    return (
        f"Of an item's {k} nearest texts, {percent(found['value'], 1)} were never chosen with it by anybody, {verb} of "
        f"items taken at random ({percent(found['null_low'], 1)} to {percent(found['null_high'], 1)})."
    )


def tells_apart(found: Mapping[str, float], matched: int) -> str:
    """The popularity-matched AUC. matched: the number of pairs that it is of."""
    if not matched:
        return "No pair could be matched by popularity: every item of as many users was chosen with the kept one."
    verb = {
        1: "Text similarity tells items that were chosen together from about equally popular ones that were not",
        -1: "Text similarity is lower for items that were chosen together than for about equally popular ones that "
        "were not",
        0: "Text similarity is not shown to tell items that were chosen together from about equally popular ones that "
        "were not",
    }[place(found)]
    return f"{verb}: AUC {against_null(found)}; 0.5 is a coin, 1 is never wrong."


def not_similar(section: Mapping[str, Any]) -> str:
    """The targets that are similar to nothing in the history. section: what `measure` found about them.

    The best system is compared with popularity, and not with the text: text can hardly find these targets, by their
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
    "leave_one_out": "each user's last choice is held out; what others chose later than it may be in training",
    "global_time": "one moment for everybody; nothing later was known in fitting",
    "by_user": "the held-out users are unseen; what others chose later may be in training",
}


def splitting(task: str, split: str | None, layout: str) -> str:
    """Which split was used, and what the systems know because of it.

    task: the name of the task.
    split, layout: of a sequential task, see `rec_r1.tasks.sequential`. None = another task, which splits by itself.
    """
    if split is None:
        return f"as the task {task} makes it"
    if split == PUBLISHED:
        return "published: as the data give it; what others chose later may be in training"
    if layout != "sessions":
        return f"{split}: {SPLITS[split]}"
    ordered = split == "global_time"  # The task refuses this split for sessions unless their lines are in order.
    what = "its lines are taken to be in the order of time" if ordered else "a split by one moment needs some"
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
