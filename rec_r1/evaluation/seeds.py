"""Compare the trained policies of all seeds of a recipe with the raw query, the untrained policy and baselines.

A folder of seeds has one run per seed, `seed-0`, `seed-1`, …, and the comparison over all of them, `seeds.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rec_r1 import config, runs
from rec_r1.config import Recipe, UserError
from rec_r1.environment import metric_names
from rec_r1.evaluation import budget, compare, records
from rec_r1.evaluation.budget import Used
from rec_r1.evaluation.evaluate import eval_command, of_best_policy
from rec_r1.evaluation.number_format import p_value
from rec_r1.evaluation.records import System
from rec_r1.evaluation.significance import difference_over_seeds, holm, over_seeds
from rec_r1.evaluation.tables import aligned
from rec_r1.runs.run_config import changes, may_change

COMPARED_WITH = (compare.RAW, "untrained")
RECORD = "seeds.json"
# Settings that may change on resume, but not between the seeds of one recipe.
_OF_THE_RESULT = ("grpo.max_steps", "grpo.num_train_epochs", "evaluation.every_steps", "evaluation.mismatch_below")


def runs_in(folder: Path) -> list[Path]:
    """The runs in a folder of seeds, sorted by seed. [] = it is no folder of seeds."""
    found = [path for path in folder.glob("seed-*") if (path / config.RUN_FILE).is_file() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def measure(folder: Path, split: str = "test") -> dict[str, Any]:
    """Compare the trained policies of all seeds in ``folder`` with the raw query, the untrained policy and baselines.

    folder: the folder of seeds, whose runs are evaluated already.
    split: the name of the split.

    Writes seeds.json, and returns its content: `part` (the split), `seeds`, `queries` (their number), `metrics`,
    `tables`, one per metric and slice, and `used` (name of a system -> the mean of what it used, see `budget.Used`).
    A metric is left out where a query has no value in it. Each row of a table has the mean over seeds and queries with
    its interval (see `significance.over_seeds`), the seeds that have the system (`seeds`), and the mean of each of them
    (`by_seed`). A baseline has a row if at least two seeds have it, and is compared with the trained policies of these
    seeds. Each comparison has the p of the same resamples, and `p_holm`, which is corrected over all tested comparisons
    of one metric, as in `compare.compare`. Raises UserError as :func:`evaluated`.
    """
    each = evaluated(folder, split)
    first = next(iter(each.values()))
    ids = [row["query_id"] for row in first[compare.TRAINED].rows]
    always = (compare.TRAINED, *COMPARED_WITH)
    others = sorted({name for one in each.values() for name in one} - set(always))
    having = {name: [seed for seed, one in each.items() if name in one] for name in (*always, *others)}
    having = {name: seeds for name, seeds in having.items() if len(seeds) > 1}
    shared = [m for m in first[compare.TRAINED].rows[0]["metrics"] if all(_has(one, m) for one in each.values())]
    if not shared:
        raise UserError(
            f"{folder}: no metric has a value for every query and seed: evaluate the seeds with another one, such as "
            f"{eval_command(runs_in(folder)[0], split)} --metrics ndcg@10"
        )
    recipe = config.load(runs_in(folder)[0] / config.RUN_FILE)
    deciding = metric_names(recipe.evaluation.metrics)[0]
    chosen = compare.slices(first[compare.RAW].scores(deciding), recipe.evaluation.mismatch_below)
    some = {name: mask for name, mask in chosen.items() if mask.any()}
    tables = [_table(each, having, metric, name, mask) for metric in shared for name, mask in some.items()]
    for metric in shared:
        of_metric = [row for table in tables if table["metric"] == metric for row in table["differences"]]
        tested = [row for row in of_metric if row["p"] is not None]
        for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row["p_holm"] = corrected
    used = {
        name: asdict(budget.mean([Used(**known) for seed in seeds if (known := each[seed][name].used)]))
        for name, seeds in having.items()
        if any(each[seed][name].used for seed in seeds)
    }
    about = {"part": split, "seeds": list(each), "queries": len(ids), "metrics": shared}
    result = {**about, "tables": tables, "used": used}
    runs.write_atomically(folder / RECORD, json.dumps(result, indent=1))
    return result


def evaluated(folder: Path, split: str) -> dict[int, dict[str, System]]:
    """The evaluated systems of all seeds.

    folder: the folder of seeds.
    split: the name of the split.

    Returns seed -> name of a system -> system. Raises UserError for fewer than two runs, for runs of different recipes
    or with the same seed, for a run without an evaluation of its best policy on the split, and where the seeds were
    evaluated on different queries, or with different judgments or retrievers.
    """
    found = runs_in(folder)
    if len(found) < 2:
        raise UserError(f"{folder}: fewer than two runs called seed-N: rec-r1 train RECIPE --seeds 5 makes them")
    recipes = [config.load(run / config.RUN_FILE) for run in found]
    refuse_other_recipes(recipes[0], found[1:])
    first_with: dict[int, Path] = {}
    for run, recipe in zip(found, recipes, strict=True):
        if (other := first_with.setdefault(recipe.seed, run)) is not run:
            raise UserError(
                f"{folder}: {run.name} was trained with seed={recipe.seed}, as {other.name} was, and two runs of one "
                "seed are not two results: train it again with another seed, or move it elsewhere"
            )
    each = {int(run.name[5:]): _systems(run, split) for run in found}
    trained = [one[compare.TRAINED] for one in each.values()]
    ids = [row["query_id"] for row in trained[0].rows]
    if any([row["query_id"] for row in system.rows] != ids for one in each.values() for system in one.values()):
        raise UserError(f"{folder}: its seeds were evaluated on different queries: evaluate them again")
    for run, system in zip(found, trained, strict=True):
        if system.belongs_to != trained[0].belongs_to:
            raise UserError(
                f"{folder}: {run.name} was evaluated with other queries, other judgments or another retriever than "
                f"{found[0].name}: run {eval_command(found[0], split)} and {eval_command(run, split)}, or move one of "
                "them elsewhere"
            )
    return each


def refuse_other_recipes(recipe: Recipe, found: Sequence[Path]) -> None:
    """Raise UserError where a run of a folder of seeds has other settings than ``recipe``.

    Its seed may differ, and so may settings that change no result.

    recipe: the recipe that all runs should have.
    found: the folders of the runs.
    """
    for run in found:
        for key, wanted, given in changes(recipe, config.load(run / config.RUN_FILE)):
            if key != "seed" and (key in _OF_THE_RESULT or not may_change(key)):
                raise UserError(
                    f"{key}: {given!r} in {run}, and {wanted!r} in the recipe of the other seeds: only seeds of one "
                    "recipe are compared: move the run elsewhere, or choose another folder with output_dir=FOLDER"
                )


def _systems(run: Path, split: str) -> dict[str, System]:
    """The systems of a run that write one completion a query, without those of another step than the best policy's, and
    those of other queries or another retriever than the trained policy's. Raises UserError where one of COMPARED_WITH
    is missing, or the trained policy."""
    trained = records.load_all(run, split).get(compare.TRAINED)
    stored = of_best_policy(run, split, trained.belongs_to if trained else None)
    found = {name: system for name, system in stored.items() if system.samples == 1}
    missing = next((name for name in (compare.TRAINED, *COMPARED_WITH) if name not in found), None)
    if missing is not None:
        raise UserError(f"{run}: its {split} split has no answers of {missing!r}: run {eval_command(run, split)}")
    return found


def _has(found: dict[str, System], metric: str) -> bool:
    """Whether all systems that must be compared have a value of the metric for every query."""
    return all(not np.isnan(found[name].scores(metric)).any() for name in (compare.TRAINED, *COMPARED_WITH))


def _table(
    each: Mapping[int, dict[str, System]], having: Mapping[str, Sequence[int]], metric: str, name: str, mask: np.ndarray
) -> dict[str, Any]:
    """The table of one metric on the slice ``name``.

    each: seed -> its systems.
    having: name of a system -> the seeds that have it.
    metric: the name of the metric.
    mask: (Q,) bool: the queries of the slice.
    """
    users = np.array(next(iter(each.values()))[compare.TRAINED].users)[mask].tolist()
    whole = {
        system: np.stack([each[seed][system].scores(metric) for seed in seeds]) for system, seeds in having.items()
    }
    scores = {system: values[:, mask] for system, values in whole.items() if not np.isnan(values).any()}
    rows = [
        {"system": system, "seeds": having[system], **over_seeds(values, users), "by_seed": _by_seed(values)}
        for system, values in scores.items()
    ]
    differences = []
    for other in scores:
        seeds = having[other]
        if other == compare.TRAINED or each[seeds[0]][other].reads_judgments:
            continue
        trained = np.stack([each[seed][compare.TRAINED].scores(metric)[mask] for seed in seeds])
        gained = trained - scores[other]
        outcomes = [[int((row > 0).sum()), int((row == 0).sum()), int((row < 0).sum())] for row in gained]
        found: dict[str, Any] = {**difference_over_seeds(gained, users), "p_holm": None}
        if compare.CHOSEN_BY.get(name) == other:
            found["p"] = None
        about = {"by_seed": _by_seed(gained), "won_tied_lost": outcomes}
        differences.append({"against": other, "seeds": seeds, **found, **about})
    return {"metric": metric, "slice": name, "n": int(mask.sum()), "rows": rows, "differences": differences}


def _by_seed(values: np.ndarray) -> list[float]:
    """The means of the S seeds. values: (S, Q) scores."""
    return [float(mean) for mean in values.mean(axis=1)]


def text(result: dict[str, Any]) -> str:
    """The tables of :func:`measure` for a terminal, and their result in one sentence."""
    return f"{tables(result)}\n\n{sentence(result)}"


def tables(result: dict[str, Any]) -> str:
    """The tables of :func:`measure` in a font of one width."""
    used = {name: Used(**one) for name, one in result["used"].items()}
    of_metrics = [_text(result, metric) for metric in result["metrics"]]
    return "\n\n".join([*of_metrics, *([aligned(budget.lines(used))] if used else [])])


def _text(result: dict[str, Any], metric: str) -> str:
    tables = [table for table in result["tables"] if table["metric"] == metric]
    count = len(result["seeds"])
    lines = [[f"{metric} on {result['part']}, {count} seeds"] + [f"{t['slice']} (n={t['n']})" for t in tables]]

    def label(name: str, seeds: Sequence[int]) -> str:
        return name if len(seeds) == count else f"{name} ({len(seeds)} seeds)"

    for i, row in enumerate(tables[0]["rows"]):
        lines.append([label(row["system"], row["seeds"]), *(_cell(t["rows"][i], "{:.3f}") for t in tables)])
    for i, row in enumerate(tables[0]["differences"]):
        name = label(f"trained - {row['against']}", row["seeds"])
        lines.append([name, *(_difference(t["differences"][i]) for t in tables)])
        for s, seed in enumerate(row["seeds"] if row["against"] in COMPARED_WITH else ()):
            won = [" / ".join(map(str, t["differences"][i]["won_tied_lost"][s])) for t in tables]
            gained = [f"{t['differences'][i]['by_seed'][s]:+.3f}" for t in tables]
            lines.append([f"  seed {seed}", *(f"{g}, won / tied / lost {w}" for g, w in zip(gained, won, strict=True))])
    return aligned(lines)


def sentence(result: dict[str, Any]) -> str:
    """Which systems the trained policies are better than, in the first metric and on all queries."""
    table = result["tables"][0]
    found: dict[str, list[str]] = {"better than": [], "worse than": [], "not shown to differ from": []}
    for row in table["differences"]:
        clear = row["p_holm"] < compare.ALPHA and not row["low"] <= 0 <= row["high"]
        kind = "not shown to differ from" if not clear else "better than" if row["mean"] > 0 else "worse than"
        found[kind].append(row["against"])
    same = [row for t in result["tables"] if t["metric"] == table["metric"] for row in t["differences"]]
    tested = sum(row["p"] is not None for row in same)
    claims = [f"{kind} {', '.join(names)}" for kind, names in found.items() if names]
    return (
        f"In {table['metric']} the trained policies are {'; '.join(claims)} (95% intervals, and p below "
        f"{compare.ALPHA:g} after Holm's correction for {tested} comparisons)."
    )


def _difference(row: dict[str, Any]) -> str:
    """A difference with its interval and its corrected p, or a dash where it was not tested."""
    return f"{_cell(row, '{:+.3f}')} {'–' if row['p_holm'] is None else 'p' + p_value(row['p_holm'])}"


def _cell(row: dict[str, Any], number: str) -> str:
    mean, low, high = (number.format(row[key]) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
