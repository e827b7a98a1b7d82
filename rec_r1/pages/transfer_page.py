"""Write the page of `rec-r1 transfer`: policies on retrievers that they were not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rec_r1.evaluation import transfer_text
from rec_r1.evaluation.significance import RESAMPLES
from rec_r1.pages import render

NAME = "transfer"


def write(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write FOLDER/transfer.html and .md, each atomically.

    result: what `transfer.matrix` returns.
    folder: that of transfer.json, the evaluation of the first run.

    Returns the two paths.
    """
    heads, legend = transfer_text.columns(result)
    context = {
        "title": f"{result['metric']} on {result['part']}, on several retrievers",
        "n": result["n"],
        "heads": heads,
        "legend": legend,
        "blocks": transfer_text.blocks(result),
        "note": transfer_text.NOTE,
        "resamples": RESAMPLES,
    }
    return render.write(folder / f"{NAME}.html", NAME, context)
