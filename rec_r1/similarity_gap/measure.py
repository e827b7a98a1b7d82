"""The similarity gap: how far "what is alike" is from "what comes next" on a task, and how much each system closes.

A text encoder places alike items together; a recommender needs what this person chooses next. `measure` opens the
systems, ranks the held-out targets, and puts four sections together: divergence, utility, the gap closed, ablations.
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import retrievers
from rec_r1 import tasks
from rec_r1.config import Recipe, UserError
from rec_r1.config.redaction import redact
from rec_r1.environment import leave_out_history
from rec_r1.evaluation.records import users_of
from rec_r1.similarity_gap import divergence, sentences, utility
from rec_r1.similarity_gap.systems import (
    ABLATIONS,
    ENCODERS,
    Wanted,
    open_systems,
    opened_backend,
    ranked,
    wanted_systems,
)
from rec_r1.similarity_gap.utility import FEWEST_USERS, MAIN, UNLIKE, Table
from rec_r1.tasks import Split, Task
from rec_r1.tasks.sequences import PUBLISHED
from rec_r1.tasks.sequential import settings
from retrievers import Query, RetrieverError
from retrievers.text.dense import Dense

logger = logging.getLogger(__name__)
SIMILAR = 100  # a target is similar to the history if it is among so many nearest texts of one of its items


def measure(
    recipe: Recipe, part: str = "test", on: Sequence[str] = (), encoders: Sequence[str] = ENCODERS
) -> dict[str, Any]:
    """Everything that the page shows, as plain JSON. on: systems instead of `SYSTEMS`, as `transfer` takes them.

    Raises UserError for a task without histories, a part of fewer than `FEWEST_USERS` users, a system of ``on`` that
    does not open, or no encoder that does.
    """
    task = _task(recipe, part)
    split = task.splits[part]
    people = users_of(split)
    logger.info(
        "similarity gap of %s: %d %s queries of %d users, %d items in the catalogue",
        task.name, len(split), part, len(set(people)), len(task.catalog),
    )  # fmt: skip
    wanted, strict = wanted_systems(recipe, on, encoders)
    opened, skipped = open_systems(recipe, task, wanted, strict)
    texts = {name: backend for name, (system, backend) in opened.items() if system.role == "encoder"}
    if not texts:
        raise UserError(f"no text encoder opens ({skipped[0]['reason']}): name another with --encoder NAME")
    compared = _ablations(recipe, task, opened, skipped)
    backends = {name: backend for name, (_, backend) in opened.items()}
    changes = {each["name"]: each["backend"] for each in compared}
    ranks, changed = (
        {name: ranked(name, leave_out_history(recipe, backend, task), split) for name, backend in group.items()}
        for group in (backends, changes)
    )
    values = {name: utility.scored(split, found) for name, found in ranks.items()}
    listed = {name: utility.listed(split, found) for name, found in ranks.items()}
    near = [
        divergence.top_text(_embeddings(backend), SIMILAR) for backend in texts.values() if _embeddings(backend).size
    ]
    assert task.interactions is not None
    fitted = np.bincount(task.interactions.rows, minlength=len(task.catalog))
    labels = utility.labels(split, fitted, settings(recipe.task).warm_from)
    masks = utility.slices(labels, utility.unlike(split, near) if near else None, people)
    tables = {name: Table(values, people, mask) for name, mask in masks.items()}
    whole = tables["all"]
    text, best = whole.best(list(texts)), whole.best(list(opened))
    result: dict[str, Any] = {
        "about": _about(recipe, task, part, whole),
        "systems": [{**_described(*each), "listed": float(listed[name].mean())} for name, each in opened.items()],
        "skipped": skipped,
        "divergence": _divergence(task, texts, opened),
        "utility": [
            {"slice": name, "queries": t.queries, "users": t.users, "rows": _rows(t, listed, masks[name])}
            for name, t in tables.items()
        ],
        "gap": _gap(whole, text, best),
        "unlike": _unlike(tables, opened, len(split)),
        "ablations": _paired(compared, split, ranks, changed, people),
    }
    return result


def _rows(table: Table, listed: Mapping[str, np.ndarray], mask: np.ndarray) -> list[dict[str, Any]]:
    """`Table.rows`, each with the share of the slice's targets that the system lists."""
    return [{**row, "listed": float(listed[row["system"]][mask].mean())} for row in table.rows()]


def _task(recipe: Recipe, part: str) -> Task:
    task = tasks.load(recipe.task)
    if task.interactions is None or not len(task.interactions.rows) or not task.test.histories:
        raise UserError(
            f"task {task.name} has no histories of choices to measure against: take a sequential task, such as "
            "task.name=sequential task.path=FOLDER"
        )
    queries, users = len(task.splits[part]), len(set(users_of(task.splits[part])))
    if users < FEWEST_USERS:
        raise UserError(
            f"task {task.name}: the {part} split has {queries} choices of {users} users, and an interval needs at "
            f"least {FEWEST_USERS} users: take another --split, a larger task.params.limits if it is set, or more data"
        )
    return task


def _embeddings(backend: Any) -> np.ndarray:
    """(n, d) of the dense backend; (0, 0) of any other."""
    return np.asarray(backend.embeddings) if isinstance(backend, Dense) else np.zeros((0, 0))


def _divergence(task: Task, texts: Mapping[str, Any], opened: Mapping[str, tuple[Wanted, Any]]) -> dict[str, Any]:
    """Section A: a measurement and its sentences for each encoder; B is of the first EASE among the systems."""
    ease = next((backend for system, backend in opened.values() if system.kind == "ease"), None)
    weights = _rows_of(ease, len(task.catalog)) if ease is not None else None
    assert task.interactions is not None
    found = []
    for name, backend in texts.items():
        if not (vectors := _embeddings(backend)).size:
            continue
        logger.info("%s: its neighbours against who chooses what, %d permutations", name, divergence.PERMUTATIONS)
        try:
            measured = divergence.measure(vectors, task.interactions.matrix(), weights)
        except ValueError as error:
            return {"encoders": [], "reason": str(error)}
        found.append({"encoder": name, **measured, "sentences": _sentences(measured)})
    return {"encoders": found, "reason": None if ease is not None else "no EASE among the systems, so none of its B"}


def _rows_of(backend: Any, n: int, block: int = 512) -> Callable[[], Iterator[tuple[int, np.ndarray]]]:
    """B of a linear model, by blocks of rows: row i is what a history of document i alone scores."""

    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, n, block):
            yield start, backend.model.scores([Query(history=(i,)) for i in range(start, min(n, start + block))])

    return blocks


def _sentences(found: Mapping[str, Any]) -> list[str]:
    measures, k = found["measures"], found["neighbours"]
    over = {"met": "items that somebody chose together", "any": "any two items"}
    written = [
        sentences.neighbours(k, measures["overlap"]),
        sentences.never_together(k, measures["apart"]),
        sentences.tells_apart(measures["auc"], found["matched_pairs"]),
    ]
    for measured, what in (("cosine", "co-consumption"), ("ease", "weight in EASE")):
        for sort, pairs in over.items():
            if f"{measured}_{sort}" in measures:
                written.append(sentences.correlation(what, pairs, measures[f"{measured}_{sort}"]))
    return written


def _gap(table: Table, text: str, best: str) -> dict[str, Any]:
    """Section C. The difference of the best, and its lead, are corrected for its having been chosen; other leads are
    not."""
    rows, whole = [], table.chosen(best, table.names, text)
    among = len(table.names) - 1
    for name in table.names:
        lead = whole if name == best else table.difference(name, text)
        share = table.closed(name, text, best)
        says = sentences.closes(name, share, lead, text) if name not in (text, best) else ""
        rows.append({"system": name, **table.of(name), "lead": lead, "share": share, "sentence": says})
    return {
        "metric": MAIN, "text": text, "best": best, "difference": whole, "among": among,
        "uncorrected": table.difference(best, text), "rows": rows,
        "sentence": sentences.gap(MAIN, text, best, whole, among),
    }  # fmt: skip


def _unlike(tables: Mapping[str, Table], opened: Mapping[str, tuple[Wanted, Any]], queries: int) -> Any:
    """The targets that no text leads to: the best of the systems there that know who chose what, against popularity.
    None without such targets, or such systems."""
    table = tables.get(UNLIKE)
    roles = {name: system.role for name, (system, _) in opened.items()}
    knowing = [name for name, role in roles.items() if role in ("people", "both")]
    against = next((name for name, role in roles.items() if role == "popularity"), None)
    if table is None or not knowing or against is None:
        return None
    metric, share = "recall@100", table.queries / queries
    best = table.best(knowing, metric)
    found, lead = table.chosen(best, knowing, None, metric), table.chosen(best, knowing, against, metric)
    found |= {"low": max(0.0, found["low"]), "high": min(1.0, found["high"])}  # recall lies between
    says = sentences.not_similar(share, table.queries, best, found, against, lead, len(knowing))
    return {"share": share, "queries": table.queries, "best": best, "against": against, "metric": metric,
            "among": len(knowing), "found": found, "lead": lead, "sentence": says}  # fmt: skip


def _ablations(
    recipe: Recipe, task: Task, opened: Mapping[str, tuple[Wanted, Any]], skipped: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """The changed backends of section D, each with the name of what it is a change of; others go to ``skipped``."""
    found = []
    for ablation in ABLATIONS:
        name = f"{ablation.kind} {json.dumps(dict(ablation.changed))}"
        base = next((system for system, _ in opened.values() if system.kind == ablation.kind), None)
        if base is None:
            skipped.append({"name": f"ablation {name}", "reason": f"{ablation.kind} is not among the systems"})
            continue
        try:
            backend = opened_backend(recipe, task, ablation.kind, {**base.params, **ablation.changed})
        except (UserError, RetrieverError) as error:
            skipped.append({"name": f"ablation {name}", "reason": str(error)})
            continue
        found.append({"name": name, "base": base.name, "what": ablation.what, "backend": backend})
    return found


def _paired(
    compared: Sequence[Mapping[str, Any]],
    split: Split,
    ranks: Mapping[str, np.ndarray],
    changed: Mapping[str, np.ndarray],
    people: Sequence[str],
) -> list[dict[str, Any]]:
    """Section D: changed minus unchanged. ranks, changed: name -> (Q, T), of the systems and of their changes."""
    out = []
    everybody = np.ones(len(people), bool)
    for each in compared:
        name, base = each["name"], each["base"]
        both = {base: ranks[base], name: changed[name]}
        table = Table({key: utility.scored(split, found) for key, found in both.items()}, people, everybody)
        differences = {metric: table.difference(name, base, metric) for metric in (MAIN, "recall@100")}
        differing = {metric: table.differing(name, base, metric) for metric in differences}
        shown = {key: float(utility.listed(split, found).mean()) for key, found in both.items()}
        out.append(
            {
                "name": name,
                "base": base,
                "before": table.of(base),
                "after": table.of(name),
                "fit": _fit(each["backend"]),
                "differences": differences,
                "differing_queries": differing,
                "listed": {"before": shown[base], "after": shown[name]},
                "sentences": [sentences.effect(each["what"], m, d, differing[m]) for m, d in differences.items()],
            }
        )
    return out


def _described(system: Wanted, backend: Any) -> dict[str, Any]:
    return {**system._asdict(), "params": redact(dict(system.params)), "fit": _fit(backend)}


def _fit(backend: Any) -> list[str]:
    """What was found in fitting, in words: "ease: regularization 100"."""
    return [
        f"{kind}: " + ", ".join(f"{key} {value}" for key, value in report.items() if not isinstance(value, list | dict))
        for kind, report in retrievers.fits(backend)
        if report
    ]


def _about(recipe: Recipe, task: Task, part: str, table: Table) -> dict[str, Any]:
    given = task.interactions
    assert given is not None
    chosen = settings(recipe.task)
    return {
        "task": task.name,
        "part": part,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "queries": table.queries,
        "users": table.users,
        "items": len(task.catalog),
        "chosen_items": int((given.counts > 0).sum()),
        "choices": len(given.rows),
        "fitted_users": len(given),
        "validation": len(given.validation_targets),
        "set_apart": task.set_apart,
        "warm_from": chosen.warm_from,
        "titles": chosen.raw_titles if recipe.task.name == "sequential" else None,
        "history": chosen.history,
        "split": _split(recipe),
        "settings": {"name": recipe.task.name, "path": recipe.task.path, "params": redact(recipe.task.params)},
    }


def _split(recipe: Recipe) -> str:
    """Which split was used, and what it lets the systems know."""
    if recipe.task.name != "sequential":
        return f"as the task {recipe.task.name} makes it"
    chosen = settings(recipe.task)
    name = chosen.split or ""
    if name == PUBLISHED:
        return "published: as the data give it; what others chose later may be in training"
    meaning = {
        "leave_one_out": "each user's last choice is held out; what others chose later than it may be in training",
        "global_time": "one moment for everybody; nothing later was known in fitting",
        "by_user": "the held-out users are unseen; what others chose later may be in training",
    }[name]
    note = ""
    if chosen.layout == "sessions":
        order = name == "global_time"  # the task refuses it without lines_in_order
        what = "its lines are taken to be in the order of time" if order else "a split by one moment needs some"
        note = f". The file has no times: {what}"
    return f"{name}: {meaning}{note}"
