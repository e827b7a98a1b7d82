"""The systems that the similarity gap is measured with: which, how they are opened, and where their ranks are kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import retrievers
from rec_r1 import tasks
from rec_r1.config import Recipe, RetrieverConfig, UserError, cache_folder
from rec_r1.config.redaction import redact_text
from rec_r1.environment import open_backend
from rec_r1.evaluation.transfer import with_retriever
from rec_r1.tasks import Split, Task
from retrievers import Query, Retriever, RetrieverError

logger = logging.getLogger(__name__)
LSA = "lsa"  # the name of the encoder that is fitted on the catalogue's own words, see retrievers/encoders/lsa.py
ENGLISH = "en"
ENCODERS = ("all-minilm-l6-v2", LSA)


class Wanted(NamedTuple):
    """A system. role: encoder (ranks by similarity of texts; the best of these is what others are measured against),
    words, people (what was chosen), both, popularity."""

    name: str
    kind: str
    params: Mapping[str, Any]
    role: str


SYSTEMS = [
    Wanted("popularity", "popularity", {}, "popularity"),
    Wanted("bm25", "bm25", {}, "words"),
    Wanted("itemknn", "itemknn", {}, "people"),
    Wanted("ease", "ease", {}, "people"),
    Wanted("l3ae", "l3ae", {}, "both"),
    Wanted("vqrec", "vqrec", {}, "both"),
    Wanted("personas", "personas", {}, "people"),
    Wanted("propagate (bm25 → ease)", "propagate", {"text": {"kind": "bm25"}, "backend": {"kind": "ease"}}, "both"),
]
ROLES = {wanted.kind: wanted.role for wanted in SYSTEMS} | {
    "dense": "encoder", "milvus": "encoder", "lucene": "words", "sansa": "people",
}  # fmt: skip


class Ablation(NamedTuple):
    """One change to a kind's parameters. what: the beginning of a sentence that says what it did."""

    kind: str
    changed: Mapping[str, Any]
    what: str


ABLATIONS = [
    Ablation("ease", {"nonnegative": True}, "Setting EASE's negative weights to 0"),
    Ablation("vqrec", {"continuous": True}, "Giving VQ-Rec the projected text embedding instead of codes"),
    Ablation("vqrec", {"ids": True}, "Adding an embedding by id to VQ-Rec's codes"),
    Ablation("personas", {"personas": 1}, "One persona instead of several"),
    *(
        Ablation(
            "personas", {"hash_bits": bits}, f"Sharing 2^{bits} hashed vectors among the items instead of one each"
        )
        for bits in (6, 8, 10)
    ),
]


def wanted_systems(recipe: Recipe, on: Sequence[str], encoders: Sequence[str]) -> tuple[list[Wanted], set[str]]:
    """The systems, and the names of those that the user asked for, which must open. Raises UserError."""
    texts = [Wanted(f"text: {name}", "dense", {"model": name}, "encoder") for name in dict.fromkeys(encoders)]
    strict = {system.name for system in texts if tuple(encoders) != ENCODERS}
    if not on:
        return [*texts, *(s._replace(params=_in_language(s.kind, s.params, recipe)) for s in SYSTEMS)], strict
    asked = []
    for spec in dict.fromkeys(on):
        config = with_retriever(recipe, spec).retriever
        asked.append(Wanted(redact_text(spec), config.kind, config.params, ROLES.get(config.kind, "other")))
    return [*texts, *asked], strict | {system.name for system in asked}


def _in_language(kind: str, params: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """``params`` whose bm25, or each part that is one, has the language of the recipe's text retriever. Raises
    UserError for a retriever that the recipe has wrong."""
    try:
        (code, *_) = retrievers.languages(recipe.retriever.kind, recipe.retriever.params) or [ENGLISH]
    except ValueError as error:
        raise UserError(str(error)) from error
    if code == ENGLISH:  # the default, which an index in the cache was built with
        return dict(params)
    if kind == "bm25":
        return {**params, "language": code}
    return {
        name: {**part, "params": {**part.get("params", {}), "language": code}}
        if isinstance(part, Mapping) and part.get("kind") == "bm25"
        else part
        for name, part in params.items()
    }


def open_systems(
    recipe: Recipe, task: Task, wanted: Sequence[Wanted], strict: set[str]
) -> tuple[dict[str, tuple[Wanted, Any]], list[dict[str, str]]]:
    """name -> (system, backend), fitted or taken from the cache; and {name, reason} of those that do not open here.

    Raises UserError or RetrieverError where one of ``strict`` does not.
    """
    from tqdm import tqdm

    opened: dict[str, tuple[Wanted, Any]] = {}
    skipped: list[dict[str, str]] = []
    for system in tqdm(wanted, "opening systems", leave=False):
        try:
            params = _chosen_before(system.params, opened)
            opened[system.name] = system, opened_backend(recipe, task, system.kind, params)
        except (UserError, RetrieverError) as error:
            if system.name in strict:
                raise
            unknown = system.kind not in retrievers.BACKENDS
            reason = f"this version has no kind {system.kind!r}" if unknown else str(error)
            skipped.append({"name": system.name, "reason": reason})
            logger.warning("%s is left out: %s", system.name, reason)
    return opened, skipped


def _chosen_before(params: Mapping[str, Any], opened: Mapping[str, tuple[Wanted, Any]]) -> dict[str, Any]:
    """``params`` whose parts of an opened kind, written without parameters, get the λ that this kind was just fitted
    with: the same validation choices would choose it again, at the price of a fit for every candidate."""
    reports = {system.kind: dict(retrievers.fits(backend)) for system, backend in opened.values() if not system.params}
    out = dict(params)
    for key, part in params.items():
        if isinstance(part, Mapping) and not part.get("params"):
            kind = part.get("kind", "")
            value = reports.get(kind, {}).get(kind, {}).get("regularization")
            if isinstance(value, float) and kind == "ease":
                out[key] = {**part, "params": {"regularization": value}}
    return out


def opened_backend(recipe: Recipe, task: Task, kind: str, params: Mapping[str, Any]) -> Retriever:
    """One backend from the folder that the cache keeps it in, built first where it is not there."""
    config = RetrieverConfig(kind=kind, params=_located(params, task))
    return open_backend(dataclasses.replace(recipe, retriever=config), task)


def _located(params: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """``params`` with the folder of the task's own LSA encoder where they name it."""
    out: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            value = _located(value, task)
        elif key == "model" and value == LSA:
            from retrievers.encoders import lsa

            folder = cache_folder() / "encoders" / f"lsa-{task.catalog.fingerprint[:16]}"
            try:
                value = str(lsa.fit(task.catalog.texts, folder))
            except ValueError as error:
                raise UserError(f"--encoder {LSA}: {error}") from error
        out[key] = value
    return out


def ranked(name: str, retriever: Retriever, split: Split) -> np.ndarray:
    """(Q, T) int32: a system's ranks of the targets, 0 = not listed. They are kept in the cache, so that an interrupted
    call goes on where it was."""
    queries = split.raw()
    targets, _ = tasks.pad(split.rows, split.grades)
    asked = [[query.text, query.history] for query in queries]
    digest = hashlib.sha256(json.dumps([retriever.fingerprint, asked, targets.tolist()]).encode())
    path = cache_folder() / "gap" / f"{digest.hexdigest()[:24]}.npy"
    if path.is_file():
        return np.asarray(np.load(path))
    ranks = _ranks(name, retriever, queries, targets)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, ranks)
    temporary.replace(path)
    return ranks


def _ranks(name: str, retriever: Retriever, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
    from tqdm import tqdm

    size = 1024
    return np.concatenate(
        [
            retrievers.certain_ranks(retriever, queries[start : start + size], targets[start : start + size])
            for start in tqdm(range(0, len(queries), size), f"ranking by {name}", leave=False)
        ]
    )
