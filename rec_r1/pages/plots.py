"""Pictures of runs: reward curves of one or several, in one PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rec_r1 import runs

Series = tuple[list[int], list[float]]
Logs = dict[str, list[dict[str, Any]]]
# Shares of the figure. A layout that matplotlib computes takes as long as all else of the drawing.
MARGINS = {"left": 0.05, "right": 0.99, "bottom": 0.04, "top": 0.97, "wspace": 0.2, "hspace": 0.24}


def draw(folders: Sequence[Path], output: Path) -> None:
    """All `PANELS` for the runs in ``folders`` into ``output``, replaced atomically.

    One run shows its reward's components, several are laid over each other by their total reward. Raises UserError
    where a folder holds no metrics.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    logs = named_logs(folders)
    figure, axes = plt.subplots(3, 3, figsize=(15, 12), gridspec_kw=MARGINS)
    for panel, title in zip(axes.ravel(), PANELS, strict=True):
        fill(panel, title, logs)
        panel.set_title(title, fontsize=11)
    temporary = output.with_name(f".{output.stem}.tmp.png")
    figure.savefig(temporary, dpi=100)
    plt.close(figure)
    temporary.replace(output)


def named_logs(folders: Sequence[Path]) -> Logs:
    """A run's name -> its rows of metrics.jsonl. Raises UserError where a folder has none."""
    return {name: runs.read_metrics(folder) for name, folder in zip(runs.names(folders), folders, strict=True)}


def fill(panel: Any, title: str, logs: Logs) -> None:
    """Draw the panel of `PANELS` called ``title``, all runs over each other, into matplotlib axes."""
    draw_run, is_share = PANELS[title]
    single = len(logs) == 1
    for number, (name, rows) in enumerate(logs.items()):
        draw_run(panel, rows, "" if single else f"{name} ", f"C{number % 10}", single)
    panel.set_xlabel("step")
    panel.grid(alpha=0.3)
    if len(panel.get_legend_handles_labels()[0]) > single:
        panel.legend(fontsize=8 if single else 7, framealpha=0.6)
    if is_share:
        panel.set_ylim(-0.02, 1.02)


def _series(rows: Sequence[dict[str, Any]], key: str) -> Series:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float], width: int) -> list[float]:
    """Trailing mean over at most ``width`` values: shows only what was known at that step."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _line(panel: Any, rows: Sequence[dict[str, Any]], key: str, label: str, color: str, style: str = "-") -> None:
    steps, values = _series(rows, key)
    if steps:
        panel.plot(steps, values, style, color=color, alpha=0.25, linewidth=1)
        panel.plot(steps, _smooth(values, 10), style, color=color, label=label)


def _lines(*keys: tuple[str, str]) -> Callable[..., None]:
    """A panel of several lines: (key of metrics.jsonl, what the legend calls it), each in its own style."""

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
        mean = _smooth(values, 10)
        total = key == "reward"  # drawn wide: with one reward the sum lies under its component
        panel.plot(steps, mean, color=shade, label=name, linewidth=4 if total else 1.5, alpha=0.5 if total else 1)
        std_steps, std = _series(rows, spread)
        if std_steps == steps:
            band = _smooth(std, 10)
            low = [m - s for m, s in zip(mean, band, strict=True)]
            high = [m + s for m, s in zip(mean, band, strict=True)]
            panel.fill_between(steps, low, high, color=shade, alpha=0.10, linewidth=0)


def _held_out(panel: Any, rows: Sequence[dict[str, Any]], label: str, color: str, single: bool) -> None:
    metric = next((k.removeprefix("eval/") for row in rows for k in row if k.startswith("eval/")), None)
    if metric is None:
        return
    for part, shade in (("", color), ("/mismatch", "C1" if single else color)):
        steps, values = _series(rows, f"eval{part}/{metric}")
        if not steps:
            continue
        where = "mismatch slice" if part else "all queries"
        style = "o-" if single or not part else "o:"
        panel.plot(steps, values, style, color=shade, markersize=4, label=f"{label}{metric}, {where}")
        raw = _series(rows, f"eval{part}/raw/{metric}")[1]
        if raw:
            line = panel.axhline(raw[-1], color=shade, linestyle="--", linewidth=1)
            if single:  # several runs have one raw query, and a legend of eight lines hides the curves
                line.set_label(f"raw query, {where}")


# title -> (what draws one run into it, whether its values are shares)
PANELS: dict[str, tuple[Callable[..., None], bool]] = {
    "reward while training (mean, band: ± 1 std)": (_rewards, False),
    "held out, greedy": (_held_out, False),
    "completion length": (
        _lines(("completions/mean_length", "tokens"), ("scorer/written_words", "words written")),
        False,
    ),
    "groups without variance (share), and why": (
        _lines(
            ("frac_reward_zero_std", "all of them"),
            ("groups/all_zero", "every completion earned 0"),
            ("groups/all_perfect", "every completion was perfect"),
        ),
        True,
    ),
    "entropy per token (nats)": (_lines(("entropy", "")), False),
    "share of words copied from the query; share malformed": (
        _lines(("scorer/echo", "echo"), ("scorer/malformed", "malformed")),
        True,
    ),
    "queries to the retriever, a batch": (_lines(("retrieval/queries", "distinct queries")), False),
    "share of the completions that ask something new; cache; errors": (
        _lines(
            ("retrieval/distinct", "distinct"),
            ("retrieval/cache_hits", "known to the cache"),
            ("retrieval/error_rate", "retriever failed"),
        ),
        True,
    ),
    "seconds a call of the retriever (of the last 100)": (
        _lines(("retrieval/seconds/p50", "p50"), ("retrieval/seconds/p95", "p95")),
        False,
    ),
}
