"""Show an audit as text: its tables, and its verdict in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rec_r1.evaluation.compare import ALPHA, TRAINED
from rec_r1.evaluation.number_format import number, p_value, percent
from rec_r1.evaluation.tables import aligned, difference, with_interval

STUFFS = 0.1  # A policy stuffs or copies if more than this share of its completions is stuffed or copied.

NOTES = (
    "Intervals are 95% intervals over queries. The p values are corrected by Holm over the adversaries. Words are "
    "those that a system itself writes. echo: the share of a completion's words that are in its query. repeated: the "
    "share of them that repeat an earlier one. documents of a word: the share of the catalogue that has it. stuffing: "
    "the mean of the reward of this name."
)


def verdict(result: Mapping[str, Any]) -> list[str]:
    """The verdict in sentences. result: from :func:`rec_r1.evaluation.audit.audit`."""
    found = [_of_adversaries(result["comparisons"]), *_of_words(result["completions"])]
    if result["equal_length"] is not None:
        found.append(_at_equal_length(result["equal_length"], result["metric"]))
    if result["retention"] is not None:
        found.append(_on_another_retriever(result["retention"], result["metric"]))
    return found


def _of_adversaries(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Whether an adversary earns as much reward as the trained policy."""
    clear = [c for c in comparisons if _is_clear(c)]
    unclear = [c for c in comparisons if not _is_clear(c)]
    best = min([c for c in clear if c["difference"] < 0] or unclear or clear, key=lambda c: c["difference"])
    shown = f"trained - {best['against']}: {_numbers(best)}"
    if not _is_clear(best):
        return f"An adversary earns as much reward as the trained policy, or no difference is shown ({shown})."
    if best["difference"] < 0:
        return f"An adversary earns more reward than the trained policy ({shown})."
    return f"No adversary earns as much reward as the trained policy ({shown})."


def _of_words(completions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether the trained policy stuffs, and whether it copies."""
    before, after = (next(row for row in completions if row["of"] == name) for name in ("untrained", TRAINED))
    if np.isnan(after["stuffed"]):  # Stuffing is defined for queries only.
        return []
    found = []
    for key, does, does_not in (
        ("stuffed", "stuffs", "does not stuff"),
        ("copies", "copies the query", "does not copy the query"),
    ):
        said = does if after[key] > STUFFS else does_not
        shares = f"{percent(after[key])} of its completions are {key}, {percent(before[key])} before training"
        found.append(f"The trained policy {said}: {shares}.")
    if after["stuffed"] <= STUFFS:
        found += _of_rollouts(completions[2:])
    return found


def _of_rollouts(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether the training learnt to stuff after the checkpoint that became the best policy.

    steps: the statistics of the first and of the last recorded step, or fewer.
    """
    if len(steps) < 2:
        return []
    first, last = steps[0], steps[-1]
    if not last["stuffed"] > max(STUFFS, first["stuffed"]):
        return []
    return [
        f"But at its end the training was learning to stuff ({last['of']}): {percent(last['stuffed'])} of the "
        f"completions are stuffed, and {percent(last['repeated'])} of their words are repeated; at its start these "
        f"were {percent(first['stuffed'])} and {percent(first['repeated'])} ({first['of']})."
    ]


def _at_equal_length(gains: Mapping[str, Any], metric: str) -> str:
    """The gain with completions as long as the untrained policy's, and with whole ones."""
    return (
        f"With completions cut to the untrained policy's lengths, training {_change(gains['cut'], metric)}; with whole "
        f"completions, it {_change(gains['whole'], metric)}."
    )


def _on_another_retriever(gains: Mapping[str, Any], metric: str) -> str:
    """The gain on another retriever, and its share of the gain on the run's own where both are shown."""
    own, other = gains["own"], gains["other"]
    kept = ""
    if _is_clear(own) and own["difference"] > 0 and _is_clear(other):
        kept = f", {percent(other['difference'] / own['difference'])} of the gain on the run's own retriever"
    return f"On {gains['retriever']}, training {_change(other, metric)}{kept}."


def _change(gain: Mapping[str, Any], metric: str) -> str:
    """What training does to a metric. A change is claimed only where it is shown."""
    if _is_clear(gain):
        return f"changes {metric} by {_numbers(gain)}"
    return f"is not shown to change {metric} ({_numbers(gain)})"


def _is_clear(comparison: Mapping[str, Any]) -> bool:
    """Whether a difference is shown: interval and p agree."""
    return bool(comparison["p_holm"] < ALPHA and not comparison["low"] <= 0 <= comparison["high"])


def _numbers(comparison: Mapping[str, Any]) -> str:
    interval = f"[{comparison['low']:+.3f}, {comparison['high']:+.3f}]"
    return f"{comparison['difference']:+.3f} {interval}, p{p_value(comparison['p_holm'])}"


def text(result: Mapping[str, Any]) -> str:
    """The tables of an audit, the definition of its terms, and its verdict.

    result: from :func:`rec_r1.evaluation.audit.audit`.
    """
    against = {c["against"]: c for c in result["comparisons"]}
    lines = [
        [
            f"{result['part']} (n={result['queries']})",
            "reward",
            result["metric"],
            "words",
            "stuffing",
            "trained - adversary, reward",
        ]
    ]
    for row in result["systems"]:
        cells = [with_interval(row["reward"]), with_interval(row["metric"])]
        cells += [with_interval(row["words"], 1), number(row["stuffing"])]
        compared = against.get(row["system"])
        lines.append([row["system"], *cells, "" if compared is None else difference(compared)])
    shares = ("echo", "repeated", "documents", "copies", "stuffed", "malformed")
    words = [
        [
            "completions of",
            "words",
            "echo",
            "repeated",
            "documents of a word",
            "copies",
            "stuffed",
            "malformed",
            "stuffing",
        ]
    ]
    for row in result["completions"]:
        shown = [percent(row[key], 1 if key == "documents" else 0) for key in shares]
        words.append([row["of"], number(row["words"], 1), *shown, number(row["stuffing"])])
    notes = f"{NOTES} {result['definition']}"
    return "\n\n".join([aligned(lines), aligned(words), notes, "\n".join(result["verdict"])])
