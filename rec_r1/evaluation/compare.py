"""Compare systems: means with intervals, paired tests, and the number of queries that each system wins."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rec_r1.config import UserError
from rec_r1.evaluation.records import HOW_TO_REPEAT, System, folder_of, sampled_name
from rec_r1.evaluation.significance import RESAMPLES, bootstrap, holm, randomisation
from rec_r1.runs import read_json, write_atomically
from retrievers.text.analysis import words

logger = logging.getLogger(__name__)
ALPHA = 0.05  # The level of significance.
MIN_SLICE_QUERIES = 5  # Slices of fewer queries are not reported.
LENGTH_RANGES = ((1, 2), (3, 5), (6, 10), (11, None))  # The slices by length: first and last number of words.
SHOWN_CHANGES = 8  # Reports show so many queries that training improved most, and so many that it worsened most.
RAW, TRAINED = "raw query", "trained"  # Names of systems.
# Slice -> the system whose own scores choose its queries. A slice chosen by a system's own low scores favours every
# other system, so no test is made against that system there.
CHOSEN_BY = {"mismatch": RAW}


def slices(raw: np.ndarray, below: float) -> dict[str, np.ndarray]:
    """The two slices of every evaluation: "all", and "mismatch", in which the raw query scores low.

    raw: (Q,) scores of the raw queries.
    below: the mismatch slice holds the queries whose raw score is below this.

    Returns name -> (Q,) bool.
    """
    return {"all": np.ones(len(raw), bool), "mismatch": raw < below}


def more_slices(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The slices by the task's labels ("target=cold") and by the length of the query in words ("length=3-5").

    rows: Q rows of a system. Rows with histories get no slices by length.

    Returns name -> (Q,) bool, without slices of fewer than MIN_SLICE_QUERIES queries.
    """
    labels: dict[str, list[str]] = {
        name: [row["slices"].get(name, "") for row in rows] for name in (rows[0]["slices"] if rows else ())
    }
    if "target" not in labels:  # Where queries are titles of a history, their length means nothing.
        labels["length"] = [_length(row["query"]) for row in rows]
    out: dict[str, np.ndarray] = {}
    for name, values in labels.items():
        distinct = sorted(set(values), key=lambda v: (-values.count(v), v))[:12]
        if len(distinct) > 1:
            out |= {f"{name}={v}": np.array([value == v for value in values]) for v in distinct if v}
    return {name: chosen for name, chosen in out.items() if chosen.sum() >= MIN_SLICE_QUERIES}


def _length(query: str) -> str:
    count = len(words(query))
    low, high = next((low, high) for low, high in LENGTH_RANGES if high is None or count <= high)
    return f"{low}-{high}" if high else f"{low}+"


def compare(
    systems: Mapping[str, System], metrics: Sequence[str], below: float, reference: str | None = None
) -> dict[str, Any]:
    """Compare systems in every metric and on every slice.

    The p values are corrected by Holm over all tested comparisons of one metric. A comparison that is not tested has p
    None: one of its systems chose the queries (see `CHOSEN_BY`), or no query has a value in both. The queries of one
    user are resampled and tested together. A system whose scores are means of several samples has a row in the tables,
    but is not compared with systems of another number of samples. A system that reads the judgments has a row, and is
    compared with no other system.

    systems: name -> system. The raw query must be among them, because its scores choose the mismatch slice.
    metrics: names of metrics. The first chooses the mismatch slice, the best baseline and the changed queries.
    below: the mismatch slice holds the queries whose raw score in the first metric is below this.
    reference: the system that is compared with all others. None = `trained`, or, where it is missing, every system is
        compared with the raw query.

    Returns "reference", "metrics", "queries" (their number), "users" (their number where some have several queries,
    else None), "tables" (one per metric and slice: "metric", "slice", "n", "rows", "comparisons"), "best_baseline" (the
    comparison with the best other system, or None), "changed" (ids of the queries that training changed most) and
    "upper_bounds" (the systems that read the judgments).
    Raises KeyError without the raw query.
    """
    first = metrics[0]
    reference = reference or (TRAINED if TRAINED in systems else RAW)
    chosen = slices(systems[RAW].scores(first), below) | more_slices(systems[RAW].rows)
    users = np.array(systems[RAW].users)
    upper_bounds = [name for name, system in systems.items() if system.reads_judgments]
    tables = []
    for metric in metrics:
        scores = {name: s.scores(metric) for name, s in systems.items()}
        scores = {name: values for name, values in scores.items() if not np.isnan(values).all()}
        comparable = [
            name
            for name in scores
            if systems[name].samples in (1, systems[reference].samples) and name not in upper_bounds
        ]
        of_metric = [
            _table(metric, name, mask, scores, reference, users, comparable)
            for name, mask in chosen.items()
            if mask.any()
        ]
        tested = [c for table in of_metric for c in table["comparisons"] if c["p"] is not None]
        for comparison, corrected in zip(tested, holm([c["p"] for c in tested]), strict=True):
            comparison["p_holm"] = corrected
        tables += of_metric
    result = {"reference": reference, "metrics": list(metrics), "tables": tables, "queries": len(users)}
    result["users"] = len(set(users)) if len(set(users)) < len(users) else None  # None = no user has several queries.
    result["upper_bounds"] = upper_bounds
    result["best_baseline"] = _best_baseline(tables, reference)
    result["changed"] = _changed(systems, first) if TRAINED in systems else {"improved": [], "worsened": []}
    return result


def compare_samples(
    systems: Mapping[str, System], metrics: Sequence[str], below: float, samples: int
) -> dict[str, Any]:
    """:func:`compare` for the raw query and the policies that wrote ``samples`` completions per query.

    The other arguments are those of :func:`compare`.
    """
    chosen = {name: s for name, s in systems.items() if s.samples == samples or name == RAW}
    trained = sampled_name(TRAINED, samples)
    return compare(chosen, metrics, below, reference=trained if trained in chosen else RAW) | {"samples": samples}


def _table(
    metric: str, name: str, mask: np.ndarray, scores: Mapping[str, np.ndarray], reference: str, users: np.ndarray,
    comparable: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The table of one metric on one slice.

    metric, name: of the metric and of the slice.
    mask: (Q,) bool: the queries of the slice.
    scores: system -> (Q,) scores.
    reference: the system that is compared with the others.
    users: (Q,) labels: who asks each query.
    comparable: the systems that are compared with the reference.
    """
    groups = users[mask].tolist()
    rows = [{"system": system, **bootstrap(values[mask], groups=groups)} for system, values in scores.items()]
    comparisons = []
    for other in comparable:
        if reference not in scores or other == reference:
            continue
        one, two = (reference, other) if reference != RAW else (other, RAW)
        difference = (scores[one] - scores[two])[mask]
        interval = bootstrap(difference, groups=groups)
        tested = CHOSEN_BY.get(name) not in (one, two) and bool(interval["n"])
        comparisons.append(
            {
                "system": one,
                "against": two,
                "difference": interval["mean"],
                "low": interval["low"],
                "high": interval["high"],
                "p": randomisation(difference, groups=groups) if tested else None,
                "p_holm": None,
                "wins": int((difference > 0).sum()),
                "ties": int((difference == 0).sum()),
                "losses": int((difference < 0).sum()),
            }
        )
    return {"metric": metric, "slice": name, "n": int(mask.sum()), "rows": rows, "comparisons": comparisons}


def _best_baseline(tables: Sequence[Mapping[str, Any]], reference: str) -> dict[str, Any] | None:
    """The comparison of the reference with the best other system, on all queries and in the first metric.

    Returns None where there is none. "verdict" is better, worse or no difference shown.
    """
    if reference == RAW or not tables:
        return None
    table = tables[0]
    compared = [c["against"] for c in table["comparisons"] if c["p"] is not None]
    others = [row for row in table["rows"] if row["system"] in compared]
    if not others:
        return None
    best = max(others, key=lambda row: row["mean"])
    against = next(c for c in table["comparisons"] if c["against"] == best["system"])
    clear = against["p_holm"] < ALPHA and not against["low"] <= 0 <= against["high"]
    verdict = "no difference shown" if not clear else "better" if against["difference"] > 0 else "worse"
    keys = ("difference", "low", "high", "p_holm")
    return {"metric": table["metric"], "system": best["system"], "verdict": verdict, **{k: against[k] for k in keys}}


def _changed(systems: Mapping[str, System], metric: str) -> dict[str, list[str]]:
    """The ids of the queries whose score changed most from the untrained policy (or the raw query) to the trained."""
    before = systems.get("untrained") or systems[RAW]
    difference = np.nan_to_num(systems[TRAINED].scores(metric) - before.scores(metric))
    order = np.argsort(difference, kind="stable")
    ids = [row["query_id"] for row in systems[TRAINED].rows]
    return {
        "improved": [ids[q] for q in order[::-1][:SHOWN_CHANGES] if difference[q] > 0],
        "worsened": [ids[q] for q in order[:SHOWN_CHANGES] if difference[q] < 0],
    }


def write(
    run: Path, split: str, systems: Mapping[str, System], result: dict[str, Any], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a comparison to evaluation/SPLIT/comparison.json of a run, atomically. NaN is written as null.

    run: the run's folder.
    split: the name of the split.
    systems: the systems that were compared. Their descriptions, statistics and costs are written, too.
    result: what :func:`compare` returned.
    about: further values, such as the names of the task and the retriever.

    Returns the content, in which NaN is kept.
    """
    whole: dict[str, Any] = {
        "part": split,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "alpha": ALPHA,
        "resamples": RESAMPLES,
        **about,
        **result,
        "systems": {
            name: {
                "kind": s.kind,
                "description": s.description,
                "statistics": s.statistics,
                "cost": s.cost,
                "used": s.used,
                "step": s.step,
            }
            for name, s in systems.items()
        },
    }
    text = json.dumps(without_nan(whole), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder_of(run, split) / "comparison.json", text)
    return whole


def read(run: Path, split: str) -> dict[str, Any]:
    """Read the comparison.json that :func:`write` wrote. Raises UserError where it is damaged."""
    path = folder_of(run, split) / "comparison.json"
    result = read_json(path, HOW_TO_REPEAT)
    for key in ("part", "created", "metrics", "reference", "tables", "systems", "queries", "changed", "best_baseline"):
        if key not in result:
            raise UserError(f"{path}: damaged (no {key}): {HOW_TO_REPEAT}")
    return result


def without_nan(value: Any) -> Any:
    """``value`` with null in place of every NaN, as JSON needs it."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value
