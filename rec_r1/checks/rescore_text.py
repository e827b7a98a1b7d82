"""What `rec-r1 rescore` prints: a table of the periods of a run, and sentences."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rec_r1.evaluation.tables import aligned


def sentences(result: dict[str, Any]) -> Iterator[str]:
    """What the numbers say, one sentence each."""
    before, now = result["all"]["recorded"], result["all"]["new"]
    yield f"Under the new rewards, {_share(now)} would have been live; under the recorded ones, {_share(before)} were."
    if result["all"]["correlation"] is not None:
        yield (
            f"In the {result['all']['correlated']:,} groups that are live under both, the two rewards have a mean "
            f"correlation of {result['all']['correlation']:.2f}."
        )
    if depths := result["depths"]:
        most = max(counts["live"] for counts in depths.values())
        best = [k for k, counts in depths.items() if counts["live"] == most]
        listed = ", ".join(f"{counts['live']:,} at {k}" for k, counts in depths.items())
        which = f"Depth {best[0]}" if len(best) == 1 else f"Depths {', '.join(best[:-1])} and {best[-1]}"
        yield f"Live groups by depth: {listed}. {which} would have had the most."
    yield (
        "The completions and the choice of prompts are those of a training on the recorded rewards; a training on the "
        "new ones would have had others after its first step."
    )


def _share(counts: dict[str, Any]) -> str:
    if not counts["groups"]:
        return "0 of 0 groups"
    return f"{counts['live']:,} of {counts['groups']:,} groups ({counts['live'] / counts['groups']:.0%})"


def text(result: dict[str, Any]) -> str:
    """The result of `rescore.rescore` as a table and sentences."""
    how = "the recorded ranks" if result["retriever"] is None else f"retriever {result['retriever']}"
    lines = [
        f"{result['completions']:,} completions of {result['all']['groups']:,} groups in {result['run']}",
        f"recorded  {_yaml(result['rewards']['recorded'])}",
        f"new       {_yaml(result['rewards']['new'])}, from {how}",
    ]
    if result["failed"]:
        lines.append(f"left out  {result['failed']:,} completions for which the retriever failed")
    if result["ambiguous"]:
        lines.append(f"left out  {result['ambiguous']:,} completions whose prompt has several sets of targets")
    head = ["steps", "groups", "recorded", "new", "dead, recorded", "dead, new", "correlation"]
    table = [head, *map(_cells, result["periods"]), ["all", *_cells(result["all"])[1:]]]
    return "\n".join([*lines, "", aligned(table), "", *result["sentences"]])


def _cells(period: dict[str, Any]) -> list[str]:
    first, last = period["first"], period["last"]
    recorded, new = period["recorded"], period["new"]

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        str(first) if first == last else f"{first}-{last}",
        f"{period['groups']:,}",
        *(shown(one["mean"], ".4f") for one in (recorded, new)),
        *(shown(one["dead"], ".1%") for one in (recorded, new)),
        shown(period["correlation"], ".2f"),
    ]


def _yaml(spec: dict[str, Any]) -> str:
    """The rewards of a recipe in one line."""
    return json.dumps(spec, ensure_ascii=False).replace('"', "")
