"""A comparison as text, for terminals: tables and the sentence to believe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def closing(result: Mapping[str, Any], part: str) -> str:
    """All metrics' tables and what they show."""
    return "\n\n".join([*(text(result, metric, part) for metric in result["metrics"]), sentence(result)]).rstrip()


def text(result: Mapping[str, Any], metric: str, part: str, most: int = 5) -> str:
    """One metric's tables as text: a row a system and a comparison, a column a slice (the first ``most`` of them)."""
    tables = [table for table in result["tables"] if table["metric"] == metric][:most]
    lines = [[f"{metric} on {part}"] + [f"{t['slice']} (n={t['n']})" for t in tables]]
    for i, row in enumerate(tables[0]["rows"]):
        cells = [t["rows"][i] for t in tables]
        lines.append([row["system"]] + [f"{c['mean']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells])
    for i, comparison in enumerate(tables[0]["comparisons"]):
        cells = [t["comparisons"][i] for t in tables]
        label = f"{comparison['system']} - {comparison['against']}"
        lines.append(
            [label]
            + [f"{c['difference']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}] p{p_value(c['p_holm'])}" for c in cells]
        )
    for i, comparison in enumerate(tables[0]["comparisons"]):
        cells = [t["comparisons"][i] for t in tables]
        lines.append(
            [f"  won / tied / lost against {comparison['against']}"]
            + [f"{c['wins']} / {c['ties']} / {c['losses']}" for c in cells]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([out[0], "-" * max(map(len, out)), *out[1:]])


def p_value(value: float) -> str:
    return "<.001" if value < 0.001 else "=1" if value > 0.9995 else "=" + f"{value:.3f}".lstrip("0")


def sentence(result: Mapping[str, Any]) -> str:
    """What the comparison with the best of the other systems shows, in one sentence; "" without one."""
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
