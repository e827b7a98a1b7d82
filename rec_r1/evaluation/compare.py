"""Systems side by side: means with intervals, paired tests, and who won which query. Numbers only; pages elsewhere."""

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
ALPHA = 0.05
MIN_SLICE = 5  # queries; a slice of fewer says nothing
LENGTHS = ((1, 2), (3, 5), (6, 10), (11, None))  # words of a query
CHANGED = 8
RAW, TRAINED = "raw query", "trained"
# Slice -> the system whose own scores choose its queries. A slice chosen by a system's own low scores favours every
# other system, so no test is made against that system there.
CHOSEN_BY = {"mismatch": RAW}


def slices(raw: np.ndarray, below: float) -> dict[str, np.ndarray]:
    """name -> (Q,) bool: all queries, and the vocabulary mismatch (raw score under ``below``)."""
    return {"all": np.ones(len(raw), bool), "mismatch": raw < below}


def more_slices(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The task's own labels ("target=cold") and the query's length in words, where it varies; name -> (Q,) bool."""
    labels: dict[str, list[str]] = {
        name: [row["slices"].get(name, "") for row in rows] for name in (rows[0]["slices"] if rows else ())
    }
    if "target" not in labels:  # a history's titles are long or short by chance
        labels["length"] = [_length(row["query"]) for row in rows]
    out: dict[str, np.ndarray] = {}
    for name, values in labels.items():
        distinct = sorted(set(values), key=lambda v: (-values.count(v), v))[:12]
        if len(distinct) > 1:
            out |= {f"{name}={v}": np.array([value == v for value in values]) for v in distinct if v}
    return {name: chosen for name, chosen in out.items() if chosen.sum() >= MIN_SLICE}


def _length(query: str) -> str:
    count = len(words(query))
    low, high = next((low, high) for low, high in LENGTHS if high is None or count <= high)
    return f"{low}-{high}" if high else f"{low}+"


def compare(
    systems: Mapping[str, System], metrics: Sequence[str], below: float, reference: str | None = None
) -> dict[str, Any]:
    """Tables for every metric and slice, and what they say; see `write` for the keys.

    reference: the system compared with all others; None = `trained` where it is there, else every system is compared
    with the raw query. p values are corrected (Holm) over all comparisons of one metric that are tested; the others,
    see `CHOSEN_BY`, have None. The queries of one user are resampled and tested together. Means of several samples
    have a row beside single answers and are not compared with them. metrics: the first chooses the mismatch slice and
    the examples. Raises KeyError without the raw query, which defines the mismatch slice.
    """
    first = metrics[0]
    reference = reference or (TRAINED if TRAINED in systems else RAW)
    chosen = slices(systems[RAW].scores(first), below) | more_slices(systems[RAW].rows)
    users = np.array(systems[RAW].users)
    tables = []
    for metric in metrics:
        have = {name: s.scores(metric) for name, s in systems.items()}
        have = {name: values for name, values in have.items() if not np.isnan(values).all()}
        alike = [name for name in have if systems[name].samples in (1, systems[reference].samples)]
        mine = [
            _table(metric, name, mask, have, reference, users, alike) for name, mask in chosen.items() if mask.any()
        ]
        tested = [c for table in mine for c in table["comparisons"] if c["p"] is not None]
        for comparison, corrected in zip(tested, holm([c["p"] for c in tested]), strict=True):
            comparison["p_holm"] = corrected
        tables += mine
    result = {"reference": reference, "metrics": list(metrics), "tables": tables, "queries": len(users)}
    result["users"] = len(set(users)) if len(set(users)) < len(users) else None  # None: each query stands for itself
    result["best_baseline"] = _best_baseline(tables, reference)
    result["changed"] = _changed(systems, first) if TRAINED in systems else {"improved": [], "worsened": []}
    return result


def compare_samples(
    systems: Mapping[str, System], metrics: Sequence[str], below: float, samples: int
) -> dict[str, Any]:
    """`compare` for the policies that answered with so many samples, and the raw query."""
    chosen = {name: s for name, s in systems.items() if s.samples == samples or name == RAW}
    trained = sampled_name(TRAINED, samples)
    return compare(chosen, metrics, below, reference=trained if trained in chosen else RAW) | {"samples": samples}


def _table(
    metric: str, name: str, mask: np.ndarray, scores: Mapping[str, np.ndarray], reference: str, users: np.ndarray,
    alike: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    groups = users[mask].tolist()
    rows = [{"system": system, **bootstrap(values[mask], groups=groups)} for system, values in scores.items()]
    comparisons = []
    for other in alike:
        if reference not in scores or other == reference:
            continue
        one, two = (reference, other) if reference != RAW else (other, RAW)
        difference = (scores[one] - scores[two])[mask]
        interval = bootstrap(difference, groups=groups)
        tested = CHOSEN_BY.get(name) not in (one, two)
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
    """The result in one sentence: the reference against the best other system, on all queries and the first metric."""
    if reference == RAW or not tables:
        return None
    table = tables[0]
    compared = [c["against"] for c in table["comparisons"]]
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
    """Ids of the queries that training changed most: against the untrained policy, else against the raw query."""
    before = systems.get("untrained") or systems[RAW]
    difference = np.nan_to_num(systems[TRAINED].scores(metric) - before.scores(metric))
    order = np.argsort(difference, kind="stable")
    ids = [row["query_id"] for row in systems[TRAINED].rows]
    return {
        "improved": [ids[q] for q in order[::-1][:CHANGED] if difference[q] > 0],
        "worsened": [ids[q] for q in order[:CHANGED] if difference[q] < 0],
    }


def write(
    run: Path, part: str, systems: Mapping[str, System], result: dict[str, Any], about: Mapping[str, Any]
) -> None:
    """evaluation/PART/comparison.json: ``result`` with what was compared. NaN is written as null."""
    whole = {
        "part": part,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "alpha": ALPHA,
        "resamples": RESAMPLES,
        **about,
        **result,
        "systems": {
            name: {"kind": s.kind, "description": s.description, "statistics": s.statistics, "cost": s.cost}
            for name, s in systems.items()
        },
    }
    text = json.dumps(_without_nan(whole), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder_of(run, part) / "comparison.json", text)


def read(run: Path, part: str) -> dict[str, Any]:
    """evaluation/PART/comparison.json as `write` wrote it. Raises UserError where it is damaged."""
    path = folder_of(run, part) / "comparison.json"
    result = read_json(path, HOW_TO_REPEAT)
    for key in ("part", "metrics", "reference", "tables", "systems", "queries", "changed"):
        if key not in result:
            raise UserError(f"{path}: damaged (no {key}): {HOW_TO_REPEAT}")
    return result


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value
