"""What a system (a policy, a baseline) answered to one part's queries, kept in the run's folder.

evaluation/PART/NAME.jsonl   a row a query: answer, what was sent, first hits, every metric
evaluation/PART/NAME.json    what the system is, how its answers look, what they cost
evaluation/PART/NAME.run     TREC run; evaluation/PART/qrels the judgments, for any outside evaluator
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rec_r1 import runs
from rec_r1.config import UserError
from rec_r1.environment import Environment
from rec_r1.prompts import sent
from rec_r1.runs import write_atomically
from rec_r1.scoring import Scored
from rec_r1.tasks import Split
from retrievers import Query, certain_hits
from retrievers.text.analysis import words

logger = logging.getLogger(__name__)
HOW_TO_REPEAT = "delete it and evaluate again (rec-r1 eval RUN, rec-r1 baseline RECIPE NAME)"
_KEYS = {"query_id", "query", "slices", "completion", "action", "malformed", "hits", "relevant", "metrics"}
SHOWN_HITS = 3
RUN_DEPTH = 100  # rows of a query in a run file, at least; the deepest metric's k if that is more


@dataclass(frozen=True)
class System:
    """kind: query | list | policy | endpoint. rows: Q rows of NAME.jsonl. statistics: see `answer_statistics`.

    samples: answers a query, over which the metrics are means; 1 = a single answer. identity: of what wrote the
    answers, see `generation.identity`; None = no policy of ours, or an older version's. step: of the run's training, at
    which a trained policy was saved; None = not the run's own policy, or an older version's."""

    name: str
    kind: str
    description: str
    rows: Sequence[dict[str, Any]]
    statistics: dict[str, float]
    cost: dict[str, Any] | None = None
    samples: int = 1
    identity: str | None = None
    step: int | None = None

    def scores(self, metric: str) -> np.ndarray:
        """(Q,) float64; NaN where the query has no value, everywhere where the system has no such metric."""
        values = [row["metrics"].get(metric) for row in self.rows]
        return np.array([np.nan if v is None else v for v in values], np.float64)

    @property
    def users(self) -> list[str]:
        """Q labels: who asks each query, see `users_of`."""
        # Rows of older versions name no user: there the label "target" shows that a task has histories.
        return [
            row.get("user") or (user_of(row["query_id"]) if "target" in row["slices"] else row["query_id"])
            for row in self.rows
        ]


def users_of(split: Split) -> list[str]:
    """Q labels: who asks each query. Without histories nobody is known, and each query stands for itself."""
    return [user_of(query) for query in split.ids] if split.histories else list(split.ids)


def user_of(query_id: str) -> str:
    """The user in a query's id: sequential tasks write USER:PLACE."""
    user, _, place = query_id.rpartition(":")
    return user if user and place.isdigit() else query_id


def check_writable(folder: Path, what: str) -> None:
    """Make ``folder``, and raise UserError where no file can be written there, before any work. what: the setting."""
    probe = folder / ".rec-r1.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{what}: cannot write into {folder} ({error.strerror}): name another folder") from error


def folder_of(run: Path, part: str) -> Path:
    return run / "evaluation" / part


def file_name(system: str) -> str:
    """A system's name as a file's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", system)


def sampled_name(system: str, samples: int) -> str:
    """What a policy's answers are called: greedy ones by its own name, several a query beside them."""
    return system if samples == 1 else f"{system}, {samples} samples"


def save(
    run: Path, part: str, env: Environment, split: Split, scored: Scored, system: str, kind: str, description: str,
    cost: dict[str, Any] | None = None, identity: str | None = None, answers: Sequence[str] = (),
    step: int | None = None,
) -> System:  # fmt: skip
    """Write one system's answers to the part's queries: rows, description, run file, and the qrels.

    answers: all Q x samples, where ``scored`` is the mean of several a query; () = one a query."""
    depth = max([RUN_DEPTH, *(_depth_of(name) for name in scored.components)])
    rankings = ranked_rows(env, scored, depth)
    rows = [_row(env, split, scored, rankings[q], q) for q in range(len(split))]
    samples = len(answers) // len(rows) if answers else 1
    if samples > 1:
        rows = [{**row, "samples": list(answers[q * samples : (q + 1) * samples])} for q, row in enumerate(rows)]
    made = System(system, kind, description, rows, answer_statistics(scored, split), cost, samples, identity, step)
    folder = folder_of(run, part)
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(system)
    (folder / f"{name}.json").unlink(missing_ok=True)  # after a kill, older facts must not describe newer rows
    write_atomically(folder / f"{name}.run", trec_run(env, split, rankings, name))
    write_atomically(folder / "qrels", trec_qrels(env, split))
    _write_rows(folder / f"{name}.jsonl", rows)
    meta = {k: v for k, v in asdict(made).items() if k != "rows"}
    meta |= {"belongs_to": belongs_to(env, split), "queries": len(rows)}
    write_atomically(folder / f"{name}.json", json.dumps(meta, indent=1))
    return made


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _depth_of(metric: str) -> int:
    return int(metric.partition("@")[2] or 0)


def add_metrics(run: Path, part: str, system: System, more: Mapping[str, np.ndarray]) -> System:
    """``system`` with further metrics, name -> (Q,) float32, in its rows; the rows are written again."""
    if not more:
        return system
    rows = [{**row, "metrics": row["metrics"] | _metrics(more, q)} for q, row in enumerate(system.rows)]
    _write_rows(folder_of(run, part) / f"{file_name(system.name)}.jsonl", rows)
    return replace(system, rows=rows)


def answers_in(system: System) -> list[str]:
    """The Q x samples completions of a policy or an endpoint, those of a query one after the other."""
    return [answer for row in system.rows for answer in row.get("samples", [row["completion"]])]


def answers_of(run: Path, identity: str) -> list[str] | None:
    """What a policy of this identity answered in any part of a run's evaluation; None where it has not, or where rows
    are missing. Raises UserError for a damaged file."""
    for path in sorted((run / "evaluation").glob("*/*.json")):
        if path.with_suffix(".jsonl").is_file():
            meta = runs.read_json(path, HOW_TO_REPEAT)
            if meta.get("identity") == identity:
                system = _read(path, meta)
                if meta.get("queries") in (None, len(system.rows)):  # older versions did not count
                    return answers_in(system)
    return None


def read_lists(run: Path, part: str, env: Environment, split: Split, system: str) -> list[list[int]]:
    """Q lists of rows, best first, out of a system's run file. Raises UserError for a damaged one."""
    row_of = {_token(identifier): row for row, identifier in enumerate(env.task.catalog.ids)}
    lists: dict[str, list[int]] = {_token(identifier): [] for identifier in split.ids}
    path = folder_of(run, part) / f"{file_name(system)}.run"
    try:
        *lines, end = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): {HOW_TO_REPEAT}") from error
    for number, line in enumerate([*lines, *([end] if end else [])], 1):
        columns = line.split(" ")
        if len(columns) != 6 or columns[0] not in lists or columns[2] not in row_of or number > len(lines):
            raise UserError(f"{path}: line {number} is damaged ({line[:80]!r}): {HOW_TO_REPEAT}")
        lists[columns[0]].append(row_of[columns[2]])
    return list(lists.values())


def deep_enough(lists: Sequence[Sequence[int]], metric: str) -> bool:
    """Whether lists out of a run file, which are cut, decide a metric. Where all are shorter than any cut they are
    whole."""
    longest = max(map(len, lists), default=0)
    return longest < RUN_DEPTH or 0 < _depth_of(metric) <= longest


def belongs_to(env: Environment, split: Split) -> str:
    """What answers must share to be compared: the retriever, and the part's queries with their judgments."""
    judged = json.dumps([list(split.ids), [list(map(int, r)) for r in split.rows], [list(g) for g in split.grades]])
    return hashlib.sha256((env.retriever.fingerprint + judged).encode()).hexdigest()


def load_all(run: Path, part: str, expected: str | None = None) -> dict[str, System]:
    """Every system of a part, by name. Those made with another retriever or other judgments than ``expected`` says
    are left out, with a warning."""
    found = {}
    for path in sorted(folder_of(run, part).glob("*.json")):
        if path.name == "comparison.json" or not path.with_suffix(".jsonl").is_file():
            continue
        meta = runs.read_json(path, HOW_TO_REPEAT)
        if expected is not None and meta.pop("belongs_to", None) != expected:
            logger.warning("%s: made with another retriever or other judgments, left out: make it again", path)
            continue
        queries = meta.get("queries")  # older versions did not count
        system = _read(path, meta)
        if expected is not None and queries not in (None, len(system.rows)):  # paired tests need every query
            answers = path.with_suffix(".jsonl")
            raise UserError(f"{answers}: damaged ({len(system.rows)} rows of {queries}): {HOW_TO_REPEAT}")
        found[system.name] = system
    return found


def _read(path: Path, meta: dict[str, Any]) -> System:
    """The system that ``meta`` and the rows beside it describe. Raises UserError where a row or a key is missing."""
    answers = path.with_suffix(".jsonl")
    rows = runs.read_rows(answers, HOW_TO_REPEAT, may_be_cut=False)
    if not rows or not all(row.keys() >= _KEYS for row in rows):
        raise UserError(f"{answers}: damaged (a row lacks one of {', '.join(sorted(_KEYS))}): {HOW_TO_REPEAT}")
    about = {name: value for name, value in meta.items() if name not in ("belongs_to", "queries")}
    try:
        return System(rows=rows, **about)
    except TypeError as error:
        raise UserError(f"{path}: damaged ({error}): {HOW_TO_REPEAT}") from error


def ranked_rows(env: Environment, scored: Scored, depth: int) -> list[list[int]]:
    """B lists of at most ``depth`` rows: what each answer puts before the user. Malformed = nothing."""
    queries = list(dict.fromkeys(query for query in scored.asked if query is not None))
    found: dict[Query, list[int]] = {}
    for start in range(0, len(queries), 256):
        block = queries[start : start + 256]
        hits = certain_hits(env.retriever, block, depth).rows
        found |= {query: [int(row) for row in rows if row >= 0] for query, rows in zip(block, hits, strict=True)}
    return [
        listed[:depth] if listed is not None else [] if query is None else found.get(query, [])
        for query, listed in zip(scored.asked, scored.lists, strict=True)
    ]


def _row(env: Environment, split: Split, scored: Scored, ranking: Sequence[int], q: int) -> dict[str, Any]:
    grades = {int(row): float(grade) for row, grade in zip(split.rows[q], split.grades[q], strict=True)}
    best = sorted(grades, key=lambda row: -grades[row])[:SHOWN_HITS]

    def shown(row: int) -> dict[str, Any]:
        catalog = env.task.catalog
        return {"id": catalog.ids[row], "title": catalog.titles[row], "grade": grades.get(row, 0.0)}

    action = scored.actions[q]
    return {
        "query_id": split.ids[q],
        **({"user": user_of(split.ids[q])} if split.histories else {}),
        "query": split.queries[q],
        "slices": {name: labels[q] for name, labels in split.slices.items()},
        "completion": scored.outcome.completions[q],
        "action": None if action is None else sent(action),
        "malformed": action is None,
        "hits": [shown(row) for row in ranking[:SHOWN_HITS]],
        "relevant": [shown(row) for row in best],
        "metrics": _metrics(scored.components, q),
    }


def _metrics(components: Mapping[str, np.ndarray], q: int) -> dict[str, float | None]:
    return {m: None if np.isnan(v[q]) else round(float(v[q]), 6) for m, v in components.items()}


def answer_statistics(scored: Scored, split: Split) -> dict[str, float]:
    """Share of malformed answers; of what the model wrote: mean words, distinct terms over all answers, share of the
    words that stand in the query; mean words of the whole completion."""
    written = [(q, words(a.written)) for q, a in enumerate(scored.actions) if a is not None]
    copied = [np.mean([w in set(words(split.queries[q])) for w in own]) for q, own in written if own]
    return {
        "malformed": 1 - len(written) / max(1, len(scored.actions)),
        "written_words": float(np.mean([len(own) for _, own in written])) if written else 0.0,
        "distinct_terms": len({w for _, own in written for w in own}),
        "copied": float(np.mean(copied)) if copied else 0.0,
        "completion_words": float(np.mean([len(words(c)) for c in scored.outcome.completions])),
    }


def _token(identifier: str) -> str:
    """An id without white space, which separates the columns of TREC files."""
    return re.sub(r"[\s%]", lambda m: "".join(f"%{byte:02X}" for byte in m.group().encode()), identifier)


def trec_run(env: Environment, split: Split, rankings: Sequence[Sequence[int]], tag: str) -> str:
    """`qid Q0 docid rank score tag` a line. The score counts places from the end: evaluators order by score and break
    ties in ways of their own, so real scores would not give the ranking that was made."""
    ids = env.task.catalog.ids
    return "".join(
        f"{_token(identifier)} Q0 {_token(ids[row])} {rank} {len(ranking) + 1 - rank} {tag}\n"
        for identifier, ranking in zip(split.ids, rankings, strict=True)
        for rank, row in enumerate(ranking, 1)
    )


def trec_qrels(env: Environment, split: Split) -> str:
    """`qid 0 docid grade` a line. Most evaluators take whole grades only: others are written as they are."""
    ids = env.task.catalog.ids
    return "".join(
        f"{_token(identifier)} 0 {_token(ids[int(row)])} {grade:g}\n"
        for identifier, rows, grades in zip(split.ids, split.rows, split.grades, strict=True)
        for row, grade in zip(rows, grades, strict=True)
    )
