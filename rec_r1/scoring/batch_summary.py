"""Summarise one scored batch for the curves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rec_r1.prompts import sent
from rec_r1.prompts.structured import MALFORMED
from rec_r1.scoring.scored import Scored
from retrievers.text.analysis import words


def summary(scored: Scored, queries: Sequence[str]) -> dict[str, float]:
    """The values that the curves show for one batch, with the same keys for every batch and in every process.

    reward/NAME, reward/NAME/std: the mean and the standard deviation of each component, without NaN rows.
    scorer/malformed: the share of completions that are malformed.
    scorer/malformed/CAUSE: for structured queries, the share that is malformed for this cause, each of `MALFORMED`.
    scorer/echo: the share of a completion's words that are also in its query, averaged over completions.
    scorer/written_words: the mean number of words of an action.
    scorer/distinct: the number of distinct actions, divided by the number of actions.
    scorer/nothing_found: the share of actions that retrieve no target at any rank.
    scorer/ungrounded: for lists of items, the share of items that were not found in the catalogue.
    retrieval/queries: the number of distinct queries.
    retrieval/distinct: the same, divided by the number of well-formed completions.
    retrieval/cache_hits: the share of distinct queries that the cache knew.
    retrieval/seconds/p50, retrieval/seconds/p95: percentiles of the seconds of a call, over the last 100 calls.
    retrieval/error_rate: the share of well-formed completions for which the retriever failed. Rewards and
        scorer/nothing_found leave them out.
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
    if scored.causes:
        for cause in MALFORMED:
            out[f"scorer/malformed/{cause}"] = sum(one == cause for one in scored.causes) / len(scored.causes)
    out["scorer/echo"] = float(np.mean(echo)) if echo else float("nan")
    out["scorer/written_words"] = float(np.mean([len(w) for _, w in parsed])) if parsed else float("nan")
    out["scorer/distinct"] = len({sent(a) for a in actions if a is not None}) / max(1, len(parsed))
    out["scorer/nothing_found"] = float(np.mean([not found[b] for b in asked])) if asked else float("nan")
    return out
