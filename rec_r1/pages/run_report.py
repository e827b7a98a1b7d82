"""Write the report of one or several runs: settings, results, curves and examples of completions, in one file.

It is made of the files in the runs' folders. Only the comparison of several runs is computed.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rec_r1 import config, runs
from rec_r1.config import Recipe, UserError
from rec_r1.evaluation import compare, records, seeds
from rec_r1.evaluation.evaluate import of_best_policy
from rec_r1.evaluation.records import System
from rec_r1.evaluation.tables import closing, notes, sentence, used
from rec_r1.generation import importance_ratio
from rec_r1.pages import figures, outputs, plots, render
from rec_r1.prompts import counted

SHOWN_FAILURES = 5  # The report shows so many malformed completions, and so many completions that score 0.


def write(folders: Sequence[Path], output: Path, split: str = "test") -> list[Path]:
    """Write the report.

    folders: the folders of runs or baselines. A folder of seeds stands for all its runs, and adds the comparison over
        the seeds (see evaluation/seeds.py).
    output: the HTML file. The Markdown file is written beside it.
    split: the split whose results are shown.

    Returns the paths of the two files. Raises UserError where a folder is no run, or has neither a training nor an
    evaluation, and where the files cannot be written.
    """
    for folder in folders:  # This is checked before the output, which is by default in the first folder.
        if not folder.is_dir():
            why = "not a folder" if folder.exists() else "no such folder"
            raise UserError(f"{folder}: {why}: give the output_dir of a training or of a baseline")
    outputs.check_page(output)
    context = gather([run for folder in folders for run in seeds.runs_in(folder) or [folder]], split)
    of_seeds = [folder for folder in folders if seeds.runs_in(folder)]
    measured = [(folder.name, seeds.measure(folder, split)) for folder in of_seeds]
    context["seeds"] = [(name, seeds.tables(result), seeds.sentence(result)) for name, result in measured]
    return render.write(output, "report", context)


def gather(folders: Sequence[Path], split: str) -> dict[str, Any]:
    """The values that the templates show: plain values and finished pictures. Arguments are those of :func:`write`."""
    shown = [_run(folder, split) for folder in folders]
    logs = plots.named_logs([folder for folder in folders if (folder / "metrics.jsonl").is_file()])
    names = runs.names(folders)
    for name, run in zip(names, shown, strict=True):
        run["name"] = name
    several = len(folders) > 1
    return {
        "split": split,
        "made": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "runs": shown,
        "together": figures.curves(logs, figures.CURVES[:2]) if several and len(logs) > 1 else [],
        "against": _against(dict(zip(names, folders, strict=True)), split) if several else None,
    }


def _run(folder: Path, split: str) -> dict[str, Any]:
    record = records.folder_of(folder, split) / "comparison.json"
    logged = (folder / "metrics.jsonl").is_file()
    if not record.is_file() and not logged:
        raise UserError(
            f"{folder}: no training (metrics.jsonl) and no evaluation of its {split} split: give the output_dir of a "
            "training or of a baseline"
        )
    source = next((p for p in (folder / "config.yaml", folder / "evaluation" / "recipe.yaml") if p.is_file()), None)
    if source is None:
        raise UserError(f"{folder}: no config.yaml and no evaluation/recipe.yaml: run the baseline again")
    recipe = config.load(source)
    result = compare.read(folder, split) if record.is_file() else None
    log = runs.read_metrics(folder) if logged else []
    shown = {
        "folder": str(folder),
        "facts": _facts(recipe, runs.read_info(folder), log, result),
        "curves": figures.curves({folder.name: log}) if log else [],
        # The file itself is not shown, because one of an older version may hold secrets.
        "config": config.dump(recipe).strip(),
        "result": result,
        "more": _more(folder, split),
    }
    return shown | (_evaluated(folder, split, result) if result else {})


def _more(folder: Path, split: str) -> list[tuple[str, str]]:
    """Pairs (heading, text) of further results: sampled completions, other retrievers, general ability."""
    from rec_r1.evaluation import ability, audit_text, transfer_text

    there = (records.folder_of(folder, split) / "comparison.json").is_file()
    result = compare.read(folder, split) if there else {}
    found = [
        (f"{sampled['samples']} samples per query", closing(sampled, split))
        for sampled in result.get("sampled", ())  # A comparison of an older version has none.
    ]
    found = [*(("What each system used", table) for table in used(result)), *found]
    for heading, path, text in (
        ("Sent to other retrievers", records.folder_of(folder, split) / "transfer.json", transfer_text.text),
        ("Audit", folder / "evaluation" / "audit.json", audit_text.text),
        ("General ability (lm_eval)", folder / "evaluation" / "ability.json", ability.text),
    ):
        if path.is_file():
            found.append((heading, text(runs.read_json(path, "delete it, or measure it again"))))
    return found


def _evaluated(folder: Path, split: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an evaluation: the verdict, the tables, and examples of completions."""
    found = records.load_all(folder, split)
    found = {name: found[name] for name in result["systems"] if name in found}
    first, table = result["metrics"][0], result["tables"][0]
    trained = found.get(compare.TRAINED)
    verdict = sentence(result)
    others = [{"name": c[_other(c, result)], **_as_mean(c)} for c in table["comparisons"]]
    left = f"{result['reference']} − other" if result["reference"] != compare.RAW else "system − raw query"
    return {
        "metric": first,
        "verdict": verdict[:1].upper() + verdict[1:],
        "difference": left,
        "notes": notes(result),
        "tables": [_rows(table, result) for table in result["tables"]],
        "forest": figures.forest(
            [{"name": row["system"], **row} for row in table["rows"]], f"{first}, {split}", result["reference"], False
        ),
        "forest_differences": figures.forest(others, f"{first}: {left}", "", True),
        "changed": {kind: [_example(found, query, first) for query in ids] for kind, ids in result["changed"].items()},
        "before": _before(found),
        "failures": _failures(trained, first) if trained else None,
    }


def _other(comparison: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The key of the system in a comparison that is not the reference."""
    return "against" if comparison["system"] == result["reference"] else "system"


def _as_mean(comparison: Mapping[str, Any]) -> dict[str, Any]:
    return {"mean": comparison["difference"], "low": comparison["low"], "high": comparison["high"]}


def _rows(table: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """A table whose rows have the comparison of their system with the reference, or None."""
    compared = {c[_other(c, result)]: c for c in table["comparisons"]}
    return {**table, "rows": [{**row, "comparison": compared.get(row["system"])} for row in table["rows"]]}


def _facts(
    recipe: Recipe, info: Mapping[str, Any], log: Sequence[Mapping[str, Any]], result: Mapping[str, Any] | None
) -> list[tuple[str, str]]:
    """The settings and circumstances of a run, as pairs (label, text)."""
    weights = (
        f"LoRA of rank {recipe.lora['r']}"
        if recipe.lora and "r" in recipe.lora
        else "LoRA"
        if recipe.lora
        else "all weights"
    )
    facts = [
        ("model", f"{recipe.model.name}, {weights}" if log else recipe.model.name),
        ("task", f"{recipe.task.name}" + (f", {result['queries']} {result['part']} queries" if result else "")),
        ("completion", f"format.action: {recipe.format.action}, format.answer: {recipe.format.answer}"),
        ("retriever", recipe.retriever.kind),
        ("reward", " + ".join(f"{weight:g} × {name}" for name, weight in recipe.rewards.items())),
    ]
    steps = [row for row in log if "reward" in row]
    if steps:
        seconds = sum(row.get("step_time", 0.0) for row in steps)
        group = recipe.grpo.get("num_generations", 8)
        facts.append(("training", f"{steps[-1]['step']} steps, groups of {group}, seed {recipe.seed}"))
        facts.append(("time", f"{_duration(seconds)} of steps" + (f" on {info['device']}" if "device" in info else "")))
        worst = max(row.get("retrieval/error_rate", 0.0) for row in steps)
        if worst > 0:
            facts.append(("outages", f"the retriever failed for up to {worst:.0%} of a step's completions"))
        ratios = [row[importance_ratio.MEAN] for row in steps if importance_ratio.MEAN in row]
        if ratios:
            facts.append(("importance ratio", importance_ratio.described(ratios)))
    if result and compare.TRAINED in result["systems"]:
        chosen = f"best: the checkpoint with the best {recipe.evaluation.metrics[0]} on validation"
        facts.append(("policy", f"{result['systems'][compare.TRAINED]['description']} ({chosen})"))
    if result:
        facts.append(("evaluated", str(result["created"])[:16].replace("T", " ")))
    if "versions" in info:
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in info["versions"].items())))
    return facts


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _before(found: Mapping[str, System]) -> str:
    """The name of the system that the trained policy is compared with in examples."""
    return "untrained" if "untrained" in found else compare.RAW


def _example(found: Mapping[str, System], query: str, metric: str) -> dict[str, Any]:
    """One query with the completions and hits of the system before training and of the trained policy."""
    sides = [_row(found, name, query) for name in (_before(found), compare.TRAINED)]
    return {
        "query": sides[0]["query"],
        "relevant": sides[0]["relevant"],
        "sides": [{**side, "value": side["metrics"].get(metric)} for side in sides],
    }


def _row(found: Mapping[str, System], name: str, query: str) -> Mapping[str, Any]:
    rows = found[name].rows if name in found else ()
    row = next((row for row in rows if row["query_id"] == query), None)
    if row is None:
        raise UserError(
            f"query {query!r} is in comparison.json, but not in the answers of {name!r}, which are newer: run "
            "rec-r1 eval again"
        )
    return _shown(row)


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """``row`` with its action as people read it: a query that it repeats is written once."""
    return {**row, "action": counted(row["action"] or "", row["query"])}


def _failures(trained: System, metric: str) -> dict[str, Any]:
    """Examples of failures of the trained policy: malformed completions, and completions that score 0."""
    malformed = [row for row in trained.rows if row["malformed"]]
    nothing = [row for row in trained.rows if not row["malformed"] and row["metrics"].get(metric) == 0]
    spread = nothing[:: max(1, len(nothing) // SHOWN_FAILURES)][:SHOWN_FAILURES]  # Evenly spaced in the split.
    return {
        "queries": len(trained.rows),
        "malformed": len(malformed),
        "malformed_rows": malformed[:SHOWN_FAILURES],
        "nothing": len(nothing),
        "nothing_rows": [_shown(row) for row in spread],
    }


def _against(folders: Mapping[str, Path], split: str) -> dict[str, Any] | None:
    """The comparison of the first run's trained policy with those of the other runs.

    folders: name of a run -> its folder.
    split: the name of the split.

    Returns None where fewer than two runs are evaluated, and where they were evaluated on different queries, with
    different judgments or retrievers, or have no metric in common.
    """
    found = {name: of_best_policy(folder, split) for name, folder in folders.items()}
    trained = {name: each[compare.TRAINED] for name, each in found.items() if compare.TRAINED in each}
    if len(trained) < 2 or compare.RAW not in (base := found[first := next(iter(trained))]):
        return None
    ids = [row["query_id"] for row in trained[first].rows]
    if any([row["query_id"] for row in system.rows] != ids for system in trained.values()):
        return None
    if len({system.belongs_to for system in trained.values()}) > 1:
        return None
    shared = [m for m in trained[first].rows[0]["metrics"] if all(m in s.rows[0]["metrics"] for s in trained.values())]
    if not shared:
        return None
    below = config.load(folders[first] / "config.yaml").evaluation.mismatch_below
    result = compare.compare({compare.RAW: base[compare.RAW], **trained}, shared, below, reference=first)
    tables = [_rows(table, result) for table in result["tables"] if table["slice"] in ("all", "mismatch")]
    return {
        "verdict": sentence(result),
        "notes": notes(result),
        "tables": tables,
        "difference": f"{first} − other",
    }
