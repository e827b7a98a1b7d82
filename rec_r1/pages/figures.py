"""Draw the pictures inside pages, as SVG by matplotlib. They use the page's colours, and so its light or dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rec_r1.pages import plots

LINE_COLOURS = 8  # The page defines so many colours of lines: --s0 … --s7.
# matplotlib draws in these placeholder colours. In the finished SVG they are replaced by the page's CSS variables.
_INK, _GRID = "#010203", "#040506"
_LINES = [f"#0a0b{number:02x}" for number in range(LINE_COLOURS)]
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--line)"} | {c: f"var(--s{n})" for n, c in enumerate(_LINES)}
CURVES = tuple(plots.PANELS)[:7]  # The panels about the retriever are only in reward_curve.png.


def curves(logs: plots.Logs, titles: Sequence[str] = CURVES) -> list[tuple[str, str]]:
    """Draw the curves of runs.

    logs: name of a run -> its rows of metrics.jsonl.
    titles: the keys of `plots.PANELS` to draw.

    Returns pairs (title, SVG), without the panels that have no values.
    """
    made = []
    for title in titles:
        with _panel(4.3, 3.1) as (figure, axes):
            plots.fill(axes, title, logs)
            drawn = axes.has_data()
            handles, labels = axes.get_legend_handles_labels()
            if axes.get_legend() is not None:  # The legend is put below the axes, where it hides no curves.
                heading = axes.get_legend().get_title().get_text() or None
                axes.get_legend().remove()
                columns = 1 if len(labels) < 3 else 2
                where: Any = {"loc": "outside lower left", "frameon": False, "alignment": "left"}
                figure.legend(handles, labels, ncols=columns, title=heading, title_fontsize=7, **where)
            if drawn:
                made.append((title, _svg(figure, title)))
    return made


def forest(rows: Sequence[Mapping[str, Any]], label: str, first: str, zero: bool) -> str:
    """Draw means with their intervals, with one line per system.

    rows: mappings with name, mean, low and high. A row whose mean is None is left out.
    label: the label of the axis.
    first: the name of the system that is drawn in the first colour.
    zero: whether a line is drawn at 0, for differences.

    Returns the SVG, or "" without any row.
    """
    rows = [row for row in rows if row["mean"] is not None]
    if not rows:
        return ""
    with _panel(4.3, 0.9 + 0.27 * len(rows)) as (figure, axes):
        for place, row in enumerate(rows):
            color = "C0" if row["name"] == first else _INK
            error = [[row["mean"] - row["low"]], [row["high"] - row["mean"]]]
            axes.errorbar(row["mean"], place, xerr=error, fmt="o", color=color, markersize=4, linewidth=1.5)
        axes.set_yticks(range(len(rows)), [_short(row["name"]) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x")
        axes.locator_params(axis="x", nbins=5)  # The labels of more ticks would overlap.
        if zero:
            axes.axvline(0, color=_INK, linewidth=1, linestyle="--")
        axes.set_xlabel(label)
        return _svg(figure, label)


def shares(rows: Sequence[Mapping[str, Any]], label: str) -> str:
    """Draw shares as bars with their intervals, and lines at 0 and 1.

    rows: mappings with name, mean, low and high. A row whose mean is None is left out. low None = no interval.
    label: the label of the axis.

    Returns the SVG, or "" without any row.
    """
    rows = [row for row in rows if row["mean"] is not None]
    if not rows:
        return ""
    with _panel(4.3, 0.9 + 0.27 * len(rows)) as (figure, axes):
        for place, row in enumerate(rows):
            axes.barh(place, row["mean"], height=0.55, color="C0" if row["mean"] >= 0 else "C1")
            if row["low"] is not None and row["high"] > row["low"]:
                axes.plot([row["low"], row["high"]], [place, place], color=_INK, linewidth=1.5)
        axes.set_yticks(range(len(rows)), [_short(row["name"]) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        for at in (0, 1):
            axes.axvline(at, color=_INK, linewidth=1, linestyle="--")
        axes.set_xlabel(label)
        return _svg(figure, label)


def against_null(rows: Sequence[Mapping[str, Any]], label: str) -> str:
    """Draw observed values as dots, over the range of values under the null hypothesis, with one line per value.

    rows: mappings with name, value, null_low and null_high. A row whose value is None is left out.
    label: the label of the axis.

    Returns the SVG, or "" without any row.
    """
    rows = [row for row in rows if row["value"] is not None]
    if not rows:
        return ""
    with _panel(4.3, 1.0 + 0.32 * len(rows)) as (figure, axes):
        for place, row in enumerate(rows):
            wide: Any = {"color": _INK, "linewidth": 7, "alpha": 0.35, "solid_capstyle": "butt"}
            line = "texts assigned at random, 95%" if not place else None
            axes.plot([row["null_low"], row["null_high"]], [place, place], label=line, **wide)
            axes.plot(row["value"], place, "o", color="C0", markersize=6, label="observed" if not place else None)
        axes.set_yticks(range(len(rows)), [_short(row["name"]) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x")
        axes.set_xlabel(label)
        figure.legend(loc="outside lower left", ncols=2, frameon=False)
        return _svg(figure, label)


def _short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


@contextmanager
def _panel(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """Yield a figure of one panel, and its axes, in the placeholder colours. width, height: in inches."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt
    from cycler import cycler

    style: Any = {
        "svg.fonttype": "none",
        "text.parse_math": False,  # A name may hold $, which must not be read as a formula.
        "axes.prop_cycle": cycler(color=_LINES),
        "grid.color": _GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "legend.fontsize": 8,
    }
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    with matplotlib.rc_context(style):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def _svg(figure: Any, title: str) -> str:
    """A figure as SVG for a page, with the page's colours, and without a fixed size."""
    import matplotlib

    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Ids must differ between the pictures of a page, and must be the same whenever the same page is written.
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return re.sub("|".join(_VARIABLES), lambda color: _VARIABLES[color.group()], text)
