"""Show a comparison as text, for terminals: its tables, and its result in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rec_r1.evaluation import budget
from rec_r1.evaluation.compare import CHOSEN_BY
from rec_r1.evaluation.number_format import missing, p_value


def closing(result: Mapping[str, Any], split: str) -> str:
    """The tables of all metrics, the notes to them, and the result in one sentence.

    result: from :func:`rec_r1.evaluation.compare.compare`.
    split: the name of the split.
    """
    shown = [text(result, metric, split) for metric in result["metrics"]]
    return "\n\n".join([*shown, *used(result), *notes(result), sentence(result)]).rstrip()


def used(result: Mapping[str, Any]) -> list[str]:
    """The table of what each system used, see `budget.Used`, or [] where no system has such a record."""
    known = {name: one["used"] for name, one in result.get("systems", {}).items() if one.get("used")}
    return [aligned(budget.lines({name: budget.Used(**one) for name, one in known.items()}))] if known else []


def notes(result: Mapping[str, Any]) -> list[str]:
    """Sentences that explain the tables: what was resampled, why some comparisons have no p, what is an upper bound."""
    found = []
    if result.get("users"):  # A comparison of an older version lacks the number of users.
        found.append(
            f"Some users have several queries: intervals and p are over {result['users']} users with all their queries."
        )
    untested = [(t["slice"], c) for t in result["tables"] for c in t["comparisons"] if c["p_holm"] is None]
    chosen = dict.fromkeys((name, CHOSEN_BY[name]) for name, c in untested if not missing(c["difference"]))
    for name, by in chosen:
        found.append(f"No p against the {by} on {name}, because these queries were chosen by its score.")
    for name in result.get("upper_bounds", ()):  # A comparison of an older version has none.
        found.append(f"{name}: it reads the judgments, so nothing is compared with it, nor is it one of the others.")
    return found


def text(result: Mapping[str, Any], metric: str, split: str, most: int = 5) -> str:
    """The tables of one metric as text, with one row per system and comparison, and one column per slice.

    result: from :func:`rec_r1.evaluation.compare.compare`.
    metric: the name of the metric.
    split: the name of the split.
    most: only the first so many slices are shown.
    """
    tables = [table for table in result["tables"] if table["metric"] == metric][:most]
    lines = [[f"{metric} on {split}"] + [f"{t['slice']} (n={t['n']})" for t in tables]]
    for i, row in enumerate(tables[0]["rows"]):
        cells = [t["rows"][i] for t in tables]
        lines.append([row["system"], *map(with_interval, cells)])
    for i, comparison in enumerate(tables[0]["comparisons"]):
        cells = [t["comparisons"][i] for t in tables]
        label = f"{comparison['system']} - {comparison['against']}"
        lines.append([label, *map(difference, cells)])
    for i, comparison in enumerate(tables[0]["comparisons"]):
        cells = [t["comparisons"][i] for t in tables]
        lines.append(
            [f"  won / tied / lost against {comparison['against']}"]
            + [f"{c['wins']} / {c['ties']} / {c['losses']}" for c in cells]
        )
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as a table in text: aligned columns, and a rule under the first line."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([out[0], "-" * max(map(len, out)), *out[1:]])


def with_interval(row: Mapping[str, Any], digits: int = 3) -> str:
    """A mean with its interval, or a dash for a mean of no query.

    row: has mean, low and high, as `significance.bootstrap` returns them.
    digits: of each number.
    """
    if missing(row["mean"]):
        return "–"
    return f"{row['mean']:.{digits}f} [{row['low']:.{digits}f}, {row['high']:.{digits}f}]"


def difference(comparison: Mapping[str, Any]) -> str:
    """A difference with its interval and its corrected p, or a dash where it was not tested or has no query.

    comparison: has difference, low, high and p_holm.
    """
    if missing(comparison["difference"]):
        return "–"
    shown = f"{comparison['difference']:+.3f} [{comparison['low']:+.3f}, {comparison['high']:+.3f}]"
    tested = comparison["p_holm"] is not None
    return f"{shown} p{p_value(comparison['p_holm'])}" if tested else f"{shown} –"


def sentence(result: Mapping[str, Any]) -> str:
    """The result of the comparison with the best other system, in one sentence. "" = there is no such comparison."""
    best = result["best_baseline"]
    if best is None:
        return ""
    numbers = f"{best['difference']:+.3f} [{best['low']:+.3f}, {best['high']:+.3f}], p{p_value(best['p_holm'])}"
    claim = {
        "better": f"is better than the best of the others ({best['system']})",
        "worse": f"is worse than the best of the others ({best['system']})",
        "no difference shown": f"shows no difference from the best of the others ({best['system']})",
    }[best["verdict"]]
    return f"{result['reference']} {claim}: {best['metric']} {numbers}"
