"""Rankings and judgments as TREC files, which other evaluators read."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rec_r1.environment import Environment
from rec_r1.tasks import Split


def token(identifier: str) -> str:
    """An id with its white space escaped, because white space separates the columns of TREC files."""
    return re.sub(r"[\s%]", lambda m: "".join(f"%{byte:02X}" for byte in m.group().encode()), identifier)


def run(env: Environment, split: Split, rankings: Sequence[Sequence[int]], tag: str) -> str:
    """Rankings as a TREC run file, with one line `qid Q0 docid rank score tag` per hit.

    Evaluators sort by score, and break ties in different ways. To keep the order, the score is not the retriever's, but
    the number of hits from this one to the last.
    """
    ids = env.task.catalog.ids
    return "".join(
        f"{token(identifier)} Q0 {token(ids[row])} {rank} {len(ranking) + 1 - rank} {tag}\n"
        for identifier, ranking in zip(split.ids, rankings, strict=True)
        for rank, row in enumerate(ranking, 1)
    )


def qrels(env: Environment, split: Split) -> str:
    """Judgments as a TREC qrels file, with one line `qid 0 docid grade` per target.

    A grade that is no whole number is written with its decimals, although most evaluators do not accept it.
    """
    ids = env.task.catalog.ids
    return "".join(
        f"{token(identifier)} 0 {token(ids[int(row)])} {_number(float(grade))}\n"
        for identifier, rows, grades in zip(split.ids, split.rows, split.grades, strict=True)
        for row, grade in zip(rows, grades, strict=True)
    )


def _number(grade: float) -> str:
    return str(int(grade)) if grade.is_integer() else repr(grade)
