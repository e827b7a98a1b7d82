"""Emoji search, the bundled task: a person types a keyword, the catalogue knows names (see build_emoji.py)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from rec_r1.config import TaskConfig, read_params
from rec_r1.tasks.types import NoParams, Task, make_split
from retrievers import Catalog

READS: tuple[str, ...] = ()  # of the settings in `task` that not every task reads
DATA = Path(__file__).parent / "data" / "emoji_search.json.gz"


def load(config: TaskConfig) -> Task:
    """1,854 emoji and symbols; 336 / 89 / 219 keywords as train / validation / test queries, grades all 1."""
    read_params(NoParams, config.params, "task.params")
    data = json.loads(gzip.decompress(DATA.read_bytes()))
    catalog = Catalog.from_records(
        {"id": symbol, "text": " ".join([name, *keywords]), "title": f"{symbol} {name}"}
        for symbol, name, keywords in data["items"]
    )
    ids = catalog.ids
    splits: dict[str, Any] = {}
    for part in ("train", "validation", "test"):
        judgments = {q: {ids[row]: 1.0 for row in rows} for q, split, rows in data["queries"] if split == part}
        splits[part] = make_split(f"{DATA.name} ({part})", catalog, {q: q for q in judgments}, judgments)
    return Task("emoji", catalog, **splits)
