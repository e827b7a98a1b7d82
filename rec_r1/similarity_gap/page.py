"""Write the page of the similarity gap: the results of `similarity_gap.measure` as HTML, Markdown and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rec_r1 import runs
from rec_r1.evaluation.records import check_writable
from rec_r1.evaluation.significance import RESAMPLES
from rec_r1.pages import figures, outputs, render
from rec_r1.similarity_gap import cross_sentences, sentences
from rec_r1.similarity_gap.claims import DEPTH, explained
from rec_r1.similarity_gap.divergence import PERMUTATIONS, WIDTH
from rec_r1.similarity_gap.held_out import FEWEST_USERS
from rec_r1.similarity_gap.measure import SIMILAR
from rec_r1.similarity_gap.utility import METRICS

NAME = "similarity-gap"
MEASURES = [  # (name in divergence.measure, label in the table, whether it is a share)
    ("overlap", "neighbour overlap", True),
    ("apart", "text neighbours never chosen together", True),
    ("auc", "AUC, matched by popularity", False),
    ("cosine_met", "rank correlation with co-consumption, pairs that met", False),
    ("cosine_any", "rank correlation with co-consumption, any pairs", False),
    ("ease_met", "rank correlation with EASE's B, pairs that met", False),
    ("ease_any", "rank correlation with EASE's B, any pairs", False),
]


def prepare(folder: Path, name: str = NAME) -> None:
    """Make the output folder and check that the page can be written there, before the work starts.

    name: the name of the page's files. The default is that of the similarity gap.

    Raises UserError if it cannot.
    """
    outputs.refuse_inside_a_run(folder, "--output")
    check_writable(folder, "--output")
    outputs.check_page(folder / f"{name}.html")
    outputs.check_file(folder / f"{name}.json", ".json")


def write(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write FOLDER/similarity-gap.html, .md and .json, each atomically. A number that does not exist becomes null.

    result: what `measure` returns.

    Returns the paths.
    """
    clean = finite(result)
    return save(clean, folder, NAME, "gap", context(clean))


def save(result: Mapping[str, Any], folder: Path, name: str, template: str, shown: Mapping[str, Any]) -> list[Path]:
    """Write a page as FOLDER/NAME.html and .md, and its numbers as .json, each atomically.

    result: the numbers, see :func:`finite`.
    template: the name of the page's templates.
    shown: what the templates show.

    Returns the paths.
    """
    path = folder / f"{name}.json"
    runs.write_atomically(path, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))
    return [*render.write(folder / f"{name}.html", template, shown), path]


def finite(value: Any) -> Any:
    """``value`` with None for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def context(result: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the templates show, as plain values and SVG pictures."""
    about, gap = result["about"], result["gap"]
    whole = result["utility"][0]
    main = gap["metric"]
    return {
        **result,
        "facts": _facts(about, result["systems"]),
        "headlines": [gap["sentence"], *([result["unlike"]["sentence"]] if result["unlike"] else [])],
        "metrics": METRICS,
        "measures": _measures(result["divergence"]["encoders"]),
        "pictures_divergence": _pairs(_divergence_pictures(result["divergence"]["encoders"])),
        "pictures_utility": _pairs([(f"{main} of every system", _forest(whole, main, gap["text"]))]),
        "pictures_slices": _pairs(
            (f"{main}: {each['slice']}", _forest(each, main, gap["text"])) for each in result["utility"][1:]
        ),
        "heat": _heat(result["utility"], main),
        "pictures_gap": _pairs(
            [("Share of the gap that each system closes", figures.shares(_shares(gap), "share of the gap"))]
        ),
        "pictures_ablations": _pairs([("What each change did, paired", _changes(result["ablations"], main))]),
        "pictures_claims": _pairs([(f"The differences in {main}", _leads(result["claims"]["rows"], main))]),
        "sweep": _sweep(result["claims"]["sizes"]),
        "crossed": _crossed(result["claims"]["cross"]),
        "verdicts": explained(result["claims"]["seeds"]),
        "depth": DEPTH,
        "shares": {row["system"]: sentences.shares(row["share"]) for row in gap["rows"]},
        "leads": {row["system"]: sentences.bounds(row["lead"]) for row in gap["rows"]},
        "similar": SIMILAR,
        "fewest_users": FEWEST_USERS,
        "width": round(100 * (WIDTH - 1)),
        "resamples": RESAMPLES,
        "permutations": PERMUTATIONS,
    }


def _pairs(found: Any) -> list[tuple[str, str]]:
    """``found``, titles and pictures, without the pictures that are empty."""
    return [(title, svg) for title, svg in found if svg]


def _facts(about: Mapping[str, Any], systems: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    settings = about["settings"]
    facts = [
        ("task", f"{about['task']} ({settings['name']}, {settings['path']})"),
        ("held out", f"{about['part']}: {about['queries']:,} choices of {about['users']:,} users"),
        ("split", about["split"]),
        (
            "fitted on",
            f"{about['choices']:,} choices of {about['fitted_users']:,} users; {about['chosen_items']:,} of "
            f"{about['items']:,} items were chosen by somebody; settings are picked on {about['validation']:,} "
            "validation choices",
        ),
    ]
    if about["set_apart"]:
        facts.append(
            (
                "set apart",
                f"task.params.fit_share={settings['params'].get('fit_share')}: the systems are fitted on a part of "
                "training, and so are section A and the labels warm, tail and cold. Without fit_share all of "
                "training is used",
            )
        )
    if about["part"] == "validation":
        facts.append(("note", "the settings were picked on these same choices, which favours the fitted systems"))
    if about["titles"]:
        shown = "the last title" if about["titles"] == 1 else f"the last {about['titles']} titles"
        longest = about["history"]
        facts.append(
            (
                "what is read",
                f"text systems: {shown} of the history; systems that are fitted on choices: its last {longest} "
                "choices. Part of a gap may be due to this: compare with task.params.raw_titles=3",
            )
        )
    if about["tuned"]:
        facts.append(("tuned", ", ".join(f"{k}: {v}" for k, v in about["tuned"].items())))
    fits = [f"{each['name']} ({'; '.join(each['fit'])})" for each in systems if each["fit"]]
    return [*facts, *([("fits", ", ".join(fits))] if fits else [])]


def _measures(encoders: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per measure, with a cell of text per encoder."""

    def cell(found: Mapping[str, Any] | None, share: bool) -> str:
        if found is None or found["value"] is None:
            return "–"
        return sentences.against_null(found, share, short=True)

    return [
        {"label": label, "cells": [cell(each["measures"].get(name), share) for each in encoders]}
        for name, label, share in MEASURES
        if any(name in each["measures"] for each in encoders)
    ]


def _divergence_pictures(encoders: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    out = []
    for name, title, label in (
        ("overlap", "Co-consumption neighbours among the text neighbours", "neighbour overlap"),
        ("auc", "Text similarity of items chosen together, against equally popular ones that were not", "AUC"),
    ):
        rows = [{"name": each["encoder"], **each["measures"][name]} for each in encoders]
        out.append((title, figures.against_null(rows, label)))
    return out


def _forest(table: Mapping[str, Any], metric: str, first: str) -> str:
    rows = [{"name": row["system"], **row["metrics"][metric]} for row in table["rows"]]
    return figures.forest(rows, f"{metric} (n = {table['queries']:,})", first, False)


def _shares(gap: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"name": row["system"], **row["share"]} for row in gap["rows"] if row["share"]["low"] is not None]


def _changes(ablations: Sequence[Mapping[str, Any]], metric: str) -> str:
    rows = [{"name": each["name"], **each["differences"][metric]} for each in ablations]
    return figures.forest(rows, f"{metric}: changed − unchanged", "", True)


def _leads(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """The differences of the claims that were tested by ``metric``."""
    shown = [{"name": row["key"], **row["lead"]} for row in rows if row.get("metric") == metric]
    return figures.forest(shown, f"{metric}: full − reduced", "", True)


def _sweep(sizes: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The table of recall by the size of the catalogue: its columns and its rows. None where it was not measured."""
    if sizes is None:
        return None
    return {"documents": [f"{size:,}" for size in sizes["documents"]], "rows": sizes["rows"]}


def _crossed(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The section about a cross-encoder: what was asked, in words, and the share that each system closes as text. None
    where it was not measured."""
    if found is None:
        return None
    rows = [
        {**row, "closed": "–" if row["share"] is None else sentences.shares(row["share"])} for row in found["systems"]
    ]
    return {"about": cross_sentences.about(found), "sentences": found["sentences"], "systems": rows}


def _heat(tables: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """One row per system, with a cell per slice: the value, and its shade in percent, 40 for the best of the slice."""
    best = [max(row["metrics"][metric]["mean"] for row in table["rows"]) for table in tables]
    names = [row["system"] for row in tables[0]["rows"]]
    return [
        {
            "system": name,
            "cells": [
                {
                    "slice": f"{table['slice']} ({table['queries']:,})",
                    **table["rows"][place]["metrics"][metric],
                    "heat": round(40 * max(0.0, table["rows"][place]["metrics"][metric]["mean"]) / top) if top else 0,
                }
                for table, top in zip(tables, best, strict=True)
            ],
        }
        for place, name in enumerate(names)
    ]
