"""Test the claims of `claims` on a task: fit the changed systems with several seeds, rank, and compare.

Fits and ranks are kept in the cache, so that an interrupted call continues where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import retrievers
from rec_r1.config import UserError
from rec_r1.similarity_gap import claims, cross, tuned_claims
from rec_r1.similarity_gap.claims import Claim
from rec_r1.similarity_gap.measured import FITTED, NO_CHOICES, Measured, seeded
from rec_r1.similarity_gap.systems import full_system, no_full_system, values_of
from rec_r1.similarity_gap.utility import MAIN, METRICS
from retrievers import RetrieverError

logger = logging.getLogger(__name__)
SEEDS = 3  # How many fits of a system with random numbers.


def retest(of: Measured, seeds: int = SEEDS, tuned: bool = True) -> dict[str, Any]:
    """Test all claims.

    of: what the page has measured already.
    seeds: how many fits of each system that begins with random numbers, at least 1.
    tuned: whether an encoder is tuned, which takes longer than everything else.

    Returns `rows` (one per claim, see `claims.row`), `sizes` (recall by the catalogue's size, see :class:`Recalls`;
    None for a small catalogue), `dimensions` and `general` (see `tuned_claims.Tested`), `cross` (see `cross.tested`),
    `seeds` and `margin`. Raises UserError or RetrieverError where an encoder or a cross-encoder cannot be tuned as the
    recipe says.
    """
    from tqdm import tqdm

    rows = [_zero_shot(of)]
    for claim in tqdm(claims.CHANGES, "testing claims", leave=False):
        rows.append(_changed(of, claim, seeds))
    encoder = tuned_claims.fitted(of, seeds) if tuned else tuned_claims.NOT_TUNED
    of_tuned = tuned_claims.test(of, encoder)
    of_cross, crossed = cross.test(of, encoder, quick=not tuned)
    recalls = _recalls(of)
    sizes = None if recalls is None else {"documents": recalls.documents, "rows": recalls.rows()}
    return {
        "rows": [*rows, *of_tuned.rows, *of_cross, _large(of, recalls)],
        "sizes": sizes,
        "dimensions": of_tuned.dimensions,
        "general": of_tuned.general,
        "cross": crossed,
        "seeds": seeds,
        "margin": claims.MARGIN,
    }


def _zero_shot(of: Measured) -> dict[str, Any]:
    """The best system that is fitted on choices against the best encoder, corrected for the choice of the best."""
    texts, fitted = of.opened.of_role("encoder"), of.opened.of_role(*FITTED)
    if not fitted:
        return claims.missing(claims.ZERO_SHOT, NO_CHOICES)
    text = of.table().best(texts)
    best, found = claims.best_compared(of.values, fitted, text, of.held_out.users)
    return claims.row(claims.ZERO_SHOT, MAIN, best, text, {**found, "of": "all"}, len(fitted))


def _changed(of: Measured, claim: Claim, seeds: int) -> dict[str, Any]:
    """A system against the same system with one changed parameter."""
    base = full_system(of.opened.systems, claim.kind, claim.changed)
    if base is None:
        return claims.missing(claim, no_full_system(of.opened.systems, claim.kind, claim.changed))
    try:
        full = _scores(of, claim.kind, base.params, seeds)
        reduced = _scores(of, claim.kind, {**base.params, **claim.changed}, seeds)
    except (UserError, RetrieverError) as error:
        return claims.missing(claim, str(error).rstrip("."))
    name = claim.of if claim.of in of.masks else "all"
    mask = of.masks[name]
    users = [user for user, here in zip(of.held_out.users, mask, strict=True) if here]
    found = claims.compared(full[:, mask], reduced[:, mask], users)
    changed = ", ".join(f"{key}: {value}" for key, value in claim.changed.items()).lower()
    return claims.row(claim, MAIN, base.name, f"{base.name} with {changed}", {**found, "of": name})


def _scores(of: Measured, kind: str, params: Mapping[str, Any], seeds: int) -> np.ndarray:
    """(S, Q) `MAIN` of a system, fitted with S different seeds; S = 1 for a system without a seed."""
    each = seeded(params, seeds if "seed" in retrievers.parameters(kind) else 1)
    return values_of(of.recipe, of.task, of.held_out, of.open(kind, each))[..., METRICS.index(MAIN)]


@dataclass(frozen=True)
class Recalls:
    """The recall@`claims.DEPTH` of some systems in random parts of the catalogue.

    documents: the sizes of the parts, the whole catalogue last.
    at: name -> (Q, sizes) recall.
    """

    documents: Sequence[int]
    at: Mapping[str, np.ndarray]

    def rows(self) -> list[dict[str, Any]]:
        """The name of each system and its mean recall at each size."""
        return [{"system": name, "recall": found.mean(axis=0).tolist()} for name, found in self.at.items()]


def _recalls(of: Measured) -> Recalls | None:
    """The recall of the encoders and of the best system that is fitted on choices. None where the smallest part of the
    catalogue has fewer than `claims.SMALLEST` documents."""
    documents = len(of.task.catalog)
    sizes = [round(documents * share) for share in claims.SHARES]
    if sizes[0] < claims.SMALLEST:
        return None
    table, fitted = of.table(), of.opened.of_role(*FITTED)
    names = [*of.opened.of_role("encoder"), *([table.best(fitted)] if fitted else [])]
    return Recalls(
        sizes,
        {
            name: np.stack([claims.recall_at_size(of.ranks[name], documents, size) for size in sizes], axis=1)
            for name in names
        },
    )


def _large(of: Measured, recalls: Recalls | None) -> dict[str, Any]:
    """Which of the best encoder and the best system that is fitted on choices loses more of its recall."""
    if recalls is None:
        few = f"an eighth of {len(of.task.catalog):,} documents is fewer than {claims.SMALLEST}"
        return claims.missing(claims.LARGE, few)
    fitted = [name for name in recalls.at if name in of.opened.of_role(*FITTED)]
    if not fitted:
        return claims.missing(claims.LARGE, NO_CHOICES)
    text = of.table().best(of.opened.of_role("encoder"))
    ends = {name: recalls.at[name][:, [0, -1]] for name in (fitted[0], text)}
    found = claims.kept(ends, fitted[0], text, of.held_out.users)
    metric = f"the share of recall@{claims.DEPTH} that is kept from an eighth of the catalogue to all of it"
    return claims.row(claims.LARGE, metric, fitted[0], text, {**found, "of": "all"})
