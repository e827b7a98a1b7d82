"""What the curves show of one scored batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rec_r1.prompts import sent
from retrievers.text.analysis import words

if TYPE_CHECKING:
    from rec_r1.scoring import Scored


def summary(scored: Scored, queries: Sequence[str]) -> dict[str, float]:
    """What the curves show of one batch, the same keys for every batch and on every rank.

    reward/NAME and reward/NAME/std: each component, NaN rows left out. scorer/malformed: share of completions
    that do not parse. scorer/echo: share of the words a completion wrote that stand in its query.
    scorer/written_words: mean words written. scorer/distinct: distinct actions over actions.
    scorer/nothing_found: share of well-formed actions that retrieve no relevant document at any rank.
    scorer/ungrounded (lists of items): share of the items that stand for nothing in the catalogue.
    retrieval/queries: distinct queries asked; retrieval/distinct: them over the well-formed completions.
    retrieval/cache_hits: share of them that the cache knew. retrieval/seconds/p50 and p95: seconds a call, of the
    last 100 calls. retrieval/error_rate: share of the well-formed completions that the retriever failed for;
    they are left out of everything above.
    """
    out: dict[str, float] = dict(scored.retrieval)
    for name, values in scored.components.items():
        known = values[~np.isnan(values)].astype(np.float64)
        out[f"reward/{name}"] = float(known.mean()) if len(known) else float("nan")
        out[f"reward/{name}/std"] = float(known.std()) if len(known) else float("nan")
    actions = scored.actions
    parsed = [(b, words(a.written)) for b, a in enumerate(actions) if a is not None]
    asked = [b for b, _ in parsed if not scored.failed[b]]
    echo = [np.mean([w in set(words(queries[b])) for w in written]) for b, written in parsed if written]
    found = np.asarray(scored.outcome.ranks.any(axis=1))
    out["scorer/malformed"] = 1.0 - len(parsed) / max(1, len(actions))
    out["scorer/echo"] = float(np.mean(echo)) if echo else float("nan")
    out["scorer/written_words"] = float(np.mean([len(w) for _, w in parsed])) if parsed else float("nan")
    out["scorer/distinct"] = len({sent(a) for a in actions if a is not None}) / max(1, len(parsed))
    out["scorer/nothing_found"] = float(np.mean([not found[b] for b in asked])) if asked else float("nan")
    return out
