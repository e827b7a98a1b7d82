"""Emoji search, the bundled task: queries are keywords that the documents do not contain (see build_emoji.py)."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rec_r1.config import TaskConfig, read_params
from rec_r1.tasks.build_emoji import stem
from rec_r1.tasks.query_pools import check_fit_share, set_apart
from rec_r1.tasks.types import Task, judged, make_split
from retrievers import Catalog

READS: tuple[str, ...] = ()  # Which of task.path and task.splits this task reads.
DATA = Path(__file__).parent / "data" / "emoji_search.json.gz"


@dataclass(frozen=True)
class Params:
    """`task.params`."""

    # The share of the training queries, chosen by a hash of their stem, that retrievers are fitted on. Prompts are made
    # of the others, so that the retriever has not seen what a prompt asks for. 0: it is fitted on all of them, which is
    # for evaluations and not for rewards.
    fit_share: float = 0.0


def load(config: TaskConfig) -> Task:
    """Load the task: 1,854 emoji and symbols, and 336 train, 89 validation and 219 test queries. All grades are 1."""
    params: Params = read_params(Params, config.params, "task.params")
    check_fit_share(params.fit_share)
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
    if not params.fit_share:
        return Task("emoji", catalog, **splits)
    splits["train"], fit = set_apart(splits["train"], params.fit_share, seed=0, key=stem)
    return Task("emoji", catalog, **splits, judgments=judged(catalog, fit, splits["validation"]), set_apart=True)
