"""Read raw files as records: JSONL, JSON, CSV, TSV, text with any separator, Parquet; .gz of all but Parquet.

Every record comes with its place, `file:line`, which messages name.
"""

from __future__ import annotations

import ast
import codecs
import csv
import datetime
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rec_r1.config import TaskConfig, UserError
from rec_r1.tasks import known_files, parquet
from rec_r1.tasks.dates import read_date
from rec_r1.tasks.delimited import rows
from rec_r1.tasks.markup import without_markup

Record = dict[str, Any]
_HUB = "hub:"
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # Two of these are one character beyond U+FFFF, such as an emoji.


def task_folder(config: TaskConfig, holds: str, hub_files: Sequence[str] = ()) -> Path:
    """The folder that `task.path` names. A dataset of the hub, `hub:OWNER/NAME`, is downloaded once.

    config: the recipe's section `task`.
    holds: the files that the folder should hold, for messages.
    hub_files: patterns of the files to download. () = all.

    Raises UserError where there is no such folder or dataset.
    """
    if not config.path:
        raise UserError(f"task.path: not set: give the folder with {holds}")
    if config.path.startswith(_HUB):
        return _from_hub(config.path.removeprefix(_HUB), hub_files)
    folder = Path(config.path)
    if not folder.is_dir():
        raise UserError(f"task.path: {folder} is not a folder: give the one with {holds}")
    return folder


def _from_hub(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=list(patterns) or None))
    except Exception as error:  # The hub's errors (no network, no such dataset, no permission) have no common base.
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"task.path: {_HUB}{name} cannot be downloaded ({type(error).__name__}: {reason}): check name and network, "
            f"or download {', '.join(patterns) or 'its files'} from https://huggingface.co/datasets/{name} and set "
            "task.path to their folder"
        ) from error


def find_files(folder: Path, patterns: Sequence[str], what: str) -> list[Path]:
    """The files that match the first pattern that matches any, sorted by name.

    folder: where patterns are searched that are not absolute.
    patterns: names or glob patterns, tried in order. Each is tried as it is, then with .gz.
    what: what the files hold, for the message.

    Raises UserError where no pattern matches.
    """
    for pattern in filter(None, patterns):
        for candidate in (Path(pattern), Path(f"{pattern}.gz")):
            if (folder / candidate).is_file():  # A name may hold brackets, which glob would read as a pattern.
                return [folder / candidate]
            base = Path(candidate.anchor) if candidate.is_absolute() else folder
            found = sorted(path for path in base.glob(str(candidate.relative_to(candidate.anchor))) if path.is_file())
            if found:
                return found
    there = ", ".join(sorted(map(_listed, folder.iterdir()))[:8]) or "nothing"
    known = known_files.hint(folder, patterns)
    raise UserError(
        f"{folder}: no {what} ({' or '.join(patterns)}, or with .gz); the folder has {there}{known}: "
        f"{'set that' if known else 'name the right folder'}"
    )


def _listed(path: Path) -> str:
    """The name of a file as a message lists it: a folder and a link without its file are no files to read."""
    return path.name + ("/" if path.is_dir() else "" if path.is_file() else " (a broken link)")


def find_file(folder: Path, patterns: Sequence[str], what: str) -> Path:
    """The first of :func:`find_files`, with the same arguments and errors."""
    return find_files(folder, patterns, what)[0]


def read(
    path: Path,
    separator: str | None = None,
    names: Sequence[str] = (),
    encoding: str = "utf-8",
    columns: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> Iterator[tuple[Record, str]]:
    """Read the records of one file, each with its place: `file:line`, or `file: row n` for Parquet.

    path: the file. Its ending says the format, unless ``separator`` is given. A .json file is one array of objects,
        or one object per line.
    separator: the text between two fields, such as "::". None = by the ending.
    names: the columns of a file without a header. () = its first line is a header.
    encoding: of a text file.
    columns: the columns to read of a Parquet file, which must have them. () = all.
    optional: further columns to read of a Parquet file, where it has them.

    Raises UserError for a missing file, and for a line that cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file: check the task's path and file names")
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if separator is None and kind == "parquet":
        yield from parquet.records(path, columns, optional)
    elif separator is None and kind in ("jsonl", "json", "ndjson"):
        array = kind == "json" and _first(path, encoding) == "["
        yield from _array(path, encoding) if array else _jsonl(path, encoding)
    elif separator is not None or kind in ("csv", "tsv"):
        yield from _delimited(path, separator or {"csv": ",", "tsv": "\t"}[kind], names, encoding)
    else:
        raise UserError(f"{path}: unknown kind of file {kind!r}: use .jsonl, .csv, .tsv or .parquet (.gz as well)")


def _open(path: Path, encoding: str) -> Any:
    encoding = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding  # a byte order mark is no text
    if path.suffix.lower() == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding=encoding, newline="")
    return path.open(encoding=encoding, newline="")


def _broken(path: Path, encoding: str, error: Exception) -> UserError:
    if isinstance(error, UnicodeError):
        return UserError(
            f"{path}: not {encoding.upper()} ({error}): convert it, or name its encoding if the task takes one"
        )
    if isinstance(error, csv.Error):
        fix = "close the quotation mark that opens before this cell, if there is one, or shorten the cell"
        return UserError(f"{path}: cannot be read ({error}): {fix}")
    return UserError(f"{path}: cannot be read ({error}): download it again")


def lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[str, str]]:
    """The lines of a text file that are not blank, each with its `file:line`.

    Raises UserError where the file cannot be read.
    """
    try:
        with _open(path, encoding) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield line, f"{path}:{number}"
    except (UnicodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _broken(path, encoding, error) from error


def matches(path: Path, pattern: re.Pattern[str], block: int = 1 << 20) -> Iterator[re.Match[str]]:
    """All matches of a pattern in a file that may be too large for memory.

    path: a text file in UTF-8, or such a .gz file.
    pattern: the regular expression. The end of a match must not depend on the text after it.
    block: how many characters are read at a time.

    Raises UserError where the file cannot be read.
    """
    try:
        with _open(path, "utf-8") as file:
            rest = ""
            while text := file.read(block):
                rest += text
                end = 0
                for match in pattern.finditer(rest):
                    yield match
                    end = match.end()
                rest = rest[end:]
    except (UnicodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _broken(path, "utf-8", error) from error


def _jsonl(path: Path, encoding: str) -> Iterator[tuple[Record, str]]:
    for line, where in lines(path, encoding):
        yield json_object(line, where), where


def json_object(line: str, where: str) -> Record:
    """A line of JSONL as a record. Raises UserError, which begins with ``where``, if it is no JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}): write one object per line") from error
    return _record(record, where, bool(_ESCAPED_HALF.search(line)))


def _record(found: Any, where: str, halves: bool) -> Record:
    """``found``. Raises UserError, which begins with ``where``, unless it is an object without halves of surrogate
    pairs, which no index or tokenizer takes. halves: whether these are searched for, because the file may have some."""
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected an object, got {type(found).__name__}: write an object")
    try:
        if halves:
            json.dumps(found, ensure_ascii=False).encode()
    except ValueError as error:
        fix = "one \\uD800 to \\uDFFF without the other of its pair: write both, or remove it"
        raise UserError(f"{where}: half a character: {fix}") from error
    return found


def _first(path: Path, encoding: str) -> str:
    """The first character that is no white space; "" for a blank file."""
    return next((line.lstrip()[:1] for line, _ in lines(path, encoding)), "")


def _array(path: Path, encoding: str) -> Iterator[tuple[Record, str]]:
    """The objects of a file that is one JSON array."""
    try:
        with _open(path, encoding) as file:
            text = file.read()
        entries = json.loads(text)
    except (UnicodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _broken(path, encoding, error) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}): one array of objects, or one object a line") from error
    halves = _ESCAPED_HALF.search(text) is not None
    for number, record in enumerate(entries, 1):
        where = f"{path}: entry {number}"
        yield _record(record, where, halves), where


def _delimited(path: Path, separator: str, names: Sequence[str], encoding: str) -> Iterator[tuple[Record, str]]:
    header = list(names)
    try:
        with _open(path, encoding) as file:
            for number, fields in rows(file, separator):
                if not fields or fields == [""]:
                    continue
                if not header:
                    header = [name.strip().lstrip("\ufeff") for name in fields]
                    if twice := sorted({name for name in header if name and header.count(name) > 1}):
                        raise UserError(f"{path}: several columns have the name {twice[0]!r}: rename all but one")
                    continue
                where = f"{path}:{number}"
                if len(fields) != len(header):
                    several = any("\n" in field for field in fields)
                    fix = "close the quotation mark that opens above it" if several else "fix the line"
                    raise UserError(
                        f"{where}: {len(fields)} fields instead of {len(header)} ({', '.join(header)}): {fix}"
                    )
                yield dict(zip(header, fields, strict=True)), where
    except (UnicodeError, csv.Error, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _broken(path, encoding, error) from error


def watched(records: Iterable[tuple[Record, str]], path: Path, unit: str) -> Iterable[tuple[Record, str]]:
    """``records`` with a progress bar if the file is large.

    records: the records of the file.
    path: the file.
    unit: what the bar counts, in plural.
    """
    from tqdm import tqdm

    small = path.stat().st_size < 1 << 24
    bar: Iterable[tuple[Record, str]] = tqdm(records, desc=path.name, unit=f" {unit}", mininterval=1, disable=small)
    return bar


def present(record: Record, key: str, where: str) -> Any:
    """``record[key]``, which may be empty. where: file and line, for the message.

    Raises UserError, with the names of all columns, where the column is missing.
    """
    if key not in record:
        raise UserError(f"{where}: no column {key!r}, only {', '.join(map(str, record))}: {parquet.COLUMN_FIX}")
    return record[key]


def value(record: Record, key: str, where: str) -> Any:
    """``record[key]``, which must not be empty. where: file and line, for the message.

    Raises UserError where the column is missing or empty.
    """
    found = present(record, key, where)
    if found is None or found == "":
        raise UserError(f"{where}: {key!r} is empty: every record needs one")
    return found


def identifier(record: Record, key: str, where: str) -> str:
    """The id in a column, as text. Of a whole number that is stored as a float, as pandas does, it has no ".0".

    Arguments and errors are those of :func:`value`.
    """
    found = value(record, key, where)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    text = str(found).strip()
    if found != found or not text:
        raise UserError(f"{where}: {key!r} is empty: every record needs one")
    return text


def number(record: Record, key: str, where: str) -> float:
    """The finite number in a column. Arguments are those of :func:`value`. Raises UserError for anything else."""
    found = value(record, key, where)
    try:
        result = float(found)
    except (TypeError, ValueError):
        result = float("nan")
    if isinstance(found, bool) or not abs(result) < float("inf"):
        raise UserError(f"{where}: {key!r} must be a number, got {found!r}: fix the line, or set the column's name")
    return result


def moment(record: Record, key: str, where: str) -> float:
    """The time in a column, as a number. Arguments are those of :func:`value`.

    A number stays as it is. A date (see :func:`rec_r1.tasks.dates.read_date`, or a date of Parquet) becomes seconds
    since 1970, in UTC where it has no time zone. Raises UserError, with the reason, for anything else.
    """
    found = value(record, key, where)
    found = found.strip() if isinstance(found, str) else found
    if isinstance(found, str) and not found.replace(".", "", 1).lstrip("-").isdigit():
        try:
            found = read_date(found)
        except ValueError as error:
            if _is_number(found):  # Such as "1e9".
                return number(record, key, where)
            raise UserError(
                f"{where}: {key!r} must be a number or a date, got {found!r}: {error}: write it as 2024-01-31 or "
                "2024-01-31 12:00:00, or set the column's name"
            ) from error
    if isinstance(found, datetime.date):
        whole = found if isinstance(found, datetime.datetime) else datetime.datetime(*found.timetuple()[:3])
        return (whole if whole.tzinfo else whole.replace(tzinfo=datetime.UTC)).timestamp()
    return number(record, key, where)


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False


def plain(text: Any) -> str:
    """A field as plain text: lists joined (also those spelled as Python's lists, as shops export them), without HTML
    (see `markup.without_markup`), white space single."""
    if isinstance(text, str) and text[:1] == "[" and text[-1:] == "]":
        try:
            parsed = ast.literal_eval(text)
            text = parsed if isinstance(parsed, list) else text
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass  # brackets of its own
    if isinstance(text, dict):
        text = [f"{key}: {item}" for key, item in text.items()]
    if isinstance(text, list | tuple):
        text = " ".join(plain(item) for item in text)
    if text is None or (isinstance(text, float) and text != text):
        return ""
    return " ".join(without_markup(str(text)).split())
