"""Read JSONL row by row. Lines end at line feeds only, because a completion may hold other separators."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rec_r1.config import UserError

Row = dict[str, Any]


def rows(lines: Iterable[bytes], path: Path, fix: str, may_be_cut: bool) -> Iterator[tuple[Row, str]]:
    """The rows of a JSONL file, each with its place, `FILE: line 3`.

    lines: the lines of the file with their line feeds, such as the file opened in the mode "rb".
    path: the file, for messages.
    fix: what the user can do about a damaged line.
    may_be_cut: whether an incomplete last line is ignored, as a killed process leaves it.

    Raises UserError, with the place and ``fix``, for any other damaged line.
    """
    for number, line in enumerate(lines, 1):
        place = f"{path}: line {number}"
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            if may_be_cut and not line.endswith(b"\n"):
                return
            raise UserError(f"{place} is damaged ({error}): {fix}") from error
        if not isinstance(row, dict):
            raise UserError(f"{place} is damaged (no JSON object): {fix}")
        if row:
            yield row, place
