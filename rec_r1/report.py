"""Pictures of runs: reward curves of one or several, in one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rec_r1 import runs

Series = tuple[list[int], list[float]]


def draw(folders: Sequence[Path], output: Path) -> None:
    """Six panels for the runs in ``folders`` into ``output``, replaced at one stroke.

    Reward and its components with their spread; held-out metric with the raw query's line; completion length;
    share of groups without variance; entropy; malformed and echo share. One run shows its components, several
    are laid over each other by their total reward. Raises UserError where a folder holds no metrics.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    names = [folder.name for folder in folders]  # two runs of one name go by their paths
    logs = {
        folder.name if names.count(folder.name) == 1 else str(folder): runs.read_metrics(folder) for folder in folders
    }
    figure, axes = plt.subplots(3, 3, figsize=(15, 12), constrained_layout=True)
    panels = axes.ravel()
    single = len(logs) == 1
    for number, (name, rows) in enumerate(logs.items()):
        color = f"C{number % 10}"
        label = "" if single else f"{name} "
        _rewards(panels[0], rows, label, color, components=single)
        _held_out(panels[1], rows, label, color, single)
        _line(panels[2], rows, "completions/mean_length", f"{label}tokens", color)
        _line(panels[2], rows, "scorer/written_words", f"{label}words written", color, "--")
        _line(panels[3], rows, "frac_reward_zero_std", name, color)
        _line(panels[4], rows, "entropy", name, color)
        _line(panels[5], rows, "scorer/echo", f"{label}echo", color)
        _line(panels[5], rows, "scorer/malformed", f"{label}malformed", color, "--")
        _line(panels[6], rows, "retrieval/queries", f"{label}distinct queries", color)
        _line(panels[7], rows, "retrieval/distinct", f"{label}distinct", color)
        _line(panels[7], rows, "retrieval/cache_hits", f"{label}known to the cache", color, "--")
        _line(panels[7], rows, "retrieval/error_rate", f"{label}retriever failed", color, ":")
        _line(panels[8], rows, "retrieval/seconds/p50", f"{label}p50", color)
        _line(panels[8], rows, "retrieval/seconds/p95", f"{label}p95", color, "--")
    titles = (
        "reward while training (mean, band: ± 1 std)",
        "held out, greedy",
        "completion length",
        "groups without variance (share)",
        "entropy per token (nats)",
        "share of words copied from the query; share malformed",
        "queries to the retriever, a batch",
        "share of the completions that ask something new; cache; errors",
        "seconds a call of the retriever (of the last 100)",
    )
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        if not single or len(panel.get_legend_handles_labels()[0]) > 1:
            panel.legend(fontsize=8 if single else 7, framealpha=0.6)
    panels[3].set_ylim(-0.02, 1.02)
    panels[5].set_ylim(-0.02, 1.02)
    panels[7].set_ylim(-0.02, 1.02)
    temporary = output.with_name(f".{output.stem}.tmp.png")
    figure.savefig(temporary, dpi=100)
    plt.close(figure)
    temporary.replace(output)


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
