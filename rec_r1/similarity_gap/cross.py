"""The claims about a cross-encoder, which reads the query and a document together, behind an encoder of texts.

The cross-encoder puts the first m documents of the tuned encoder into a new order, and each fit of the encoder has a
cross-encoder of its own. The parameters are those of the recipe where its retriever is `rerank`. Without a `model`
there, the cross-encoder begins with the weights of the encoder, and is tuned on the task's choices. m is chosen on
validation.

The page also shows what the perfect order would reach, which puts the targets among the first m documents before all
others. So a reader can tell a cross-encoder that orders badly from documents that lack the targets.

Scoring takes long, so that at most `QUERIES` queries are asked.

Shapes: S fits, Q queries, T targets per query, M metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rec_r1.config import Recipe, UserError, cache_folder
from rec_r1.environment import leave_out_history
from rec_r1.evaluation.records import users_of
from rec_r1.evaluation.significance import interval, over_seeds, resampled_over_seeds
from rec_r1.similarity_gap import claims, cross_sentences, utility
from rec_r1.similarity_gap.held_out import FEWEST_USERS, HeldOut
from rec_r1.similarity_gap.measured import NO_CHOICES, Measured, seeded
from rec_r1.similarity_gap.systems import Wanted, ranks_of
from rec_r1.similarity_gap.tuned_claims import NO_ENCODER, RERANK, Tuned, encoder_of, others_of
from rec_r1.similarity_gap.utility import MAIN, METRICS, Table
from retrievers import Retriever, RetrieverError
from retrievers.combine.rerank import Rerank
from retrievers.text import dense
from retrievers.text.tuning import cross_start

logger = logging.getLogger(__name__)
DEPTHS = (10, 20, 40)  # The values of m to choose from, where the recipe has none.
TUNED = {"epochs": 2, "pairs": 2000}  # How a cross-encoder is tuned that begins with the weights of an encoder.
QUERIES = (1000, 300)  # Whole users are drawn until there are so many queries, and so many of validation.
QUICK_QUERIES = 200  # The same with --quick, of both.
SEED = 0  # Of the draw of users.
CLAIMS = (claims.CROSS, claims.REST)
QUICK = "--quick tunes no cross-encoder, and the recipe names none (retriever.kind=rerank, retriever.params.model)"


class Settings(NamedTuple):
    """How a cross-encoder is made.

    model: its folder or hub id. None = it begins with the weights of the encoder.
    tuned: how it is tuned. None = it stays as it is.
    depths: the values of m to choose from.
    others: other parameters of `rerank`.
    """

    model: str | None
    tuned: Mapping[str, Any] | None
    depths: Sequence[int]
    others: Mapping[str, Any]


def settings_of(recipe: Recipe) -> Settings:
    """How the recipe says that a cross-encoder is made; the defaults where its retriever is not `rerank`.

    `tuned_claims.settings_of` has refused wrong parameters before anything is fitted.
    """
    given = dict(recipe.retriever.params) if recipe.retriever.kind == RERANK else {}
    given.pop("retriever", None)
    m, model, tuned = given.pop("m", None), given.pop("model", None), given.pop("tuned", None)
    if model is None:
        tuned = TUNED if tuned is None else tuned
    return Settings(model, tuned, DEPTHS if m is None else (m,), given)


class First(NamedTuple):
    """The encoder whose first documents are put into a new order.

    encoder: the encoder before it is tuned.
    name: its name on the page.
    params, backends: the parameters and the retriever of each of S fits, or of the encoder itself.
    """

    encoder: Wanted
    name: str
    params: Sequence[Mapping[str, Any]]
    backends: Sequence[Retriever]


def test(of: Measured, tuned: Tuned | str, quick: bool) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Test the claims.

    of: what the page has measured already.
    tuned: the tuned encoder, or why there is none.
    quick: whether nothing is tuned. The first documents are then those of the encoder before it is tuned.

    Returns the rows of `CLAIMS`, see `claims.row`, and what :func:`tested` returns beside them; None where nothing was
    measured. Raises UserError or RetrieverError where the recipe names a cross-encoder that cannot be used.
    """
    settings, encoder = settings_of(of.recipe), encoder_of(of)
    if encoder is None:
        return _missing(NO_ENCODER), None
    if quick and settings.model is None:
        return _missing(QUICK), None
    if isinstance(tuned, str) and not quick:
        return _missing(tuned), None
    if isinstance(tuned, Tuned):
        first = First(encoder, tuned.name, tuned.params, tuned.backends)
    else:
        first = First(encoder, encoder.name, [encoder.params], [of.opened.backends[encoder.name]])
    try:
        fits = _opened(of, first, settings._replace(tuned=None) if quick else settings)
    except (UserError, RetrieverError) as error:
        if of.recipe.retriever.kind == RERANK:
            raise
        return _missing(str(error).rstrip(".")), None
    return _measured(of, first, fits, settings.depths, (QUICK_QUERIES, QUICK_QUERIES) if quick else QUERIES)


def _measured(
    of: Measured, first: First, fits: Sequence[Rerank], depths: Sequence[int], most: tuple[int, int]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Choose m, rank and test. most: how many queries are asked at most, and how many of validation."""
    split, validation = of.held_out.split, of.task.validation
    places = drawn(of.held_out.users, most[0])
    held_out = HeldOut.of(split.take(places.tolist()))
    chosen_on = None
    if len(validation) and len(depths) > 1:
        chosen_on = HeldOut.of(validation.take(drawn(users_of(validation), most[1]).tolist()))
    asked = len(places) + (0 if chosen_on is None else len(chosen_on.queries))
    logger.info(
        "cross-attention: the first %d documents of %d queries, with %d cross-encoders: at most %d pairs of texts",
        depths[-1], asked, len(fits), asked * depths[-1] * len(fits),
    )  # fmt: skip
    alone = [leave_out_history(of.recipe, each, of.task) for each in first.backends]
    m, means = _depth(of, fits, alone, depths, chosen_on)
    before, after = _ranks(of, first.backends, held_out), _ranks(of, _around(fits, alone, m), held_out)
    ranks = {"before": before, "after": after, "perfect": np.stack([perfect(r, held_out.grades, m) for r in before])}
    values = {key: np.stack([utility.scored(held_out, each) for each in found]) for key, found in ranks.items()}
    others = {name: of.values[name][places] for name in others_of(of)}
    inside = np.stack([listed(each, held_out.targets, m) for each in before])
    rows, shown = tested(first.name, m, values, others, held_out.users, inside)
    more = {
        "of": len(split),
        "seed": SEED,
        "depths": means,
        "validation": 0 if chosen_on is None else len(chosen_on.queries),
        "epochs": [each.report.get("epochs") for each in fits],
    }
    return rows, {**shown, **more}


def _missing(reason: str) -> list[dict[str, Any]]:
    return [claims.missing(claim, reason) for claim in CLAIMS]


def drawn(users: Sequence[str], most: int) -> np.ndarray:
    """The queries of users who are drawn at random until they have ``most`` queries, and are at least `FEWEST_USERS`.

    users: Q labels.

    Returns the places of the queries, ascending: (q,) int64.
    """
    names, user, counts = np.unique(np.asarray(users), return_inverse=True, return_counts=True)
    order = np.random.default_rng(SEED).permutation(len(names))
    needed = 1 + int(np.searchsorted(np.cumsum(counts[order]), most))
    return np.flatnonzero(np.isin(user, order[: max(needed, FEWEST_USERS)]))


def _opened(of: Measured, first: First, settings: Settings) -> list[Rerank]:
    """A cross-encoder behind each fit of the encoder, from the cache or tuned now."""
    from tqdm import tqdm

    seeds = len(first.params)
    tuned = [None] * seeds if settings.tuned is None else seeded(settings.tuned, seeds)
    out = []
    for seed, (inner, how) in enumerate(tqdm(list(zip(first.params, tuned, strict=True)), "cross-encoders")):
        params = {
            **settings.others,
            "model": settings.model or _start(first.encoder, int((how or {}).get("seed", seed))),
            "m": settings.depths[-1],
            "tuned": how,
            "retriever": {"kind": "dense", "params": inner},
        }
        out += of.open(RERANK, [params])
    return [each for each in out if isinstance(each, Rerank)]


def _start(encoder: Wanted, seed: int) -> str:
    """The folder of a cross-encoder with the weights of the encoder. seed: of its head."""
    opened = dense.Params(**encoder.params).encoder()
    folder = cache_folder() / "encoders" / f"cross-{opened.describe()['files'][:16]}-{seed}"
    try:
        return str(cross_start.save(opened, folder, seed))
    except ValueError as error:
        raise UserError(str(error)) from error


def _around(fits: Sequence[Rerank], alone: Sequence[Retriever], m: int) -> list[Retriever]:
    """The cross-encoders around the fits of the encoder. alone: these fits. They leave out the history, so that each of
    the first m documents can be the target."""
    return [fit.around(each, m) for fit, each in zip(fits, alone, strict=True)]


def _ranks(of: Measured, backends: Sequence[Retriever], held_out: HeldOut) -> np.ndarray:
    """(S, Q, T) int32 ranks, from the cache or computed now."""
    return np.stack([ranks_of(of.recipe, of.task, {"": each}, held_out)[""] for each in backends])


def _depth(
    of: Measured, fits: Sequence[Rerank], alone: Sequence[Retriever], depths: Sequence[int], chosen_on: HeldOut | None
) -> tuple[int, dict[str, float]]:
    """The m with the best mean over all fits on validation, and the mean of each m. Without a choice, the largest."""
    if chosen_on is None:
        return depths[-1], {}
    means = {}
    for m in sorted(depths, reverse=True):  # The largest first: its scores are all that the others need.
        ranks = _ranks(of, _around(fits, alone, m), chosen_on)
        values = np.stack([utility.scored(chosen_on, each) for each in ranks])
        means[m] = float(values[..., METRICS.index(MAIN)].mean())
    best = max(sorted(means), key=lambda m: means[m])
    return best, {str(m): means[m] for m in sorted(means)}


def perfect(ranks: np.ndarray, grades: np.ndarray, m: int) -> np.ndarray:
    """The ranks after the best order of the first m documents: the targets among them come first, by their grades.

    ranks: (Q, T) int32 ranks of the targets, 0 = not retrieved or padding.
    grades: (Q, T) float32.

    Returns (Q, T) int32. Targets behind the first m keep their ranks.
    """
    inside = (ranks > 0) & (ranks <= m)
    order = np.argsort(np.where(inside, -grades, np.inf), axis=1, kind="stable")
    first = np.empty_like(ranks)
    np.put_along_axis(first, order, np.arange(1, ranks.shape[1] + 1, dtype=ranks.dtype)[None], axis=1)
    return np.where(inside, first, ranks)


def listed(ranks: np.ndarray, targets: np.ndarray, m: int) -> np.ndarray:
    """(Q, T) ranks and targets -> (Q,) float64 recall@m: the share of a query's targets among its first m."""
    inside = ((ranks > 0) & (ranks <= m)).sum(axis=1)
    return np.asarray(inside / np.maximum((targets >= 0).sum(axis=1), 1), np.float64)


def tested(
    name: str,
    m: int,
    values: Mapping[str, np.ndarray],
    others: Mapping[str, np.ndarray],
    users: Sequence[str],
    found: np.ndarray,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Test the claims by the values of all systems on the same queries.

    name: of the encoder.
    m: how many of its documents are put into a new order.
    values: `before`, `after` and `perfect` -> (S, Q, M), in the order of `utility.METRICS`: of the encoder, of the
        encoder with the cross-encoder behind it, and of the perfect order.
    others: name -> (Q, M), of the other systems that are fitted on choices. {} = there are none.
    users: Q labels.
    found: (S, Q) recall@m of the encoder.

    Returns the rows of `CLAIMS`, and what the page shows beside them as plain JSON: `systems` (a row for each of the
    encoder, the cross-encoder, the perfect order and the best other system, with the share of the gap between the first
    and the last that it closes), `recall` and `sentences`.
    """
    main, full = METRICS.index(MAIN), f"{name} + cross-encoder"
    before, after, best_order = (values[key][..., main] for key in ("before", "after", "perfect"))
    lifted = claims.compared(after, before, users)
    rows = [claims.row(claims.CROSS, MAIN, full, name, {**lifted, "of": "all"})]
    shown = {"encoder": name, "m": m, "queries": before.shape[1], "users": len(set(users)), "fits": len(before)}
    shown["recall"] = over_seeds(found, users)
    systems = {name: before, full: after, f"{name}, perfect order of its first {m}": best_order}
    if not others:
        alone = [{"system": each, **over_seeds(own, users), "share": None} for each, own in systems.items()]
        return [*rows, claims.missing(claims.REST, NO_CHOICES)], {**shown, "systems": alone, "sentences": []}
    # As for the tuned encoder, the best of the others is compared with the mean of the fits.
    means = {key: values[key].mean(axis=0) for key in ("before", "after", "perfect")}
    best, ahead = claims.best_compared({**others, full: means["after"]}, list(others), full, users)
    rows.append(claims.row(claims.REST, MAIN, best, full, {**ahead, "of": "all"}, len(others)))
    table = Table({**others, **means}, users, np.ones(len(users), bool))
    gap, missed = (table.chosen(best, list(others), against) for against in ("before", "perfect"))
    systems[best] = np.broadcast_to(others[best][None, :, main], before.shape)
    shares = shares_closed(np.stack(list(systems.values()), axis=-1), users, gap)
    shown["systems"] = [
        {"system": each, **over_seeds(own[:1] if each == best else own, users), "share": share}
        for (each, own), share in zip(systems.items(), shares, strict=True)
    ]
    verdicts = lifted["verdict"], ahead["verdict"]
    shown["gap"], shown["missed"], shown["among"] = gap, missed, len(others)
    shown["sentences"] = [
        cross_sentences.closed(full, name, best, verdicts, gap, shares[1], len(others)),
        cross_sentences.bound(name, m, best, shown["recall"], missed, shares[2], len(others)),
    ]
    return rows, shown


def shares_closed(values: np.ndarray, users: Sequence[str], gap: Mapping[str, float]) -> list[dict[str, float | None]]:
    """The share of the gap between the first and the last system that each closes, over fits and users.

    values: (S, Q, C) scores of C systems.
    users: Q labels.
    gap: the last minus the first, with its corrected interval.

    Returns C shares with mean, low and high. As in `utility.Table.closed`, all are None where there is no gap, and low
    and high where the interval of the gap holds 0.
    """
    means = values.mean(axis=(0, 1))
    if means[-1] <= means[0]:
        return [{"mean": None, "low": None, "high": None} for _ in means]
    shares = (means - means[0]) / (means[-1] - means[0])
    if gap["low"] <= 0:
        return [{"mean": float(share), "low": None, "high": None} for share in shares]
    draws = resampled_over_seeds(values, users)
    draws = draws[draws[:, -1] > draws[:, 0]]
    ratios = (draws - draws[:, :1]) / (draws[:, -1:] - draws[:, :1])
    return [{**interval(float(share), own)} for share, own in zip(shares, ratios.T, strict=True)]
