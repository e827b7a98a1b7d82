"""Show an audit as text: its tables, and its verdict in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rec_r1.evaluation.compare import ALPHA, TRAINED
from rec_r1.evaluation.number_format import number, p_value, percent
from rec_r1.evaluation.tables import aligned, difference, with_interval

STUFFS = 0.1  # A policy stuffs or copies if more than this share of its completions is stuffed or copied.


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
    best = min(comparisons, key=lambda c: c["difference"])
    shown = f"trained - {best['against']}: {_numbers(best)}"
    if not _is_clear(best):
        return f"An adversary earns as much reward as the trained policy, or no difference is shown ({shown})."
    if best["difference"] < 0:
        return f"An adversary earns more reward than the trained policy ({shown})."
    return f"No adversary earns as much reward as the trained policy ({shown})."


def _of_words(completions: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether the trained policy stuffs or copies."""
    before, after = (next(row for row in completions if row["of"] == name) for name in ("untrained", TRAINED))
    if number(after["stuffed"]) == "–":  # Stuffing is defined for queries only.
        return []
    found = []
    for key, does, past in (("stuffed", "stuffs", "stuffed"), ("copies", "copies the query", "copies")):
        does_not = {"stuffs": "does not stuff", "copies the query": "does not copy the query"}[does]
        said = does if after[key] > STUFFS else does_not
        shares = f"{percent(after[key])} of its completions are {past} ({percent(before[key])} before training)"
        found.append(f"The trained policy {said}: {shares}.")
    return found


def _at_equal_length(gains: Mapping[str, Any], metric: str) -> str:
    return (
        f"At the untrained policy's lengths, training gains {metric} {_numbers(gains['cut'])}; with whole completions, "
        f"{_numbers(gains['whole'])}."
    )


def _on_another_retriever(gains: Mapping[str, Any], metric: str) -> str:
    own, other = gains["own"], gains["other"]
    kept = (
        f", {percent(other['difference'] / own['difference'])} of it"
        if _is_clear(own) and own["difference"] > 0
        else ""
    )
    return (
        f"On {gains['retriever']}, training gains {metric} {_numbers(other)}{kept}; on the run's own retriever, "
        f"{_numbers(own)}."
    )


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
        cells += [number(row["words"]["mean"], 1), number(row["stuffing"]["mean"])]
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
    return "\n\n".join([aligned(lines), aligned(words), result["definition"], "\n".join(result["verdict"])])
