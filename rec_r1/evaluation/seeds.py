"""Compare the trained policies of all seeds of a recipe with the raw query and the untrained policy.

A folder of seeds has one run per seed, `seed-0`, `seed-1`, …, and the comparison over all of them, `seeds.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rec_r1 import config, runs
from rec_r1.config import UserError
from rec_r1.environment import metric_names
from rec_r1.evaluation import compare, records
from rec_r1.evaluation.records import System
from rec_r1.evaluation.significance import over_seeds

COMPARED_WITH = (compare.RAW, "untrained")
RECORD = "seeds.json"


def runs_in(folder: Path) -> list[Path]:
    """The runs in a folder of seeds, sorted by seed. [] = it is no folder of seeds."""
    found = [path for path in folder.glob("seed-*") if (path / config.RUN_FILE).is_file() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def measure(folder: Path, split: str = "test") -> dict[str, Any]:
    """Compare the trained policies of all seeds in ``folder`` with the raw query and the untrained policy.

    folder: the folder of seeds, whose runs are evaluated already.
    split: the name of the split.

    Writes seeds.json, and returns its content: `part` (the split), `seeds`, `queries` (their number), `metrics`, and
    `tables`, one per metric and slice. Each row of a table has the mean over seeds and queries with its interval (see
    `significance.over_seeds`), and the mean of every seed. Raises UserError for fewer than two runs, for a run without
    an evaluation, and where the seeds were evaluated on different queries.
    """
    found = runs_in(folder)
    if len(found) < 2:
        raise UserError(f"{folder}: fewer than two runs called seed-N: rec-r1 train RECIPE --seeds 5 makes them")
    each = [_systems(run, split) for run in found]  # The systems of each seed.
    ids = [[row["query_id"] for row in one[compare.TRAINED].rows] for one in each]
    if any(queries != ids[0] for queries in ids):
        raise UserError(f"{folder}: its seeds were evaluated on different queries: evaluate them again")
    shared = [m for m in each[0][compare.TRAINED].rows[0]["metrics"] if all(_has(one, m) for one in each)]
    recipe = config.load(found[0] / config.RUN_FILE)
    first = metric_names(recipe.evaluation.metrics)[0]
    chosen = compare.slices(each[0][compare.RAW].scores(first), recipe.evaluation.mismatch_below)
    tables = [_table(each, metric, name, mask) for metric in shared for name, mask in chosen.items() if mask.any()]
    seeds = [int(run.name[5:]) for run in found]
    result = {"part": split, "seeds": seeds, "queries": len(ids[0]), "metrics": shared, "tables": tables}
    runs.write_atomically(folder / RECORD, json.dumps(result, indent=1))
    return result


def _systems(run: Path, split: str) -> dict[str, System]:
    """The systems of one run. Raises UserError where one that is compared is missing."""
    found = records.load_all(run, split)
    missing = next((name for name in (compare.TRAINED, *COMPARED_WITH) if name not in found), None)
    if missing is not None:
        again = f"rec-r1 eval {run}" + (f" --split {split}" if split != "test" else "")
        raise UserError(f"{run}: its {split} split has no answers of {missing!r}: run {again}")
    return found


def _has(found: dict[str, System], metric: str) -> bool:
    """Whether all compared systems have a value of the metric for every query."""
    return all(not np.isnan(found[name].scores(metric)).any() for name in (compare.TRAINED, *COMPARED_WITH))


def _table(each: Sequence[dict[str, System]], metric: str, name: str, mask: np.ndarray) -> dict[str, Any]:
    """The table of one metric on the slice ``name``, whose queries ``mask`` marks, (Q,) bool."""
    users = np.array(each[0][compare.TRAINED].users)[mask].tolist()
    scores = {
        system: np.stack([found[system].scores(metric)[mask] for found in each])
        for system in (compare.TRAINED, *COMPARED_WITH)
    }
    rows = [{"system": system, **_over(values, users)} for system, values in scores.items()]
    differences = []
    for other in COMPARED_WITH:
        gained = scores[compare.TRAINED] - scores[other]
        outcomes = [[int((row > 0).sum()), int((row == 0).sum()), int((row < 0).sum())] for row in gained]
        differences.append({"against": other, **_over(gained, users), "won_tied_lost": outcomes})
    return {"metric": metric, "slice": name, "n": int(mask.sum()), "rows": rows, "differences": differences}


def _over(values: np.ndarray, users: Sequence[str]) -> dict[str, Any]:
    """The mean of (S, Q) values with its interval, and the mean of each of the S seeds."""
    return {**over_seeds(values, users), "by_seed": [float(mean) for mean in values.mean(axis=1)]}


def text(result: dict[str, Any]) -> str:
    """The tables of :func:`measure` for a terminal."""
    return "\n\n".join(_text(result, metric) for metric in result["metrics"])


def _text(result: dict[str, Any], metric: str) -> str:
    tables = [table for table in result["tables"] if table["metric"] == metric]
    seeds = result["seeds"]
    lines = [[f"{metric} on {result['part']}, {len(seeds)} seeds"] + [f"{t['slice']} (n={t['n']})" for t in tables]]
    for i, row in enumerate(tables[0]["rows"]):
        lines.append([row["system"], *(_cell(t["rows"][i], "{:.3f}") for t in tables)])
    for i, row in enumerate(tables[0]["differences"]):
        lines.append([f"trained - {row['against']}", *(_cell(t["differences"][i], "{:+.3f}") for t in tables)])
        for s, seed in enumerate(seeds):
            won = [" / ".join(map(str, t["differences"][i]["won_tied_lost"][s])) for t in tables]
            gained = [f"{t['differences'][i]['by_seed'][s]:+.3f}" for t in tables]
            lines.append([f"  seed {seed}", *(f"{g}, won / tied / lost {w}" for g, w in zip(gained, won, strict=True))])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([out[0], "-" * max(map(len, out)), *out[1:]])


def _cell(row: dict[str, Any], number: str) -> str:
    mean, low, high = (number.format(row[key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
