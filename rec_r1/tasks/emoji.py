"""Emoji search, the bundled task: queries are keywords that the documents do not contain (see build_emoji.py)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from rec_r1.config import TaskConfig, read_params
from rec_r1.tasks.types import NoParams, Task, make_split
from retrievers import Catalog

READS: tuple[str, ...] = ()  # Which of task.path and task.splits this task reads.
DATA = Path(__file__).parent / "data" / "emoji_search.json.gz"


def load(config: TaskConfig) -> Task:
    """Load the task: 1,854 emoji and symbols, and 336 train, 89 validation and 219 test queries. All grades are 1."""
    read_params(NoParams, config.params, "task.params")
    data = json.loads(gzip.decompress(DATA.read_bytes()))
    catalog = Catalog.from_records(
        {"id": symbol, "text": " ".join([name, *keywords]), "title": f"{symbol} {name}"}
        for symbol, name, keywords in data["items"]
    )
    ids = list(catalog.ids)
    splits: dict[str, Any] = {}
    for name in ("train", "validation", "test"):
        judgments = {q: {ids[row]: 1.0 for row in rows} for q, split, rows in data["queries"] if split == name}
        splits[name] = make_split(f"{DATA.name} ({name})", catalog, {q: q for q in judgments}, judgments)
    return Task("emoji", catalog, **splits)
