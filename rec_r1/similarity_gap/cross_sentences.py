"""The sentences about a cross-encoder behind an encoder, made from verdicts and intervals. Pure functions.

The rest is the gap that remains between the tuned encoder and the best other system that is fitted on choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rec_r1.evaluation.number_format import number, percent
from rec_r1.similarity_gap import claims
from rec_r1.similarity_gap.sentences import bounds, corrected, direction, shares
from rec_r1.similarity_gap.utility import MAIN


def closed(
    full: str,
    encoder: str,
    best: str,
    verdicts: tuple[str, str],
    gap: Mapping[str, float],
    share: Mapping[str, float | None],
    among: int,
) -> str:
    """Whether cross-attention closes the rest.

    full, encoder, best: the names of the encoder with a cross-encoder, of the encoder alone, and of the best other
        system.
    verdicts: on the claims `claims.CROSS` and `claims.REST`.
    gap: best minus encoder, with its corrected interval.
    share: the share of the gap that the cross-encoder closes.
    among: the number of systems that ``best`` was chosen among.
    """
    lifted, rest = verdicts
    if direction(gap) != 1:
        return (
            f"No gap is shown to remain that cross-attention could close: {best} is not shown to be ahead of {encoder} "
            f"in {MAIN}, {bounds(gap)}{corrected(among)}."
        )
    numbers = f"it closes {shares(share)} of the gap between {encoder} and {best}"
    if rest == claims.RELAXED:
        limit = percent(claims.MARGIN)
        return (
            f"Cross-attention closes the rest here: {best} is shown to be less than {limit} ahead of {full}, or behind "
            f"it; {numbers}."
        )
    if rest == claims.STANDS:
        how = "closes only a part of the rest here"
        if lifted != claims.STANDS:
            how = "does not close the rest here, and is not shown to close a part of it"
        return f"Cross-attention {how}: {best} is ahead of {full}; {numbers}."
    part = "closes a part of the rest here, and whether it closes all of it is undecided"
    if lifted != claims.STANDS:
        part = "is shown neither to close the rest here nor to leave a part of it"
    return f"Cross-attention {part}; {numbers}."


def bound(
    encoder: str,
    m: int,
    best: str,
    recall: Mapping[str, float],
    missed: Mapping[str, float],
    share: Mapping[str, float | None],
    among: int,
) -> str:
    """What any order of the first m documents can reach.

    encoder: the encoder that finds them.
    m: their number.
    best: the best other system.
    recall: the encoder's recall@m.
    missed: best minus the perfect order, with its corrected interval.
    share: the share of the gap between encoder and best that the perfect order closes.
    among: the number of systems that ``best`` was chosen among.
    """
    interval = f"{percent(recall['mean'], 1)} [{percent(recall['low'], 1)}, {percent(recall['high'], 1)}]"
    start = f"{interval} of the targets are among the first {m} of {encoder}"
    lead: dict[str, Any] = {"mean": -missed["mean"], "low": -missed["high"], "high": -missed["low"]}
    verdict = {
        1: f"finds more than {best}, so that the order limits the cross-encoder and not the list of documents",
        -1: f"finds less than {best}, so that the list of documents limits every cross-encoder",
        0: f"is not shown to find more or less than {best}",
    }[direction(lead)]
    of_gap = "" if share["low"] is None else f", which is {shares(share)} of the gap"
    return f"{start}. The perfect order of these {m} {verdict}: {bounds(lead)}{corrected(among)} in {MAIN}{of_gap}."


def about(found: Mapping[str, Any]) -> list[str]:
    """How it was measured, in sentences. found: what `cross.test` returns beside its rows."""
    asked = f"Here {found['queries']:,} of {found['of']:,} queries are asked, of {found['users']:,} users"
    if found["queries"] != found["of"]:
        asked += f" who were drawn at random (seed {found['seed']})"
    chosen = f"The first {found['m']} documents of each query are put into a new order"
    if found["depths"]:
        listed = ", ".join(f"{m}: {number(value, 4)}" for m, value in found["depths"].items())
        chosen += f"; their number was chosen on {found['validation']:,} validation queries ({MAIN}: {listed})"
    epochs = [each for each in found["epochs"] if each is not None]
    how = "The cross-encoder is not tuned."
    if epochs:
        how = f"Each cross-encoder kept this epoch of its tuning, by validation: {', '.join(map(str, epochs))}."
    if 0 in epochs:
        how += " 0 is the model before tuning, whose head is random if it began with the weights of the encoder."
    return [
        f"{asked}. {chosen}.",
        how,
        "The perfect order puts the targets among these documents first, and no cross-encoder can exceed it. Brackets "
        "resample users, and the fits of systems that have several. The gap is that between the first row and the "
        "last.",
    ]
