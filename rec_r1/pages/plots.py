"""Draw the curves of one or several runs into one PNG file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rec_r1 import runs
from rec_r1.generation import importance_ratio
from retrievers.core.index_folder import naming
from rewards import METRICS

Series = tuple[list[int], list[float]]  # Steps, and the value at each step.
Logs = dict[str, list[dict[str, Any]]]  # Name of a run -> its rows of metrics.jsonl.
# Shares of the figure. A layout that matplotlib computes takes as long as the rest of the drawing.
MARGINS = {"left": 0.05, "right": 0.99, "bottom": 0.04, "top": 0.97, "wspace": 0.2, "hspace": 0.24}
WIDTH = 10  # A smoothed line shows the mean of so many logged values.
SMOOTHED = f"smoothed: mean of the last {WIDTH} values"  # Heads the legend of panels with such lines.


def draw(folders: Sequence[Path], output: Path) -> None:
    """Draw the panels of `PANELS`, that of the importance ratio only for runs with vLLM.

    For one run, the components of the reward are drawn, and for several the total rewards.

    folders: the folders of the runs.
    output: the PNG file, which is replaced atomically.

    Raises UserError where a folder has no metrics.jsonl.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    logs = named_logs(folders)
    with_vllm = any(importance_ratio.MEAN in row for rows in logs.values() for row in rows)
    titles = [title for title in PANELS if with_vllm or title != RATIO]
    height = math.ceil(len(titles) / 3)
    figure, axes = plt.subplots(height, 3, figsize=(15, 4 * height), gridspec_kw=MARGINS)
    for panel, title in zip(axes.ravel(), titles, strict=False):
        fill(panel, title, logs)
        _make_room(panel, PANELS[title][1])
        # Without a given place, matplotlib measures all labels to find one, which takes a tenth of the drawing.
        panel.set_title(title, fontsize=11, y=1.0)
        panel.xaxis.set_label_coords(0.5, -0.095)
    for panel in axes.ravel()[len(titles) :]:
        panel.set_visible(False)
    temporary = output.with_name(f".{output.stem}.tmp.png")
    try:
        with naming(output):
            render(figure, temporary)
            temporary.replace(output)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        plt.close(figure)


def render(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG."""
    # With more compression, the file is hardly smaller, and takes longer to write.
    figure.savefig(path, dpi=100, pil_kwargs={"compress_level": 1})


def named_logs(folders: Sequence[Path]) -> Logs:
    """The rows of metrics.jsonl of each run, by the run's name. Raises UserError where a folder has none."""
    return {name: runs.read_metrics(folder) for name, folder in zip(runs.names(folders), folders, strict=True)}


def fill(panel: Any, title: str, logs: Logs) -> None:
    """Draw one panel with the curves of all runs.

    panel: matplotlib axes.
    title: a key of `PANELS`.
    logs: name of a run -> its rows of metrics.jsonl.
    """
    draw_run, is_share, least_span = PANELS[title]
    single = len(logs) == 1
    for number, (name, rows) in enumerate(logs.items()):
        draw_run(panel, rows, "" if single else f"{name} ", f"C{number % 10}", single)
    panel.set_xlabel("step")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[0]:
        heading = SMOOTHED if any(line.get_gid() == SMOOTHED for line in panel.lines) else None
        panel.legend(fontsize=8 if single else 7, framealpha=0.6, title=heading, title_fontsize=7, alignment="left")
    if is_share:
        panel.set_ylim(-0.02, 1.02)
    elif panel.has_data():
        _widen(panel, least_span)


def _make_room(panel: Any, is_share: bool) -> None:
    """Extend the vertical axis, so that the legend is above the curves. A share keeps its axis from 0 to 1."""
    legend = panel.get_legend()
    if legend is None or is_share or not panel.has_data():
        return
    lines = len(legend.get_texts()) + bool(legend.get_title().get_text())
    low, high = panel.get_ylim()
    panel.set_ylim(low, high + min(0.5, 0.08 * lines) * (high - low))
    legend.set_loc("upper left")


def _widen(panel: Any, least: float) -> None:
    """Let the vertical axis span at least ``least``, or a tenth of the values where that is more. Without it, noise in
    the third digit would fill the panel."""
    low, high = panel.get_ylim()
    least = max(least, 0.1 * max(abs(low), abs(high)))
    if high - low < least:
        middle = (low + high) / 2
        low, high = middle - least / 2, middle + least / 2
        panel.set_ylim((0.0, least) if low < 0 <= panel.dataLim.y0 else (low, high))


def _series(rows: Sequence[dict[str, Any]], key: str) -> Series:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float], width: int) -> list[float]:
    """The mean of each value and the up to ``width`` - 1 values before it. It uses no later values."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _line(panel: Any, rows: Sequence[dict[str, Any]], key: str, label: str, color: str, style: str = "-") -> None:
    steps, values = _series(rows, key)
    if steps:
        panel.plot(steps, values, style, color=color, alpha=0.25, linewidth=1)
        panel.plot(steps, _smooth(values, WIDTH), style, color=color, label=label, gid=SMOOTHED)


def _lines(*keys: tuple[str, str]) -> Callable[..., None]:
    """A function that draws several lines of a run, each in its own style.

    keys: pairs of a key of metrics.jsonl and its name in the legend.
    """

    def draw_run(panel: Any, rows: Sequence[dict[str, Any]], label: str, color: str, single: bool) -> None:
        for (key, name), style in zip(keys, ("-", "--", ":"), strict=False):
            _line(panel, rows, key, f"{label}{name}".strip(), color, style)

    return draw_run


def _rewards(panel: Any, rows: Sequence[dict[str, Any]], label: str, color: str, components: bool) -> None:
    drawn = [("reward", "reward_std", f"{label}reward (sum)", color)]
    if components:
        names = sorted({k for row in rows for k in row if k.startswith("reward/") and not k.endswith("/std")})
        names = [n for n in names if not n.startswith("reward/reward")]
        drawn += [(n, f"{n}/std", n.removeprefix("reward/"), f"C{i % 9 + 1}") for i, n in enumerate(names)]
    for key, spread, name, shade in drawn:
        steps, values = _series(rows, key)
        if not steps:
            continue
        mean = _smooth(values, WIDTH)
        total = key == "reward"  # The sum is drawn wide, because a single component would hide a thin line.
        width, alpha = (4.0, 0.5) if total else (1.5, 1.0)
        panel.plot(steps, mean, color=shade, label=name, linewidth=width, alpha=alpha, gid=SMOOTHED)
        std_steps, std = _series(rows, spread)
        if std_steps == steps:
            band = _smooth(std, WIDTH)
            least, most = _range(key, rows)
            low = [max(least, m - s) for m, s in zip(mean, band, strict=True)]
            high = [min(most, m + s) for m, s in zip(mean, band, strict=True)]
            panel.fill_between(steps, low, high, color=shade, alpha=0.10, linewidth=0)


def _range(key: str, rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The values that a logged reward can have. A metric is in [0, 1]. A sum of metrics is at least 0 if no weight is
    negative, and its largest value depends on the weights, which the log does not have."""
    if key != "reward":
        name = key.removeprefix("reward/").partition("@")[0]
        return (0.0, 1.0) if name in METRICS else (-math.inf, math.inf)
    components = {k.partition("@")[0].removeprefix("reward/") for row in rows for k in row if k.startswith("reward/")}
    summed = {name for name in components if not name.startswith("reward") and not name.endswith("/std")}
    lowest = min(_series(rows, "reward")[1], default=0.0)
    return (0.0 if summed and summed <= set(METRICS) and lowest >= 0 else -math.inf), math.inf


def _held_out(panel: Any, rows: Sequence[dict[str, Any]], label: str, color: str, single: bool) -> None:
    metric = next((k.removeprefix("eval/") for row in rows for k in row if k.startswith("eval/")), None)
    if metric is None:
        return
    for subset, shade in (("", color), ("/mismatch", "C1" if single else color)):
        steps, values = _series(rows, f"eval{subset}/{metric}")
        if not steps:
            continue
        where = "mismatch slice" if subset else "all queries"
        style = "o-" if single or not subset else "o:"
        panel.plot(steps, values, style, color=shade, markersize=4, label=f"{label}{metric}, {where}")
        raw = _series(rows, f"eval{subset}/raw/{metric}")[1]
        if raw:
            line = panel.axhline(raw[-1], color=shade, linestyle="--", linewidth=1)
            if single:  # A legend with a line for every run would hide the curves.
                line.set_label(f"raw query, {where}")


def _ratio(panel: Any, rows: Sequence[dict[str, Any]], label: str, color: str, single: bool) -> None:
    keys = [(importance_ratio.MEAN, "mean"), (importance_ratio.LEAST, "smallest"), (importance_ratio.MOST, "largest")]
    _lines(*(keys if single else keys[:1]))(panel, rows, label, color, single)
    if panel.has_data():
        panel.axhline(1.0, color="C1", linestyle="--", linewidth=1)


RATIO = "importance ratio of vLLM's completions: its mean should be near 1"
# Title -> (a function that draws one run, whether the values are shares from 0 to 1, the least span of the axis).
PANELS: dict[str, tuple[Callable[..., None], bool, float]] = {
    "reward while training (mean, band: ± 1 std)": (_rewards, False, 0.1),
    "held out, greedy": (_held_out, False, 0.1),
    "completion length": (
        _lines(("completions/mean_length", "tokens"), ("scorer/written_words", "words written")),
        False,
        0.0,
    ),
    "share of dead groups, and why": (
        _lines(
            ("frac_reward_zero_std", "all dead groups"),
            ("groups/all_zero", "every completion earned 0"),
            ("groups/all_perfect", "every completion was perfect"),
        ),
        True,
        0.0,
    ),
    "entropy per token (nats)": (_lines(("entropy", "entropy")), False, 0.1),
    "share of words copied from the query; share malformed": (
        _lines(("scorer/echo", "echo"), ("scorer/malformed", "malformed")),
        True,
        0.0,
    ),
    RATIO: (_ratio, False, 0.2),
    "queries to the retriever per batch": (_lines(("retrieval/queries", "distinct queries")), False, 1.0),
    "share of distinct queries, of cache hits, of errors": (
        _lines(
            ("retrieval/distinct", "distinct queries"),
            ("retrieval/cache_hits", "found in the cache"),
            ("retrieval/error_rate", "retriever failed"),
        ),
        True,
        0.0,
    ),
    "seconds per call of the retriever (last 100 calls)": (
        _lines(("retrieval/seconds/p50", "p50"), ("retrieval/seconds/p95", "p95")),
        False,
        0.05,
    ),
}
