"""Trained on retriever A, evaluated on B, C, …: what was written is sent to other retrievers, no model needed."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rec_r1 import compare, config, systems
from rec_r1.config import Recipe, UserError
from rec_r1.environment import Environment, open_environment, open_retriever
from rec_r1.evaluate import metric_scorer, score_raw
from rec_r1.runs import write_atomically
from rec_r1.scoring import Scorer
from rec_r1.significance import bootstrap, holm, randomisation

logger = logging.getLogger(__name__)


def matrix(runs: Sequence[Path], on: Sequence[str], part: str, metric: str | None = None) -> dict[str, Any]:
    """Every run's policies (and the raw query) by every retriever of ``on``.

    on: "bm25", or with parameters "dense {model: intfloat/e5-base-v2}". metric: the first run's first by default.
    Returns retrievers, metric, n and cells: system, retriever, mean, low, high, and against the raw query on that
    retriever difference, p, p_holm (over the whole matrix). Writes `transfer.json` into the first run's part. Raises
    UserError where a run has no evaluation of the part, or the runs have other queries.
    """
    recipes = [config.load(run / "config.yaml") for run in runs]
    env = open_environment(recipes[0])
    split = env.task.splits[part]
    metric = metric or recipes[0].evaluation.metrics[0]
    answers = _answers(runs, recipes, part, list(split.ids))
    cells: list[dict[str, Any]] = []
    for spec in on:
        retriever = open_retriever(with_retriever(recipes[0], spec), env.task)
        here = dataclasses.replace(env, retriever=retriever)
        raw = score_raw(split, _scorer(here, env.scorer, metric)).components[metric].astype(np.float64)
        cells.append({"system": compare.RAW, "retriever": spec, **bootstrap(raw)})
        for name, (recipe, completions) in answers.items():
            scorer = _scorer(here, open_scorer(recipe, env), metric)
            scored = scorer.score_split(completions, split).whole().components[metric].astype(np.float64)
            difference = scored - raw
            cells.append(
                {
                    "system": name,
                    "retriever": spec,
                    **bootstrap(scored),
                    "difference": float(np.nanmean(difference)),
                    "p": randomisation(difference),
                }
            )
    tested = [cell for cell in cells if "p" in cell]
    for cell, corrected in zip(tested, holm([cell["p"] for cell in tested]), strict=True):
        cell["p_holm"] = corrected
    result = {"part": part, "metric": metric, "n": len(split), "retrievers": list(on), "cells": cells}
    folder = systems.folder_of(runs[0], part)
    write_atomically(folder / "transfer.json", json.dumps(result, indent=1, ensure_ascii=False))
    return result


def _answers(
    runs: Sequence[Path], recipes: Sequence[Recipe], part: str, ids: list[str]
) -> dict[str, tuple[Recipe, list[str]]]:
    """Name -> the recipe that parses it, and the completions of its evaluation."""
    found: dict[str, tuple[Recipe, list[str]]] = {}
    for run, recipe in zip(runs, recipes, strict=True):
        kept = systems.load_all(run, part)
        if compare.TRAINED not in kept:
            raise UserError(f"{run}: no evaluation of its {part} part: run rec-r1 eval {run} --split {part} first")
        for name in ("untrained", compare.TRAINED):
            rows = kept[name].rows if name in kept else []
            if rows and [row["query_id"] for row in rows] != ids:
                raise UserError(f"{run}: evaluated on other queries than {runs[0]}: give runs of one task")
            if rows:
                label = f"{name} on {recipe.retriever.kind}" + (f" ({run.name})" if len(runs) > 1 else "")
                found[label] = (recipe, [row["completion"] for row in rows])
    return found


def open_scorer(recipe: Recipe, env: Environment) -> Scorer:
    """A scorer that reads answers as ``recipe`` does."""
    from rec_r1.prompts import Format

    ask = Format(recipe.format)
    # What titles stand for is the run's, whoever ranks: the other retriever may read no text at all.
    return Scorer(ask.parse, env.retriever, env.scorer.rewards, floor=recipe.format.floor, grounder=env.scorer.grounder)


def _scorer(env: Environment, scorer: Scorer, metric: str) -> Scorer:
    made = metric_scorer(scorer, [metric])
    made.retriever = env.retriever
    return made


def with_retriever(recipe: Recipe, spec: str) -> Recipe:
    """``recipe`` with the retriever that an option names: "bm25", or "dense {model: NAME}". Raises UserError."""
    kind, _, text = spec.partition(" ")
    try:
        params = yaml.safe_load(text) if text.strip() else {}
    except yaml.YAMLError as error:
        raise UserError(f"--on {spec!r}: the parameters are not valid YAML: write KIND {{key: value}}") from error
    if not isinstance(params, dict):
        raise UserError(f"--on {spec!r}: parameters are a mapping: write KIND {{key: value}}")
    if kind == recipe.retriever.kind and not params:
        return recipe
    return dataclasses.replace(
        recipe, retriever=dataclasses.replace(recipe.retriever, kind=kind, params=params, index=None)
    )


def text(result: dict[str, Any]) -> str:
    """The matrix as text; * = differs from the raw query on that retriever (Holm over the matrix, p < 0.05)."""
    names = list(dict.fromkeys(cell["system"] for cell in result["cells"]))
    lines = [[f"{result['metric']} on {result['part']} (n={result['n']})", *result["retrievers"]]]
    for name in names:
        row = {cell["retriever"]: cell for cell in result["cells"] if cell["system"] == name}
        lines.append([name, *(_cell(row[spec]) for spec in result["retrievers"])])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    out = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    note = f"* differs from the raw query on that retriever (paired randomisation test, Holm, p < {compare.ALPHA})"
    return "\n".join([out[0], "-" * max(map(len, out)), *out[1:], note])


def _cell(cell: dict[str, Any]) -> str:
    if "p_holm" not in cell:
        return f"{cell['mean']:.3f}"
    mark = "*" if cell["p_holm"] < compare.ALPHA else ""
    return f"{cell['mean']:.3f} ({cell['difference']:+.3f}{mark})"
