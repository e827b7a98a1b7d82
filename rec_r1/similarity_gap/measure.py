"""The similarity gap of a task: how far similar texts are from what users choose next, and how much of it each system
closes.

A text encoder places similar items together, and a recommender needs what this user chooses next. `measure` loads the
held-out queries, opens the systems and ranks the targets. From the ranks it makes five sections of numbers (divergence,
utility, the gap closed, ablations, claims), and from the numbers the sentences of the page.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import retrievers
from rec_r1.config import Recipe, UserError
from rec_r1.config.redaction import redact
from rec_r1.environment import excludes_history
from rec_r1.similarity_gap import divergence, retest, sentences, tuned_claims, utility
from rec_r1.similarity_gap.general import load as load_general
from rec_r1.similarity_gap.held_out import HeldOut, load
from rec_r1.similarity_gap.measured import Measured
from rec_r1.similarity_gap.systems import ENCODERS, Opened, Wanted, full_system, no_full_system, open_systems, ranks_of
from rec_r1.similarity_gap.utility import MAIN, UNLIKE, Table
from rec_r1.tasks import Task
from rec_r1.tasks.sequential import Params, settings
from retrievers import Query, Retriever
from retrievers.text.dense import Dense

logger = logging.getLogger(__name__)
SIMILAR = 100  # A target is similar to the history if it is among so many nearest texts of one of its items.
FOUND = "recall@100"  # The metric of the targets that are not similar, and the second metric of the ablations.


def measure(
    recipe: Recipe,
    split: str = "test",
    on: Sequence[str] = (),
    encoders: Sequence[str] = ENCODERS,
    seeds: int = retest.SEEDS,
    tuned: bool = True,
    general: Path | None = None,
) -> dict[str, Any]:
    """Measure the similarity gap of the recipe's task.

        found = measure(rec_r1.load_recipe("cpu/sequential", ["task.path=data/shop"]))

    recipe: the recipe. Where its retriever is `dense`, `tuned` says how an encoder is tuned for the claims; where it is
        `rerank` around `dense`, its parameters say how a cross-encoder is made, too.
    split: test, validation or train.
    on: systems instead of `SYSTEMS`, as `transfer` takes them.
    encoders: the names of text encoders.
    seeds: how many fits of each system that begins with random numbers, for the claims.
    tuned: whether the claims about a tuned encoder are tested, which takes longer than everything else.
    general: the folder of a set in BEIR's format, which shows what the tuned encoder forgets. None = emoji search.

    Returns everything that the page shows, as plain JSON. Raises UserError for a task without histories, a split with
    fewer than `FEWEST_USERS` users, a system of ``on`` that does not open, if no encoder opens, for a wrong `tuned`
    or ``general``, and for fewer than one seed.
    """
    if seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {seeds}")
    how = tuned_claims.settings_of(recipe)
    general_set = load_general(general) if tuned else None
    task, held_out = load(recipe, split)
    logger.info(
        "similarity gap of %s: %d %s queries of %d users, %d items in the catalogue",
        task.name, len(held_out.queries), split, len(set(held_out.users)), len(task.catalog),
    )  # fmt: skip
    opened = open_systems(recipe, task, on, encoders)
    ranks = ranks_of(recipe, task, opened.backends, held_out)
    changed = ranks_of(recipe, task, {change.name: change.backend for change in opened.changes}, held_out)

    values, changed_values = (
        {name: utility.scored(held_out, found) for name, found in group.items()} for group in (ranks, changed)
    )
    listed, changed_listed = (
        {name: utility.listed(held_out, found) for name, found in group.items()} for group in (ranks, changed)
    )
    texts = opened.of_role("encoder")
    vectors = {name: backend.embeddings for name in texts if isinstance(backend := opened.backends[name], Dense)}
    params = settings(recipe.task)
    masks = _slices(task, held_out, vectors, params.warm_from)
    tables = {name: Table(values, held_out.users, mask) for name, mask in masks.items()}
    whole = tables["all"]

    return sentences.added(
        {
            "about": {**_about(recipe, params, task, split, whole), "tuned": redact(how) if tuned else None},
            "systems": [_described(each, opened.backends[each.name], listed[each.name]) for each in opened.systems],
            "skipped": list(opened.skipped),
            "divergence": _divergence(task, vectors, opened),
            "utility": [_slice(name, table, listed, masks[name]) for name, table in tables.items()],
            "gap": _gap(whole, whole.best(texts), whole.best(whole.names)),
            "unlike": _unlike(tables.get(UNLIKE), opened, len(held_out.queries)),
            "ablations": _ablations(opened, (values, changed_values), (listed, changed_listed), held_out.users),
            "claims": retest.retest(
                Measured(recipe, task, held_out, opened, ranks, values, masks, general_set), seeds, tuned
            ),
        }
    )


def _slices(task: Task, held_out: HeldOut, vectors: Mapping[str, np.ndarray], warm_from: int) -> dict[str, np.ndarray]:
    """name -> (Q,) bool, see `utility.slices`. vectors: name -> (n, d) embeddings of each encoder."""
    assert task.interactions is not None
    fitted = np.bincount(task.interactions.rows, minlength=len(task.catalog))
    near = [divergence.top_text(each, SIMILAR) for each in vectors.values()]
    not_similar = utility.unlike(held_out.split, near) if near else None
    return utility.slices(utility.labels(held_out.split, fitted, warm_from), not_similar, held_out.users)


def _about(recipe: Recipe, params: Params, task: Task, split: str, table: Table) -> dict[str, Any]:
    """What was measured. params: `task.params` with its defaults. table: of all queries."""
    given, is_sequential = task.interactions, recipe.task.name == "sequential"
    assert given is not None
    return {
        "task": task.name,
        "part": split,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "queries": table.queries,
        "users": table.users,
        "items": len(task.catalog),
        "chosen_items": int((given.counts > 0).sum()),
        "choices": len(given.rows),
        "fitted_users": len(given),
        "validation": len(given.validation_targets),
        "set_apart": task.set_apart,
        "warm_from": params.warm_from,
        "titles": params.raw_titles if is_sequential else None,
        "history": params.history,
        "excludes_history": excludes_history(recipe, task),
        "split": sentences.splitting(recipe.task.name, params.split if is_sequential else None, params.layout),
        "settings": redact({"name": recipe.task.name, "path": recipe.task.path, "params": recipe.task.params}),
    }


def _described(system: Wanted, backend: Retriever, listed: np.ndarray) -> dict[str, Any]:
    """A system, without secrets. listed: (Q,), the share of each query's targets that it lists."""
    described = redact({**system._asdict(), "params": dict(system.params)})
    return {**described, "fit": sentences.fits(retrievers.fits(backend)), "listed": float(listed.mean())}


def _divergence(task: Task, vectors: Mapping[str, np.ndarray], opened: Opened) -> dict[str, Any]:
    """Section A: a measurement for each encoder. B is that of the first EASE that may have negative weights.

    vectors: name -> (n, d) embeddings of each encoder.
    """
    without = {"nonnegative": True}
    ease = full_system(opened.systems, "ease", without)
    weights = None if ease is None else _weights(opened.backends[ease.name], len(task.catalog))
    assert task.interactions is not None
    choices = task.interactions.matrix()
    found = []
    for name, embeddings in vectors.items():
        logger.info("%s: neighbours by text against choices, %d permutations", name, divergence.PERMUTATIONS)
        try:
            found.append({"encoder": name, **divergence.measure(np.asarray(embeddings), choices, weights)})
        except ValueError as error:
            return {"encoders": [], "reason": str(error)}
    reason = None if ease is not None else f"EASE's B is not shown: {no_full_system(opened.systems, 'ease', without)}."
    return {"encoders": found, "reason": reason}


def _weights(backend: Any, n: int, block: int = 512) -> Callable[[], Iterator[tuple[int, np.ndarray]]]:
    """B of a linear model, as a function that returns (first row, block of rows). Row i holds the scores for a history
    of document i alone."""

    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, n, block):
            yield start, backend.model.scores([Query(history=(i,)) for i in range(start, min(n, start + block))])

    return blocks


def _slice(name: str, table: Table, listed: Mapping[str, np.ndarray], mask: np.ndarray) -> dict[str, Any]:
    """Section B: one slice. Each row also has the share of the slice's targets that the system lists."""
    rows = [{**row, "listed": float(listed[row["system"]][mask].mean())} for row in table.rows()]
    return {"slice": name, "queries": table.queries, "users": table.users, "rows": rows}


def _gap(table: Table, text: str, best: str) -> dict[str, Any]:
    """Section C. The interval of the best system's lead is corrected for the choice of the best; the others are not."""
    whole = table.chosen(best, table.names, text)
    leads = {name: whole if name == best else table.difference(name, text) for name in table.names}
    rows = [
        {"system": name, **table.of(name), "lead": lead, "share": table.closed(name, text, best)}
        for name, lead in leads.items()
    ]
    return {
        "metric": MAIN,
        "text": text,
        "best": best,
        "difference": whole,
        "among": len(table.names) - 1,
        "uncorrected": table.difference(best, text),
        "rows": rows,
    }


def _unlike(table: Table | None, opened: Opened, queries: int) -> dict[str, Any] | None:
    """The targets that are similar to nothing in the history: the best system that is fitted on choices, against
    popularity. None if there are no such targets or no such systems.

    table: of the queries with such targets.
    queries: the number of all queries.
    """
    fitted, popular = opened.of_role("people", "both"), opened.of_role("popularity")
    if table is None or not fitted or not popular:
        return None
    best, against = table.best(fitted, FOUND), popular[0]
    found = table.chosen(best, fitted, None, FOUND)
    found |= {"low": max(0.0, found["low"]), "high": min(1.0, found["high"])}  # Recall is between 0 and 1.
    return {
        "share": table.queries / queries,
        "queries": table.queries,
        "best": best,
        "against": against,
        "metric": FOUND,
        "among": len(fitted),
        "found": found,
        "lead": table.chosen(best, fitted, against, FOUND),
    }


def _ablations(
    opened: Opened,
    values: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]],
    listed: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]],
    users: Sequence[str],
) -> list[dict[str, Any]]:
    """Section D: the changed system minus the unchanged one, paired.

    values: name -> (Q, M), of the systems and of their changes.
    listed: name -> (Q,), of the systems and of their changes.
    users: Q labels.
    """
    out = []
    for name, base, what, backend in opened.changes:
        both = {base: values[0][base], name: values[1][name]}
        table = Table(both, users, np.ones(len(users), bool))
        out.append(
            {
                "name": name,
                "base": base,
                "what": what,
                "before": table.of(base),
                "after": table.of(name),
                "fit": sentences.fits(retrievers.fits(backend)),
                "differences": {metric: table.difference(name, base, metric) for metric in (MAIN, FOUND)},
                "differing_queries": {metric: table.differing(name, base, metric) for metric in (MAIN, FOUND)},
                "listed": {"before": float(listed[0][base].mean()), "after": float(listed[1][name].mean())},
            }
        )
    return out
