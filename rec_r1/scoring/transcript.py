"""The rows of a training's transcript: one per completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rec_r1.prompts import sent
from rec_r1.scoring.scored import Scored
from retrievers import Catalog


def rows_of(
    step: int,
    prompts: Sequence[Any],
    queries: Sequence[str],
    ids: Sequence[str],
    scored: Scored,
    shown: Sequence[Sequence[int] | None],
    catalog: Catalog | None,
) -> list[dict[str, Any]]:
    """The rows of B scored completions.

    step: the step of the training.
    prompts, queries: B prompts and raw queries.
    ids: B ids of the queries. () = they are not known.
    shown: B lists of rows, the first hits. None = they are not known.
    catalog: names the hits by id and title. None = by row.
    """
    outcome, rows = scored.outcome, []
    for b, action in enumerate(scored.actions):
        hits = shown[b]
        row = {
            "step": step,
            **({"query_id": ids[b]} if ids else {}),
            "query": queries[b],
            "prompt": prompts[b],
            "completion": outcome.completions[b],
            "action": None if action is None else sent(action),
            **({"malformed": scored.causes[b]} if scored.causes else {}),
            "failed": bool(scored.failed[b]),
            "hits": None if hits is None else [_hit(row, catalog) for row in hits],
            "ranks": [int(r) for r, g in zip(outcome.ranks[b], outcome.grades[b], strict=True) if g],
            "rewards": {name: _number(values[b]) for name, values in scored.components.items()},
            "reward": _number(scored.rewards[b]),
        }
        rows.append(row)
    return rows


def _hit(row: int, catalog: Catalog | None) -> dict[str, Any]:
    return {"row": row} if catalog is None else {"id": catalog.ids[row], "title": catalog.titles[row]}


def _number(value: np.floating) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
