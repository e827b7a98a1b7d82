"""The verb `rec-r1 ask`: queries from the command line, a file or stdin, and the answers as a table or as JSONL."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rec_r1 import console, runs
from rec_r1.config import UserError
from rec_r1.config.redaction import printable
from rec_r1.pages import outputs
from rec_r1.policy import Answer, Policy, recipe_of
from rec_r1.policy.completions import endpoint_of
from rec_r1.prompts import counted
from rec_r1.tasks import raw_files

logger = logging.getLogger(__name__)
FORMS = "write one query a line, or JSONL or CSV with query and, where the task has histories, history (ids)"
_RECORDS = ("jsonl", "json", "ndjson", "csv", "tsv", "parquet")
_WIDTH = 100  # Characters of a completion, a sent query or a title that the table shows.


@dataclass(frozen=True)
class Questions:
    """Q questions for a policy.

    queries: Q texts. None = they are made from the histories.
    histories: Q lists of catalogue ids, oldest first. None = there are none.
    """

    queries: list[str] | None
    histories: list[list[str]] | None

    def __len__(self) -> int:
        return len(self.histories or []) if self.queries is None else len(self.queries)


def questions(queries: Sequence[str], histories: Sequence[str], file: Path | None, stdin: IO[str]) -> Questions:
    """The questions of a command line.

    queries: texts. A single "-", or nothing at all, reads ``stdin``.
    histories: texts of comma-separated ids, one for each query.
    file: a file of questions in one of `FORMS`, instead of all others. None = no file.

    Raises UserError for a file that is missing, empty or broken, and for both a file and queries.
    """
    if file is not None:
        if queries or histories:
            raise UserError(f"--file {file}: leave the queries and --history out, or the file")
        return from_file(file)
    given = [_ids(history, "--history") for history in histories] or None
    if queries and list(queries) != ["-"]:
        return Questions(list(queries), given)
    if given and not queries:
        return Questions(None, given)
    if stdin.isatty():
        logger.info("reading queries from the terminal, one a line; Ctrl-D ends them")
    read = _from_lines(
        (line, f"stdin:{number}") for number, line in enumerate(console.lines_of(stdin), 1) if line.strip()
    )
    if not read:
        raise UserError(f"stdin: no query in it: {FORMS}")
    return read if given is None else Questions(read.queries, given)


def from_file(path: Path) -> Questions:
    """The questions of a file. Raises UserError where it is missing, empty or broken."""
    if not path.is_file():
        raise UserError(f"--file {path}: no such file: {FORMS}")
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    read = _from_records(raw_files.read(path)) if kind in _RECORDS else _from_lines(raw_files.lines(path))
    if not read:
        raise UserError(f"--file {path}: no query in it: {FORMS}")
    return read


def _from_lines(lines: Iterable[tuple[str, str]]) -> Questions:
    """Questions out of lines that are not blank, each with its place: JSON objects where the first line is one."""
    kept = list(lines)
    if kept and kept[0][0].lstrip().startswith("{"):
        return _from_records((raw_files.json_object(line, where), where) for line, where in kept)
    return Questions([line.strip() for line, _ in kept], None)


def _from_records(records: Iterable[tuple[dict[str, Any], str]]) -> Questions:
    """Questions out of records, which all have a query, or a history, or both."""
    queries: list[str] = []
    histories: list[list[str]] = []
    fields: list[str] = []
    for record, where in records:
        there = [name for name in ("query", "history") if record.get(name) not in (None, "")]
        fields = fields or there
        if not there or there != fields:
            has, first = (" and ".join(names) or "neither query nor history" for names in (there, fields))
            raise UserError(f"{where}: it has {has}, and the first line {first}: {FORMS}")
        if "query" in there:
            if not isinstance(record["query"], str):
                raise UserError(f"{where}: query {record['query']!r} is no text: {FORMS}")
            queries.append(record["query"])
        if "history" in there:
            histories.append(_ids(record["history"], f"{where}: history"))
    return Questions(queries if "query" in fields or not fields else None, histories or None)


def _ids(given: Any, where: str) -> list[str]:
    """Ids from a list, or from a text that separates them by commas."""
    listed = given.split(",") if isinstance(given, str) else given
    if isinstance(listed, list) and listed and all(isinstance(each, str | int) for each in listed):
        ids = [str(each).strip() for each in listed]
        if all(ids):
            return ids
    raise UserError(f"{where} {given!r}: give ids of the catalogue, oldest first: ID,ID,… or a JSON list")


def open_policy(run: Path, trained: bool, url: str | None = None, model: str | None = None) -> Policy:
    """The policy of a run. url, model: the server that holds its weights, and their name there; None = no server.

    Raises UserError as `Policy.load`, and where only one of url and model is given.
    """
    if (url is None) != (model is None):
        raise UserError("--endpoint and --model belong together: give the server's address up to /v1, and the name "
                        "that it has for the run's weights")  # fmt: skip
    if url is not None and model is not None:
        if not trained:
            raise UserError("--untrained: the endpoint decides which weights answer: leave one of the two out")
        policy = Policy.load(run, endpoint=endpoint_of(recipe_of(run), url, model))
        what = f"{model} at {url}"
    else:
        policy = Policy.load(run, trained)
        what = f"the policy of step {runs.step_of(run, runs.best_policy(run))}" if trained else "the untrained policy"
    task, kind = policy.env.task, policy.recipe.retriever.kind
    logger.info("%s: %s, %s over %s documents of %s", run, what, kind, f"{len(task.catalog):,}", task.name)
    return policy


def check(k: int, output: Path | None) -> None:
    """Raise UserError, before any work, for an impossible number of hits, and for an output that cannot be written."""
    if k < 1:
        raise UserError(f"--k {k}: give at least 1 hit")
    if output is not None:
        outputs.check_file(output, ".jsonl")


def ask(policy: Policy, asked: Questions, k: int) -> list[Answer]:
    """The answers, with a progress bar where there are several. Errors are those of `Policy.search`."""
    return policy.search(asked.queries, asked.histories, k, "asking" if len(asked) > 1 else None)


def jsonl(answers: Sequence[Answer]) -> str:
    """One JSON object a line for each answer: query, completion, sent, malformed, hits (id, title, rank)."""
    return "".join(json.dumps(row(answer), ensure_ascii=False) + "\n" for answer in answers)


def row(answer: Answer) -> dict[str, Any]:
    """An answer as the JSON object of :func:`jsonl`."""
    hits = [{"id": hit.id, "title": hit.title, "rank": rank} for rank, hit in enumerate(answer.hits, 1)]
    return {
        "query": answer.query,
        "completion": answer.completion,
        "sent": answer.sent,
        "malformed": answer.malformed,
        "hits": hits,
    }


def table(answers: Sequence[Answer]) -> str:
    """The answers for people: each query with its completion, what was sent, and its hits."""
    return "\n\n".join(_block(answer) for answer in answers)


def _block(answer: Answer) -> str:
    lines = [f"query       {_line(answer.query)}", f"completion  {_line(answer.completion)}"]
    sent = _line(counted(answer.sent, answer.query))
    lines.append(f"sent        {sent}" + ("  (malformed, so the raw query)" if answer.malformed else ""))
    if not answer.hits:
        return "\n".join([*lines, "no hits"])
    lines.append("rank  title  [id]")  # The id comes last: emoji and other wide characters would shift a column.
    lines += [f"{rank:>4}  {_line(hit.title)}  [{_line(hit.id)}]" for rank, hit in enumerate(answer.hits, 1)]
    return "\n".join(lines)


def _line(text: str) -> str:
    """``text`` as one short line."""
    one = " ".join(printable(text).split())
    return one if len(one) <= _WIDTH else one[: _WIDTH - 1] + "…"
