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
from rec_r1.config import Recipe, UserError
from rec_r1.similarity_gap import claims, utility
from rec_r1.similarity_gap.claims import Claim
from rec_r1.similarity_gap.held_out import HeldOut
from rec_r1.similarity_gap.systems import LSA, Opened, open_system, ranks_of
from rec_r1.similarity_gap.utility import MAIN, METRICS, Table
from rec_r1.tasks import Task
from retrievers import RetrieverError

logger = logging.getLogger(__name__)
SEEDS = 3  # How many fits of a system with random numbers.
FITTED = ("people", "both")  # The roles of systems that are fitted on choices.
NO_CHOICES = "no system here is fitted on choices"
TUNING = (claims.TUNED, claims.BEHIND)
NOT_TUNED = "--quick tunes no encoder"


@dataclass(frozen=True)
class Measured:
    """What the page has measured already.

    recipe, task, held_out: what is measured, see `measure.measure`.
    opened: the systems.
    ranks: name -> (Q, T) int32 ranks of the targets.
    values: name -> (Q, M), in the order of `utility.METRICS`.
    masks: name of a slice -> (Q,) bool.
    """

    recipe: Recipe
    task: Task
    held_out: HeldOut
    opened: Opened
    ranks: Mapping[str, np.ndarray]
    values: Mapping[str, np.ndarray]
    masks: Mapping[str, np.ndarray]

    def table(self) -> Table:
        """All systems on all queries."""
        return Table(self.values, self.held_out.users, np.ones(len(self.held_out.queries), bool))


def retest(of: Measured, seeds: int = SEEDS, tuned: bool = True) -> dict[str, Any]:
    """Test all claims.

    of: what the page has measured already.
    seeds: how many fits of each system that begins with random numbers, at least 1.
    tuned: whether an encoder is tuned, which takes longer than everything else.

    Returns `rows` (one per claim, see `claims.row`), `sizes` (recall by the catalogue's size, see :class:`Recalls`;
    None for a small catalogue), `seeds` and `margin`.
    """
    from tqdm import tqdm

    rows = [_zero_shot(of)]
    for claim in tqdm(claims.CHANGES, "testing claims", leave=False):
        rows.append(_changed(of, claim, seeds))
    rows += _tuned(of, seeds) if tuned else [claims.missing(claim, NOT_TUNED) for claim in TUNING]
    recalls = _recalls(of)
    sizes = None if recalls is None else {"documents": recalls.documents, "rows": recalls.rows()}
    return {"rows": [*rows, _large(of, recalls)], "sizes": sizes, "seeds": seeds, "margin": claims.MARGIN}


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
    base = of.opened.of_kind(claim.kind)
    if base is None:
        return claims.missing(claim, f"{claim.kind} is not among the systems")
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


def _tuned(of: Measured, seeds: int) -> list[dict[str, Any]]:
    """An encoder that is tuned on choices, against itself before and against the best other system that is fitted on
    them.

    The encoder is the first that is not fitted on the catalogue's own words.
    """
    texts = [system for system in of.opened.systems if (system.role, system.kind) == ("encoder", "dense")]
    encoder = next((system for system in texts if system.params.get("model") != LSA), None)
    fitted = [s.name for s in of.opened.systems if s.role in FITTED and s.kind != "dense"]
    if encoder is None or not fitted:
        reason = "no encoder here can be tuned" if encoder is None else NO_CHOICES
        return [claims.missing(claim, reason) for claim in TUNING]
    each = [{**encoder.params, "tuned": {"seed": seed} if seed else {}} for seed in range(seeds)]
    try:
        values = _values(of, encoder.kind, each)
    except (UserError, RetrieverError) as error:
        return [claims.missing(claim, str(error).rstrip(".")) for claim in TUNING]
    name, main, users = f"{encoder.name}, tuned", METRICS.index(MAIN), of.held_out.users
    lifted = claims.compared(values[..., main], of.values[encoder.name][None, :, main], users)
    # The best of the others is chosen by its lead over the mean of the fits, and its interval resamples users alone.
    best, ahead = claims.best_compared({**of.values, name: values.mean(axis=0)}, fitted, name, users)
    return [
        claims.row(claims.TUNED, MAIN, name, encoder.name, {**lifted, "of": "all"}),
        claims.row(claims.BEHIND, MAIN, best, name, {**ahead, "of": "all"}, len(fitted)),
    ]


def _scores(of: Measured, kind: str, params: Mapping[str, Any], seeds: int) -> np.ndarray:
    """(S, Q) `MAIN` of a system, fitted with S different seeds; S = 1 for a system without a seed."""
    seeded = "seed" in retrievers.parameters(kind)
    first = int(params.get("seed", 0))
    # The first fit has the parameters as they are, because a seed that is named gives the fit another folder.
    each = [{**params, "seed": first + s} if s else dict(params) for s in range(seeds if seeded else 1)]
    return _values(of, kind, each)[..., METRICS.index(MAIN)]


def _values(of: Measured, kind: str, each: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(S, Q, M) values of a system that is opened with each of S sets of parameters."""
    found = []
    for params in each:
        backend = open_system(of.recipe, of.task, kind, params)
        ranks = ranks_of(of.recipe, of.task, {kind: backend}, of.held_out)[kind]
        found.append(utility.scored(of.held_out, ranks))
    return np.stack(found)


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
