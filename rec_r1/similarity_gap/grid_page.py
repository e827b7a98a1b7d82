"""Write the page of `rec-r1 tuning-grid`: the results of `tuning_grid.measure` as HTML, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rec_r1.evaluation.significance import RESAMPLES
from rec_r1.pages import figures
from rec_r1.similarity_gap import page, sentences
from rec_r1.similarity_gap.anti_affinity import FEWEST_ITEMS
from rec_r1.similarity_gap.tuning_grid import PRETRAINED, RANDOM
from rec_r1.similarity_gap.utility import MAIN

NAME = "tuning-grid"


def write(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write FOLDER/tuning-grid.html, .md and .json, each atomically.

    result: what `tuning_grid.measure` returns.

    Returns the paths.
    """
    clean = page.finite(result)
    return page.save(clean, folder, NAME, "grid", context(clean))


def context(result: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the templates show, as plain values and SVG pictures."""
    about = result["about"]
    learned = result["anti_affinity"]
    differences = [{"name": row["name"], **row["difference"]} for row in learned["rows"] if row["difference"]]
    pictures = [
        (f"{MAIN}: pre-trained − random weights", _forest(result["gains"], "difference")),
        (f"{MAIN} of the pre-trained encoder, tuned − frozen", _forest(_of(result["effects"], PRETRAINED), "lift")),
        (f"{MAIN} of random weights, tuned − untuned", _forest(_of(result["effects"], RANDOM), "lift")),
    ]
    rank = figures.forest(differences, f"rank correlation: difference from {learned['base']}", "", True)
    return {
        **result,
        "metric": MAIN,
        "starts": (PRETRAINED, RANDOM),
        "facts": _facts(about),
        "bounds": sentences.bounds,
        "pictures_grid": pictures,
        "pictures_affinity": [("Learned scores and EASE's negative scores", rank)] if rank else [],
        "probes": list(dict.fromkeys(cell["probe"] for cell in result["cells"] if cell["probe"])),
        "fewest_items": FEWEST_ITEMS,
        "resamples": RESAMPLES,
    }


def _of(effects: Sequence[Mapping[str, Any]], start: str) -> list[Mapping[str, Any]]:
    return [row for row in effects if row["start"] == start]


def _forest(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    shown = [{"name": row["setting"], **row[key]} for row in rows]
    return figures.forest(shown, f"difference of {MAIN}", "", True)


def _facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings, titles = about["settings"], about["titles"]
    return [
        ("task", f"{about['task']} ({settings['name']}, {settings['path']}; {_json(settings['params'])})"),
        ("held out", f"{about['part']}: {about['queries']:,} choices of {about['users']:,} users"),
        (
            "tuned on",
            f"{about['choices']:,} choices of {about['fitted_users']:,} users among {about['items']:,} items; learning "
            f"rates and epochs are chosen on {about['validation']:,} validation choices",
        ),
        ("query", "the last title of the history" if titles == 1 else f"the last {titles} titles of the history"),
        ("encoder", f"{about['model']}, and the same with random weights, another draw for each seed"),
        ("tuned", _json(about["tuned"])),
        ("seeds", f"{about['seeds']}; learning rates {', '.join(f'{rate:g}' for rate in about['learning_rates'])}"),
    ]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
