"""Store the answers of a system (a policy, a baseline, the raw query) to the queries of a split in a run's folder.

evaluation/SPLIT/NAME.jsonl   one row per query: completion, action, first hits, every metric
evaluation/SPLIT/NAME.json    the system's description, statistics of its completions, and their cost
evaluation/SPLIT/NAME.run     the rankings as a TREC run file, for other evaluators
evaluation/SPLIT/qrels        the judgments of the split, for other evaluators
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
from rec_r1.evaluation import trec_files
from rec_r1.evaluation.budget import Used
from rec_r1.prompts import sent
from rec_r1.runs import write_atomically
from rec_r1.scoring import Scored
from rec_r1.tasks import Split
from retrievers import Query, certain_hits
from retrievers.text.analysis import words

logger = logging.getLogger(__name__)
HOW_TO_REPEAT = "delete it and evaluate again (rec-r1 eval RUN, rec-r1 baseline RECIPE NAME)"
_ROW_KEYS = {"query_id", "query", "slices", "completion", "action", "malformed", "hits", "relevant", "metrics"}
SHOWN_HITS = 3  # A row shows so many hits, and so many targets.
RUN_DEPTH = 100  # The length of rankings in a run file. It is the k of the deepest metric if that is greater.


@dataclass(frozen=True)
class System:
    """A system, and its answers to the Q queries of a split.

    name: its name in comparisons.
    kind: query | list | policy | endpoint.
    description: a sentence for reports.
    rows: the Q rows of NAME.jsonl.
    statistics: from `answer_statistics`.
    cost: tokens and dollars of an endpoint. None = it costs nothing.
    samples: the number of completions per query. The metrics are means over them.
    identity: from `generation.identity`, for policies. None = another kind of system, or an older version's file.
    step: the step of the training at which the policy was saved. None = not the run's trained policy, or an older
        version's file.
    reads_judgments: whether the judgments of the split chose its answers. Such a system is an upper bound: it has a row
        in the tables, and no other system is compared with it.
    used: the fields of `budget.Used`. None = an older version's file.
    belongs_to: from the function `belongs_to`. None = an older version's file.
    """

    name: str
    kind: str
    description: str
    rows: Sequence[dict[str, Any]]
    statistics: dict[str, float]
    cost: dict[str, Any] | None = None
    samples: int = 1
    identity: str | None = None
    step: int | None = None
    reads_judgments: bool = False
    used: dict[str, Any] | None = None
    belongs_to: str | None = None

    def scores(self, metric: str) -> np.ndarray:
        """(Q,) float64 values of a metric. NaN = the query has no value, or the system has no such metric."""
        values = [row["metrics"].get(metric) for row in self.rows]
        return np.array([np.nan if v is None else v for v in values], np.float64)

    @property
    def users(self) -> list[str]:
        """Q labels: who asks each query, as in `users_of`."""
        # Rows of older versions have no user. Their label "target" shows that the task has histories.
        return [
            row.get("user") or (user_of(row["query_id"]) if "target" in row["slices"] else row["query_id"])
            for row in self.rows
        ]


def users_of(split: Split) -> list[str]:
    """Q labels: who asks each query. Without histories the users are unknown, and every query has its own label."""
    return [user_of(query) for query in split.ids] if split.histories else list(split.ids)


def user_of(query_id: str) -> str:
    """The user in a query's id, which is USER:PLACE in sequential tasks."""
    user, _, place = query_id.rpartition(":")
    return user if user and place.isdigit() else query_id


def check_writable(folder: Path, what: str) -> None:
    """Make a folder, and raise UserError where no file can be written into it. A command calls it before any work.

    folder: the folder.
    what: the recipe's key or the option that names it, for the message.
    """
    probe = folder / ".rec-r1.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{what}: cannot write into {folder} ({error.strerror}): name another folder") from error


def folder_of(run: Path, split_name: str) -> Path:
    """The folder of a run's evaluation on a split."""
    return run / "evaluation" / split_name


def file_name(system: str) -> str:
    """A system's name in the form that file names have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", system)


def stem_in(folder: Path, system: str) -> str:
    """The name, without an ending, of a system's files in the folder of a split.

    It is :func:`file_name`, and ends with a hash of the system's name where another system there has these files:
    `llama3.2:1b` and `llama3.2-1b` are two models. Raises UserError for a damaged file.
    """
    plain = file_name(system)
    path = folder / f"{plain}.json"
    if not path.is_file() or runs.read_json(path, HOW_TO_REPEAT).get("name", system) == system:
        return plain
    return f"{plain}-{hashlib.sha256(system.encode()).hexdigest()[:8]}"


def sampled_name(system: str, samples: int) -> str:
    """The name of a policy in comparisons, with the number of completions per query where they are sampled."""
    return system if samples == 1 else f"{system}, {samples} samples"


def save(
    run: Path, split_name: str, env: Environment, split: Split, scored: Scored, system: str, kind: str,
    description: str, cost: dict[str, Any] | None = None, identity: str | None = None, answers: Sequence[str] = (),
    step: int | None = None, reads_judgments: bool = False, used: Used | None = None,
) -> System:  # fmt: skip
    """Write the files of one system, each atomically, and return the system.

    run: the run's folder.
    split_name: the name of the split.
    env: the environment, whose retriever makes the rankings.
    split: the Q queries.
    scored: the Q scored completions, or the means over the samples of each query.
    system: the system's name.
    kind, description, cost, identity, step, reads_judgments, used: as in `System`.
    answers: all Q x samples completions of a policy. () = those of ``scored``, one per query.
    """
    depth = max([RUN_DEPTH, *(_depth_of(name) for name in scored.components)])
    rankings = ranked_rows(env, scored, depth)
    rows = [_row(env, split, scored, rankings[q], q) for q in range(len(split))]
    samples = len(answers) // len(rows) if answers else 1
    if samples > 1:
        rows = [{**row, "samples": list(answers[q * samples : (q + 1) * samples])} for q, row in enumerate(rows)]
    spent = None if used is None else asdict(used)
    of = belongs_to(env, split)
    about = (answer_statistics(scored, split), cost, samples, identity, step, reads_judgments, spent, of)
    made = System(system, kind, description, rows, *about)
    folder = folder_of(run, split_name)
    folder.mkdir(parents=True, exist_ok=True)
    name = stem_in(folder, system)
    # The old description is removed first, so that it cannot describe new rows if the process is killed in between.
    (folder / f"{name}.json").unlink(missing_ok=True)
    write_atomically(folder / f"{name}.run", trec_files.run(env, split, rankings, name))
    _write_rows(folder / f"{name}.jsonl", rows)
    meta = {k: v for k, v in asdict(made).items() if k != "rows"} | {"queries": len(rows)}
    write_atomically(folder / f"{name}.json", json.dumps(meta, indent=1))
    return made


def save_qrels(run: Path, split_name: str, env: Environment, split: Split) -> None:
    """Write the judgments of a split beside its systems, atomically. The arguments are those of :func:`save`."""
    folder = folder_of(run, split_name)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "qrels", trec_files.qrels(env, split))


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _depth_of(metric: str) -> int:
    return int(metric.partition("@")[2] or 0)


def add_metrics(run: Path, split_name: str, system: System, more: Mapping[str, np.ndarray]) -> System:
    """``system`` with further metrics in its rows. The rows are written again.

    run: the run's folder.
    split_name: the name of the split.
    more: name of a metric -> (Q,) float32 values.
    """
    if not more:
        return system
    rows = [{**row, "metrics": row["metrics"] | _metrics(more, q)} for q, row in enumerate(system.rows)]
    folder = folder_of(run, split_name)
    _write_rows(folder / f"{stem_in(folder, system.name)}.jsonl", rows)
    return replace(system, rows=rows)


def answers_in(system: System) -> list[str]:
    """The Q x samples completions of a policy or an endpoint. Those of a query follow each other."""
    return [answer for row in system.rows for answer in row.get("samples", [row["completion"]])]


def stored(run: Path, identity: str) -> System | None:
    """The stored system of a policy with its completions, from any evaluation of a run.

    run: the run's folder.
    identity: the policy's identity, from `generation.identity`. It depends on the prompts, too.

    Returns None where there are none, or where rows are missing. Raises UserError for a damaged file.
    """
    for path in sorted((run / "evaluation").glob("*/*.json")):
        if path.with_suffix(".jsonl").is_file():
            meta = runs.read_json(path, HOW_TO_REPEAT)
            if meta.get("identity") == identity:
                system = _read(path, meta)
                if meta.get("queries") in (None, len(system.rows)):  # Older versions did not store the number.
                    return system
    return None


def read_lists(run: Path, split_name: str, env: Environment, split: Split, system: str) -> list[list[int]]:
    """The rankings in a system's run file: Q lists of catalogue rows, best first. Raises UserError for a damaged file.

    run: the run's folder.
    split_name: the name of the split.
    env: the environment with the catalogue.
    split: the Q queries.
    system: the system's name.
    """
    row_of = {trec_files.token(identifier): row for row, identifier in enumerate(env.task.catalog.ids)}
    lists: dict[str, list[int]] = {trec_files.token(identifier): [] for identifier in split.ids}
    folder = folder_of(run, split_name)
    path = folder / f"{stem_in(folder, system)}.run"
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
    """Whether a metric can be computed from the rankings in a run file, which are cut at RUN_DEPTH or deeper.

    If all rankings are shorter than RUN_DEPTH, none was cut.
    """
    longest = max(map(len, lists), default=0)
    return longest < RUN_DEPTH or 0 < _depth_of(metric) <= longest


def belongs_to(env: Environment, split: Split) -> str:
    """A hash of the retriever and the split's judgments, and one of its texts. Compared systems have the same."""
    judged = json.dumps([list(split.ids), [list(map(int, r)) for r in split.rows], [list(g) for g in split.grades]])
    return _with_texts(hashlib.sha256((env.retriever.fingerprint + judged).encode()).hexdigest(), split.queries)


def _with_texts(judged: str, queries: Sequence[str]) -> str:
    return f"{judged}:{hashlib.sha256(json.dumps(list(queries)).encode()).hexdigest()}"


def load_all(run: Path, split_name: str, expected: str | None = None) -> dict[str, System]:
    """Read all systems of a split.

    run: the run's folder.
    split_name: the name of the split.
    expected: from `belongs_to`. Other systems are left out, with a warning. None = all are read.

    Returns name -> system. Raises UserError for a damaged file.
    """
    found = {}
    for path in sorted(folder_of(run, split_name).glob("*.json")):
        answers = path.with_suffix(".jsonl")
        if path.name == "comparison.json" or not answers.is_file():
            continue
        meta = runs.read_json(path, HOW_TO_REPEAT)
        system = _read(path, meta)
        if expected is not None and system.belongs_to != expected:
            logger.warning("%s: left out, because it is of another retriever or other queries: make it again", path)
            continue
        queries = meta.get("queries")  # Older versions did not store the number.
        if expected is not None and queries not in (None, len(system.rows)):  # Paired tests need every query.
            raise UserError(f"{answers}: damaged ({len(system.rows)} of {queries} rows): {HOW_TO_REPEAT}")
        found[system.name] = system
    return found


def _read(path: Path, meta: dict[str, Any]) -> System:
    """Read one system. Raises UserError where a row or a key is missing.

    path: NAME.json, which holds ``meta``. The rows are in NAME.jsonl.
    """
    answers = path.with_suffix(".jsonl")
    rows = runs.read_rows(answers, HOW_TO_REPEAT, may_be_cut=False)
    if not rows or not all(row.keys() >= _ROW_KEYS for row in rows):
        raise UserError(f"{answers}: damaged (a row lacks one of {', '.join(sorted(_ROW_KEYS))}): {HOW_TO_REPEAT}")
    about = {name: value for name, value in meta.items() if name != "queries"}
    try:
        if (judged := about.get("belongs_to")) and ":" not in judged:  # Older versions left out the texts.
            about["belongs_to"] = _with_texts(judged, [row["query"] for row in rows])
        return System(rows=rows, **about)
    except TypeError as error:
        raise UserError(f"{path}: damaged ({error}): {HOW_TO_REPEAT}") from error


def ranked_rows(env: Environment, scored: Scored, depth: int) -> list[list[int]]:
    """The ranking that each of B completions leads to: a list of at most ``depth`` catalogue rows, best first.

    The ranking of a malformed completion is empty. Raises what the retriever raises.
    """
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
    """The row of query number ``q`` in NAME.jsonl."""
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
    """Statistics of the completions of a split.

    malformed: the share of malformed completions.
    written_words: the mean number of words of an action.
    distinct_terms: the number of distinct words in all actions.
    copied: the share of an action's words that are also in its query, averaged over actions.
    completion_words: the mean number of words of a whole completion.
    """
    written = [(q, words(a.written)) for q, a in enumerate(scored.actions) if a is not None]
    copied = [np.mean([w in set(words(split.queries[q])) for w in own]) for q, own in written if own]
    return {
        "malformed": 1 - len(written) / max(1, len(scored.actions)),
        "written_words": float(np.mean([len(own) for _, own in written])) if written else 0.0,
        "distinct_terms": len({w for _, own in written for w in own}),
        "copied": float(np.mean(copied)) if copied else 0.0,
        "completion_words": float(np.mean([len(words(c)) for c in scored.outcome.completions])),
    }
