"""The claims that this toolkit started from, and what the numbers of a page say about each of them. Pure functions.

A claim says that one system, the *full* one, needs something that another one, the *reduced* one, lacks. It is tested
by the paired difference of the two, and by whether that difference exceeds `MARGIN`, a share of the reduced system's
score that was set before anything was measured:

    stands: the interval of the difference is above 0.
    relaxed: the interval of (difference - MARGIN x reduced) is below 0. The full system is then shown to be at most so
        much ahead, or behind. This is a test for a difference that is too small to matter, with one limit (Schuirmann
        1987). It goes before "stands", because a lead that is shown to be smaller than the margin supports no claim.
    undecided: neither.

Shapes: S seeds, Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rec_r1.evaluation.number_format import percent
from rec_r1.evaluation.significance import interval, over_seeds, resampled
from rec_r1.similarity_gap.sentences import bounds, corrected
from rec_r1.similarity_gap.utility import Table

MARGIN = 0.05  # A lead of less than this share of the reduced system's score does not support a claim.
STANDS, RELAXED, UNDECIDED, NOT_MEASURED = "stands", "relaxed", "undecided", "not measured"
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)  # Of the catalogue, in the sweep over its size.
DEPTH = 10  # Of the recall in that sweep.
SMALLEST = 20 * DEPTH  # The smallest catalogue of the sweep: in one of few documents, chance alone finds the target.


class Claim(NamedTuple):
    """A claim, and the change of a system that tests it.

    key: its name on the page.
    says: the claim, a sentence.
    kind: the retriever that is changed.
    changed: the parameters of the reduced system.
    of: the slice of queries that it is about, where the data have it; otherwise it is tested on all.
    source: where the claim comes from, and what of it was read.
    """

    key: str
    says: str
    kind: str
    changed: Mapping[str, Any]
    of: str
    source: str


# Without a system that is changed: decided by the numbers of other sections.
ZERO_SHOT = Claim(
    "similarity",
    "A system that is fitted on users' choices finds more of what they choose next than an encoder of texts that was "
    "not trained on them.",
    "", {}, "all", "the premise of this toolkit",
)  # fmt: skip
LARGE = Claim(
    "catalogue",
    "As the catalogue grows, an encoder of texts loses a larger share of its recall than the best system that is "
    "fitted on choices.",
    "", {}, "all", "arXiv:2508.21038, its abstract: a dimension limits which sets of documents can be returned",
)  # fmt: skip
TUNED = Claim(
    "tuning",
    "An encoder of texts that is tuned on choices finds more than the same encoder before.",
    "dense", {}, "all", "no paper was read for it",
)  # fmt: skip
BEHIND = Claim(
    "objective",
    "The best other system that is fitted on choices finds more than an encoder that is tuned on them.",
    "dense", {}, "all", "no paper was read for it",
)  # fmt: skip
FORGETTING = Claim(
    "forgetting",
    "An encoder of texts finds more of a general set before it is tuned on choices than after.",
    "dense", {}, "all",
    "arXiv:2603.29519, its abstract: tuning on data like LIMIT costs more than 40% of the performance on MS MARCO",
)  # fmt: skip
DIMENSION = Claim(
    "dimension",
    "An encoder of texts that is tuned on choices finds more with all of its dimensions than with half of them.",
    "dense", {}, "all", "arXiv:2508.21038, its abstract: a dimension limits which sets of documents can be returned",
)  # fmt: skip
ALIGNMENT = Claim(
    "alignment",
    "Vectors of as many dimensions that are fitted to choices alone find more than an encoder of texts that is tuned "
    "on them.",
    "dense", {}, "all",
    "arXiv:2603.29519 and arXiv:2601.20844, their abstracts: the dimension alone does not explain failures of "
    "embeddings; the first one names misalignment and a shift of domain instead",
)  # fmt: skip
CROSS = Claim(
    "cross-attention",
    "A cross-encoder that puts the first documents of an encoder of texts into a new order finds more than the encoder "
    "alone.",
    "rerank", {}, "all", "no paper was read for it",
)  # fmt: skip
REST = Claim(
    "the rest",
    "The best other system that is fitted on choices finds more than an encoder with a cross-encoder behind it.",
    "rerank", {}, "all", "no paper was read for it",
)  # fmt: skip
CHANGES = [
    Claim(
        "negative weights",
        "EASE finds more with negative weights between items than without.",
        "ease", {"nonnegative": True}, "all",
        "arXiv:1905.03375, its abstract and the titles of its sections",
    ),
    Claim(
        "codes",
        "VQ-Rec finds more with discrete codes of the texts than with the embeddings of the texts themselves.",
        "vqrec", {"continuous": True}, "all",
        "arXiv:2210.12316, its abstract. It claims this of transfer between shops; here it is tested within one shop",
    ),
    Claim(
        "several vectors",
        "Several vectors for each user find more than one.",
        "personas", {"personas": 1}, "all",
        "arXiv:2010.07042, a summary of it",
    ),
    Claim(
        "collisions",
        "Frequently chosen items are found more often if no item shares its embedding with others.",
        "personas", {"hash_bits": 8}, "warm targets",
        "no paper was read for it",
    ),
]  # fmt: skip


def explained(seeds: int) -> str:
    """What the verdicts mean, for the pages. seeds: how many fits each system with random numbers had."""
    return (
        "Each claim compares two systems: a full one, and a reduced one that lacks what the claim is about. The claim "
        f"is relaxed if the full system is shown to be less than {percent(MARGIN)} ahead of the reduced one, or behind "
        "it; this limit was set before anything was measured. Otherwise it stands if the interval of the difference, "
        "full minus reduced, is above 0, and is undecided if not. Intervals resample users and, for systems that begin "
        f"with random numbers, their fits ({seeds} of each), except where the best of several systems is compared: "
        "there, each of them has one fit, and only users are resampled. Intervals are not corrected for the number of "
        "claims. A verdict holds for these data and these implementations."
    )


def verdict(lead: Mapping[str, float], beyond: Mapping[str, float]) -> str:
    """The verdict on a claim, see the head of this file.

    lead: the difference, full minus reduced, with low and high.
    beyond: the same minus `MARGIN` times the reduced system's score.
    """
    if beyond["high"] < 0:
        return RELAXED
    return STANDS if lead["low"] > 0 else UNDECIDED


def compared(full: np.ndarray, reduced: np.ndarray, users: Sequence[str]) -> dict[str, Any]:
    """Compare two systems over seeds and users.

        compared(np.array([[1.0, 0.5], [1.0, 0.4]]), np.array([[0.5, 0.5]]), ["ann", "bob"])

    full, reduced: (S, Q) scores. A system without a seed has S = 1. If both have seeds, these are paired by their
        order, because the two systems then begin with the same random numbers.
    users: Q labels; whose query it is. Seeds and whole users are resampled, see `significance.over_seeds`.

    Returns `lead`, `beyond` (see :func:`verdict`), `full` and `reduced` (their means), `seeds`, `queries`, `users`, and
    `verdict`. Raises ValueError without a query.
    """
    difference = full - reduced
    lead, beyond = over_seeds(difference, users), over_seeds(difference - MARGIN * reduced, users)
    return {
        "lead": lead,
        "beyond": beyond,
        "full": float(full.mean()),
        "reduced": float(reduced.mean()),
        "seeds": len(difference),
        "queries": difference.shape[1],
        "users": len(set(users)),
        "verdict": verdict(lead, beyond),
    }


def best_compared(
    values: Mapping[str, np.ndarray], among: Sequence[str], reduced: str, users: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """Compare the best of several systems with another one. The best is chosen by the same queries.

    values: name -> (Q, M), in the order of `utility.METRICS`.
    among: the systems of which the best in `utility.MAIN` is taken.
    reduced: the other system.
    users: Q labels.

    Returns the best system, and what :func:`compared` returns; both intervals are corrected for the choice of the best
    (see `utility.Table.chosen`).
    """
    # A system with the scores of the reduced one, raised by the margin, so that `beyond` has the same correction.
    raised = {"": values[reduced] * (1 + MARGIN)}
    shown = {name: values[name] for name in [*among, reduced]} | raised
    table = Table(shown, users, np.ones(len(users), bool))
    best = table.best(among)
    lead, beyond = table.chosen(best, among, reduced), table.chosen(best, among, "")
    return best, {
        "lead": lead,
        "beyond": beyond,
        "full": table.mean(best),
        "reduced": table.mean(reduced),
        "seeds": 1,
        "queries": table.queries,
        "users": table.users,
        "verdict": verdict(lead, beyond),
    }


def recall_at_size(ranks: np.ndarray, documents: int, sample: int) -> np.ndarray:
    """The recall@`DEPTH` that a system has in a smaller catalogue, from its ranks in the whole one.

    The smaller catalogue has the target and a random sample of the other documents. How many of the documents that rank
    above the target are in it is hypergeometric, so the expected recall over all samples is exact.

    ranks: (Q, T) int32 ranks of the targets, 0 = not retrieved or padding.
    documents: the size of the whole catalogue, at least 2.
    sample: the size of the smaller one.

    Returns (Q,) float64: the expected share of the query's targets among its first `DEPTH`. It holds for one target a
    query exactly; several targets are taken one by one, each with a sample of its own.
    """
    from scipy.stats import hypergeom

    found = np.where(ranks > 0, hypergeom.cdf(DEPTH - 1, documents - 1, np.maximum(ranks - 1, 0), sample - 1), 0.0)
    return np.asarray(found.sum(axis=1), np.float64)


def kept(found: Mapping[str, np.ndarray], full: str, reduced: str, users: Sequence[str]) -> dict[str, Any]:
    """Compare the shares of their recall that two systems keep from the smallest to the whole catalogue.

    found: name -> (Q, 2) recall in the smallest and in the whole catalogue.
    full, reduced: names of two systems; the claim is that ``full`` keeps the larger share.
    users: Q labels.

    Returns what :func:`compared` returns. A system that finds nothing in the smallest catalogue keeps no share, and the
    verdict is then undecided.
    """
    columns = np.concatenate([found[full], found[reduced]], axis=1)
    draws, means = resampled(columns, list(users)), columns.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = draws[:, 1::2] / draws[:, ::2]
        share = means[1::2] / means[::2]
    shares, share = np.nan_to_num(shares, nan=0.0, posinf=0.0), np.nan_to_num(share, nan=0.0, posinf=0.0)
    lead = interval(share[0] - share[1], shares[:, 0] - shares[:, 1])
    less = 1 + MARGIN
    beyond = interval(share[0] - less * share[1], shares[:, 0] - less * shares[:, 1])
    known = bool((means[::2] > 0).all())
    return {
        "lead": lead,
        "beyond": beyond,
        "full": float(share[0]),
        "reduced": float(share[1]),
        "seeds": 1,
        "queries": len(columns),
        "users": len(set(users)),
        "verdict": verdict(lead, beyond) if known else UNDECIDED,
    }


def row(claim: Claim, metric: str, full: str, reduced: str, found: Mapping[str, Any], among: int = 1) -> dict[str, Any]:
    """One claim as the page and its JSON have it.

    metric: what was compared.
    full, reduced: the names of the two systems.
    found: what :func:`compared` or :func:`kept` returned, and the slice, or the name of other data, as `of`. None as
        `users` = it is unknown whose queries they are.
    among: the number of systems that ``full`` was chosen among, for which its interval is corrected.
    """
    known = {"key": claim.key, "says": claim.says, "source": claim.source, "metric": metric}
    return {
        **known,
        "systems": {"full": full, "reduced": reduced},
        **found,
        "sentence": _sentence(metric, full, reduced, found, among),
    }


def missing(claim: Claim, reason: str) -> dict[str, Any]:
    """The row of a claim that could not be tested. reason: why, without a full stop."""
    return {
        "key": claim.key,
        "says": claim.says,
        "source": claim.source,
        "verdict": NOT_MEASURED,
        "sentence": f"Not measured: {reason}.",
    }


def _sentence(metric: str, full: str, reduced: str, found: Mapping[str, Any], among: int) -> str:
    """What was found, in one sentence that follows from the numbers of the row."""
    where = "" if found["of"] == "all" else f" on {found['of']}"
    fits = f", {found['seeds']} fits" if found["seeds"] > 1 else ""
    users = "" if found["users"] is None else f" of {found['users']:,} users"
    asked = f"({found['queries']:,} queries{users}{fits})"
    numbers = f"{bounds(found['lead'])}{corrected(among)}{where} {asked}"
    limit = percent(MARGIN)
    said = {
        STANDS: f"{full} is ahead of {reduced} in {metric}: {numbers}.",
        RELAXED: f"{full} is shown to be less than {limit} ahead of {reduced} in {metric}, or behind it: {numbers}.",
        UNDECIDED: f"{full} is not shown to be ahead of {reduced} in {metric}, and a lead of {limit} or more is not "
        f"ruled out: {numbers}.",
    }
    return f"{found['verdict'].capitalize()}: {said[found['verdict']]}"
