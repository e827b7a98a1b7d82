"""The systems that the similarity gap is measured with: which they are, how they are opened, and how they rank."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

import retrievers
from rec_r1.config import Recipe, RetrieverConfig, UserError, cache_folder
from rec_r1.config.redaction import redact_text
from rec_r1.environment import leave_out_history, open_backend
from rec_r1.evaluation.transfer import with_retriever
from rec_r1.similarity_gap import utility
from rec_r1.similarity_gap.held_out import HeldOut
from rec_r1.tasks import Task
from retrievers import Query, Retriever, RetrieverError

logger = logging.getLogger(__name__)
LSA = "lsa"  # The encoder that is fitted on the catalogue's own words, see retrievers/encoders/lsa.py.
ENGLISH = "en"
ENCODERS = ("all-minilm-l6-v2", LSA)
BATCH = 1024  # How many queries are ranked at once.


class Wanted(NamedTuple):
    """A system that is to be measured.

    name: its name on the page.
    kind, params: its retriever.
    role: what its rankings rest on. encoder: the similarity of texts; the best of these is what the others are
        compared with. words: which words match. people: what users chose. both: texts and choices. popularity: how
        often an item was chosen. other: unknown.
    """

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
    Wanted("sasrec", "sasrec", {}, "people"),
    Wanted("vqrec", "vqrec", {}, "both"),
    Wanted("personas", "personas", {}, "people"),
    Wanted("propagate (bm25 → ease)", "propagate", {"text": {"kind": "bm25"}, "backend": {"kind": "ease"}}, "both"),
]
ROLES = {wanted.kind: wanted.role for wanted in SYSTEMS} | {
    "dense": "encoder", "late": "encoder", "lucene": "words", "tantivy": "words", "sansa": "people",
}  # fmt: skip
# The same for retrievers whose parameter `mode` decides; both have the default text.
ROLES_OF_MODES = {
    "milvus": {"text": "words", "dense": "encoder"},
    "postgres": {"text": "words", "vector": "encoder"},
}


class Ablation(NamedTuple):
    """A change of one parameter of a system.

    kind: the retriever.
    changed: the parameter and its new value.
    what: the change in words, as the subject of a sentence that says what it did.
    """

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


class Change(NamedTuple):
    """An ablation of a system that was opened.

    name: its name on the page.
    base: the name of the system that is changed.
    what: see :class:`Ablation`.
    backend: the changed retriever.
    """

    name: str
    base: str
    what: str
    backend: Retriever


@dataclasses.dataclass(frozen=True)
class Opened:
    """Everything that was opened.

    systems: the systems.
    backends: name -> the retriever of each of them, in the same order.
    changes: the ablations of these systems.
    skipped: {name, reason} of each system and ablation that does not open here.
    """

    systems: Sequence[Wanted]
    backends: Mapping[str, Retriever]
    changes: Sequence[Change]
    skipped: Sequence[Mapping[str, str]]

    def of_role(self, *roles: str) -> list[str]:
        """The names of the systems with one of these roles."""
        return [system.name for system in self.systems if system.role in roles]


def wanted_systems(recipe: Recipe, on: Sequence[str], encoders: Sequence[str]) -> tuple[list[Wanted], set[str]]:
    """The systems to measure, and the names of those that the user asked for, which must open.

    recipe: the recipe. Its text retriever decides the language of the systems that match words.
    on: systems as `transfer` takes them, instead of `SYSTEMS`.
    encoders: the names of text encoders.

    Raises UserError for a system that cannot be read.
    """
    texts = [Wanted(f"text: {name}", "dense", {"model": name}, "encoder") for name in dict.fromkeys(encoders)]
    strict = {system.name for system in texts if tuple(encoders) != ENCODERS}
    if not on:
        return [*texts, *(s._replace(params=_in_language(s.kind, s.params, recipe)) for s in SYSTEMS)], strict
    asked = []
    for spec in dict.fromkeys(on):
        config = with_retriever(recipe, spec).retriever
        asked.append(Wanted(redact_text(spec), config.kind, config.params, _role(config)))
    return [*texts, *asked], strict | {system.name for system in asked}


def _role(config: RetrieverConfig) -> str:
    """The role of a system that the user asked for. Raises UserError for a wrong kind or parameter."""
    role = ROLES.get(config.kind, "other")
    if config.kind in ROLES_OF_MODES:
        role = ROLES_OF_MODES[config.kind].get(str(config.params.get("mode", "text")), "other")
    try:
        fitted = role == "encoder" and retrievers.takes_interactions(config.kind, config.params)
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    return "both" if fitted else role  # An encoder that is tuned on choices does not rest on texts alone.


def _in_language(kind: str, params: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """``params`` of ``kind`` in which bm25, or each inner backend that is bm25, has the language of the recipe's text
    retriever. Raises UserError for a wrong retriever in the recipe."""
    try:
        (code, *_) = retrievers.languages(recipe.retriever.kind, recipe.retriever.params) or [ENGLISH]
    except ValueError as error:
        raise UserError(str(error)) from error
    if code == ENGLISH:  # The default. Naming it would give the index in the cache another name.
        return dict(params)
    if kind == "bm25":
        return {**params, "language": code}
    return {
        name: {**part, "params": {**part.get("params", {}), "language": code}}
        if isinstance(part, Mapping) and part.get("kind") == "bm25"
        else part
        for name, part in params.items()
    }


def open_systems(recipe: Recipe, task: Task, on: Sequence[str], encoders: Sequence[str]) -> Opened:
    """Open all systems and their ablations. What is not in the cache is built or fitted.

    recipe, on, encoders: see :func:`wanted_systems`.
    task: the recipe's task.

    Raises UserError or RetrieverError if a system that the user asked for does not open, and UserError if no encoder
    does.
    """
    from tqdm import tqdm

    wanted, strict = wanted_systems(recipe, on, encoders)
    backends: dict[str, Retriever] = {}
    skipped: list[dict[str, str]] = []
    for system in tqdm(wanted, "opening systems", leave=False):
        try:
            backends[system.name] = open_system(recipe, task, system.kind, system.params)
        except (UserError, RetrieverError) as error:
            if system.name in strict:
                raise
            unknown = system.kind not in retrievers.BACKENDS
            reason = f"this version has no kind {system.kind!r}" if unknown else str(error)
            skipped.append({"name": system.name, "reason": reason})
            logger.warning("%s is left out: %s", system.name, reason)
    systems = [_as_opened(system, backends[system.name]) for system in wanted if system.name in backends]
    if not any(system.role == "encoder" for system in systems):
        reason = skipped[0]["reason"] if skipped else "those that open were tuned on choices"
        raise UserError(f"no text encoder opens ({reason}): name another with --encoder NAME")
    changes, unchanged = _open_changes(recipe, task, systems)
    return Opened(systems, backends, changes, [*skipped, *unchanged])


def _as_opened(system: Wanted, backend: Retriever) -> Wanted:
    """The system with the role of its opened retriever, because an encoder in a folder may have been tuned before."""
    knows = system.role == "encoder" and retrievers.fitted_on(backend)
    return system._replace(role="both") if knows else system


def _open_changes(recipe: Recipe, task: Task, systems: Sequence[Wanted]) -> tuple[list[Change], list[dict[str, str]]]:
    """The ablations of ``systems``, and {name, reason} of those that do not open."""
    changes: list[Change] = []
    skipped: list[dict[str, str]] = []
    for ablation in ABLATIONS:
        name = f"{ablation.kind} {json.dumps(dict(ablation.changed))}"
        base = full_system(systems, ablation.kind, ablation.changed)
        if base is None:
            reason = no_full_system(systems, ablation.kind, ablation.changed)
            skipped.append({"name": f"ablation {name}", "reason": reason})
            continue
        try:
            backend = open_system(recipe, task, ablation.kind, {**base.params, **ablation.changed})
        except (UserError, RetrieverError) as error:
            skipped.append({"name": f"ablation {name}", "reason": str(error)})
            continue
        changes.append(Change(name, base.name, ablation.what, backend))
    return changes, skipped


def full_system(systems: Sequence[Wanted], kind: str, changed: Mapping[str, Any]) -> Wanted | None:
    """The system that is compared with the same one with ``changed`` parameters. None where there is none.

    It is the first of its kind that sets none of these parameters: one that does could be the changed system itself.
    """
    return next((s for s in systems if s.kind == kind and not s.params.keys() & changed.keys()), None)


def no_full_system(systems: Sequence[Wanted], kind: str, changed: Mapping[str, Any]) -> str:
    """Why there is no :func:`full_system`, in words."""
    if not any(system.kind == kind for system in systems):
        return f"{kind} is not among the systems"
    return f"no {kind} among the systems leaves {', '.join(changed)} as it is by default"


def open_system(recipe: Recipe, task: Task, kind: str, params: Mapping[str, Any]) -> Retriever:
    """One backend, from its folder in the cache. What is not there is built or fitted.

    kind, params: the retriever.

    Raises UserError or RetrieverError if it does not open.
    """
    config = RetrieverConfig(kind=kind, params=_located(params, task))
    return open_backend(dataclasses.replace(recipe, retriever=config), task)


def _located(params: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """``params`` with the folder of the task's own LSA encoder in place of its name. The encoder is fitted if it is not
    in the cache."""
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


def ranks_of(recipe: Recipe, task: Task, backends: Mapping[str, Retriever], held_out: HeldOut) -> dict[str, np.ndarray]:
    """name -> (Q, T) int32 ranks of the targets by each backend, 0 = not listed.

    recipe, task: decide whether the rankings leave out the history's items.
    backends: name -> retriever.
    held_out: the queries and targets.

    The ranks are cached, so that an interrupted call continues where it stopped. Raises RetrieverError if a retriever
    fails.
    """
    found = {}
    for name, backend in backends.items():
        retriever = leave_out_history(recipe, backend, task)
        key = hashlib.sha256((retriever.fingerprint + held_out.digest).encode()).hexdigest()[:24]
        path = cache_folder() / "gap" / f"{key}.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp.npy")
            np.save(temporary, _ranks(name, retriever, held_out.queries, held_out.targets))
            temporary.replace(path)
        found[name] = np.asarray(np.load(path))
    return found


def values_of(recipe: Recipe, task: Task, held_out: HeldOut, backends: Sequence[Retriever]) -> np.ndarray:
    """(S, Q, M) values of S retrievers, in the order of `utility.METRICS`. The other arguments are those of
    :func:`ranks_of`."""
    each = [ranks_of(recipe, task, {"": backend}, held_out)[""] for backend in backends]
    return np.stack([utility.scored(held_out, ranks) for ranks in each])


def _ranks(name: str, retriever: Retriever, queries: Sequence[Query], targets: np.ndarray) -> np.ndarray:
    from tqdm import tqdm

    return np.concatenate(
        [
            retrievers.certain_ranks(retriever, queries[start : start + BATCH], targets[start : start + BATCH])
            for start in tqdm(range(0, len(queries), BATCH), f"ranking by {name}", leave=False)
        ]
    )
