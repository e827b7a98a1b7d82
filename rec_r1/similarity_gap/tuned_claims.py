"""The claims about an encoder of texts that is tuned on choices.

The encoder is the first of the page that is not fitted on the catalogue's own words. It is tuned with several seeds,
as `tuned` of the recipe says where its retriever is `dense`, or `rerank` around `dense`.

Shapes: S seeds, Q queries, M metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rec_r1.config import Recipe, UserError, refuse
from rec_r1.environment import retriever_problems
from rec_r1.similarity_gap import claims, dimension, general
from rec_r1.similarity_gap.claims import Claim
from rec_r1.similarity_gap.measured import FITTED, NO_CHOICES, Measured, seeded
from rec_r1.similarity_gap.systems import LSA, Wanted, values_of
from rec_r1.similarity_gap.utility import MAIN, METRICS
from retrievers import RetrieverError
from retrievers.text.dense import Dense

logger = logging.getLogger(__name__)
RERANK = "rerank"  # The retriever around `dense` whose parameters say how the cross-encoder of the page is made.
OBJECTIVE = (claims.TUNED, claims.BEHIND)
NO_ENCODER = "no encoder here can be tuned"
NOT_TUNED = "--quick tunes no encoder"


class Tuned(NamedTuple):
    """An encoder with its fits.

    system: the encoder before it is tuned.
    name: its name on the page after it is tuned.
    params: the parameters of each of S seeds.
    backends: the tuned encoder of each of S seeds.
    values: (S, Q, M), in the order of `utility.METRICS`.
    """

    system: Wanted
    name: str
    params: Sequence[Mapping[str, Any]]
    backends: Sequence[Dense]
    values: np.ndarray


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """How an encoder is tuned: `tuned` of the recipe where its retriever is `dense`, or `rerank` around `dense`; else
    {}, the defaults.

    Raises UserError for a wrong parameter of that retriever.
    """
    kind, params = recipe.retriever.kind, recipe.retriever.params
    if kind in ("dense", RERANK):
        refuse(retriever_problems(recipe))
    if kind == RERANK:
        inner = params.get("retriever") or {}
        kind, params = inner.get("kind", ""), inner.get("params") or {}
    if kind != "dense":
        return {}
    tuned = dict(params.get("tuned") or {})
    others = sorted(set(params) - {"tuned"})
    if tuned and others:
        logger.warning(
            "retriever.params.%s: not used: of the recipe's `dense`, this page only takes tuned, and the encoders are "
            "those of --encoder", ", ".join(others),
        )  # fmt: skip
    return tuned


class Tested(NamedTuple):
    """What was found.

    rows: one per claim, see `claims.row`.
    dimensions: what is found by the number of dimensions, see :func:`_swept`. None = it was not measured.
    general: what is found of the general set, see `general.tested`. None = it was not measured.
    """

    rows: list[dict[str, Any]]
    dimensions: dict[str, Any] | None
    general: dict[str, Any] | None


def test(of: Measured, tuned: Tuned | str) -> Tested:
    """Test all claims about a tuned encoder.

    of: what the page has measured already.
    tuned: the tuned encoder, or why there is none, and the claims are not tested.
    """
    rows = _objective(of, tuned) if isinstance(tuned, Tuned) else _missing(OBJECTIVE, tuned)
    forgotten, found = _forgotten(of, tuned)
    more, dimensions = _swept(of, tuned)
    return Tested([*rows, forgotten, *more], dimensions, found)


def _missing(among: Sequence[Claim], reason: str) -> list[dict[str, Any]]:
    return [claims.missing(claim, reason) for claim in among]


def encoder_of(of: Measured) -> Wanted | None:
    """The encoder that is tuned. None = there is none that can be."""
    texts = [system for system in of.opened.systems if (system.role, system.kind) == ("encoder", "dense")]
    return next((system for system in texts if system.params.get("model") != LSA), None)


def fitted(of: Measured, seeds: int) -> Tuned | str:
    """The tuned encoder with S seeds, or why there is none.

    Raises UserError or RetrieverError where it cannot be tuned as the recipe says.
    """
    encoder, settings = encoder_of(of), settings_of(of.recipe)
    if encoder is None:
        return NO_ENCODER
    params = [{**encoder.params, "tuned": each} for each in seeded(settings, seeds)]
    try:
        backends = of.open(encoder.kind, params)
    except (UserError, RetrieverError) as error:
        if settings:
            raise
        return str(error).rstrip(".")
    values = values_of(of.recipe, of.task, of.held_out, backends)
    fits = [each for each in backends if isinstance(each, Dense)]
    return Tuned(encoder, f"{encoder.name}, tuned", params, fits, values)


def others_of(of: Measured) -> list[str]:
    """The systems that are fitted on choices and are no encoders of texts."""
    return [s.name for s in of.opened.systems if s.role in FITTED and s.kind != "dense"]


def _objective(of: Measured, tuned: Tuned) -> list[dict[str, Any]]:
    """The tuned encoder against itself before, and the best other system that is fitted on choices against it."""
    before, main, users = tuned.system.name, METRICS.index(MAIN), of.held_out.users
    lifted = claims.compared(tuned.values[..., main], of.values[before][None, :, main], users)
    first = claims.row(claims.TUNED, MAIN, tuned.name, before, {**lifted, "of": "all"})
    others = others_of(of)
    if not others:
        return [first, claims.missing(claims.BEHIND, NO_CHOICES)]
    # The best of the others is chosen by its lead over the mean of the fits, and its interval resamples users alone.
    values = {**of.values, tuned.name: tuned.values.mean(axis=0)}
    best, ahead = claims.best_compared(values, others, tuned.name, users)
    return [first, claims.row(claims.BEHIND, MAIN, best, tuned.name, {**ahead, "of": "all"}, len(others))]


def _forgotten(of: Measured, tuned: Tuned | str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The claim that tuning forgets, and what `general.tested` shows beside it. tuned: see :func:`_swept`."""
    if not isinstance(tuned, Tuned) or of.general is None:
        return claims.missing(claims.FORGETTING, tuned if isinstance(tuned, str) else NOT_TUNED), None
    before = tuned.system.name
    frozen = of.opened.backends[before]
    assert isinstance(frozen, Dense)
    found = general.measure(of.recipe, of.general, frozen, tuned.backends)
    epochs = [int(each.report["epochs"]) for each in tuned.backends]
    return general.tested(of.general, (before, tuned.name), *found, epochs)


def _swept(of: Measured, tuned: Tuned | str) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The claims about the number of dimensions, and what is found by it as plain JSON: `dimensions`, `rows` and the
    `sentence` about the tuned encoder. Without a tuned encoder only the frozen one is measured.

    tuned: the tuned encoder, or why there is none.
    """
    encoder = encoder_of(of)
    frozen = None if encoder is None else of.opened.backends[encoder.name]
    if encoder is None or not isinstance(frozen, Dense):
        return _missing(dimension.CLAIMS, NO_ENCODER), None
    encoders: dict[str, Sequence[Dense]] = {encoder.name: [frozen]}
    if isinstance(tuned, Tuned):
        encoders[tuned.name] = tuned.backends
    sweep = dimension.measure(of, encoders)
    if isinstance(sweep, str):
        return _missing(dimension.CLAIMS, sweep), None
    shown = {"dimensions": sweep.dimensions, "rows": sweep.rows()}
    if not isinstance(tuned, Tuned):
        return _missing(dimension.CLAIMS, tuned), {**shown, "sentence": None}
    rows, sentence = dimension.tested(sweep, tuned.name)
    return rows, {**shown, "sentence": sentence}
