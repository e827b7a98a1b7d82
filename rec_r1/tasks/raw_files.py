"""Raw files into records, each with its place for messages: JSONL, JSON, CSV, TSV, any separator, Parquet; .gz too."""

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
from rec_r1.tasks.markup import without_markup
from retrievers.text import analysis

Record = dict[str, Any]
_HUB = "hub:"
_COLUMN_FIX = "set the column's name"


def task_folder(config: TaskConfig, holds: str, hub_files: Sequence[str] = ()) -> Path:
    """`task.path` as a folder; `hub:OWNER/NAME` is a dataset of the hub, of which ``hub_files`` are downloaded, once.

    holds: what it should hold, for messages. Raises UserError where there is no such folder or dataset.
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
    except Exception as error:  # the hub's errors have no common base: no network, no such dataset, no permission
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"task.path: {_HUB}{name} cannot be downloaded ({type(error).__name__}: {reason}): check name and network, "
            "or download its files yourself and give their folder"
        ) from error


def find_files(folder: Path, patterns: Sequence[str], what: str) -> list[Path]:
    """All files that the first fitting pattern fits, as it is or with .gz, by name; a pattern is relative to ``folder``
    or absolute. Raises UserError where none fits."""
    for pattern in filter(None, patterns):
        for candidate in (Path(pattern), Path(f"{pattern}.gz")):
            if (folder / candidate).is_file():  # as it is written: a bracket may be part of a name
                return [folder / candidate]
            base = Path(candidate.anchor) if candidate.is_absolute() else folder
            found = sorted(path for path in base.glob(str(candidate.relative_to(candidate.anchor))) if path.is_file())
            if found:
                return found
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{folder}: no {what} ({' or '.join(patterns)}, or with .gz); there is {there}: name the right folder"
    )


def find_file(folder: Path, patterns: Sequence[str], what: str) -> Path:
    """The first file in ``folder`` that a pattern fits, as it is or with .gz. Raises UserError."""
    return find_files(folder, patterns, what)[0]


def read(
    path: Path,
    separator: str | None = None,
    names: Sequence[str] = (),
    encoding: str = "utf-8",
    columns: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> Iterator[tuple[Record, str]]:
    """Records of one file, each with its `file:line` (Parquet: `file: row n`).

    The ending says the format; ``separator`` says a delimited text whatever the ending ("::" as well). names: the
    columns of a file without a header. columns: the only ones read of a Parquet file, which must have them, and those
    of ``optional`` that it has; none = all. A .json file is one array of objects, or one object a line. Raises
    UserError for a missing file and for a line that does not fit.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file: check the task's path and file names")
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if separator is None and kind == "parquet":
        yield from _parquet(path, columns, optional)
    elif separator is None and kind in ("jsonl", "json", "ndjson"):
        array = kind == "json" and _first(path, encoding) == "["
        yield from _array(path, encoding) if array else _jsonl(path, encoding)
    elif separator is not None or kind in ("csv", "tsv"):
        yield from _delimited(path, separator or {"csv": ",", "tsv": "\t"}[kind], names, encoding)
    else:
        raise UserError(f"{path}: unknown kind of file {kind!r}: use .jsonl, .csv, .tsv or .parquet (.gz as well)")


def _open(path: Path, encoding: str) -> Any:
    encoding = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding  # a byte order mark is no text
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding=encoding, newline="")
    return path.open(encoding=encoding, newline="")


def _broken(path: Path, encoding: str, error: Exception) -> UserError:
    if isinstance(error, UnicodeError):
        return UserError(
            f"{path}: not {encoding.upper()} ({error}): convert it, or name its encoding if the task takes one"
        )
    return UserError(f"{path}: cannot be read ({error}): download it again")


def lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[str, str]]:
    """The lines of a text that are not blank, each with its `file:line`. Raises UserError where it cannot be read."""
    try:
        with _open(path, encoding) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield line, f"{path}:{number}"
    except (UnicodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _broken(path, encoding, error) from error


def matches(path: Path, pattern: re.Pattern[str], block: int = 1 << 20) -> Iterator[re.Match[str]]:
    """What ``pattern`` finds in a text too large for memory, in which one match ends before the next begins."""
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
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON ({error}): one object a line") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object, got {type(record).__name__}")
        yield record, where


def _first(path: Path, encoding: str) -> str:
    """The first character that is no white space; "" for a blank file."""
    return next((line.lstrip()[:1] for line, _ in lines(path, encoding)), "")


def _array(path: Path, encoding: str) -> Iterator[tuple[Record, str]]:
    """The objects of a file that is one JSON array."""
    try:
        with _open(path, encoding) as file:
            entries = json.load(file)
    except (UnicodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _broken(path, encoding, error) from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}): one array of objects, or one object a line") from error
    for number, record in enumerate(entries, 1):
        if not isinstance(record, dict):
            raise UserError(f"{path}: entry {number}: expected an object, got {type(record).__name__}")
        yield record, f"{path}: entry {number}"


def _delimited(path: Path, separator: str, names: Sequence[str], encoding: str) -> Iterator[tuple[Record, str]]:
    header = list(names)
    try:
        with _open(path, encoding) as file:
            for number, fields in _rows(file, separator):
                if not fields or fields == [""]:
                    continue
                if not header:
                    header = [name.strip().lstrip("\ufeff") for name in fields]
                    continue
                where = f"{path}:{number}"
                if len(fields) != len(header):
                    raise UserError(
                        f"{where}: {len(fields)} fields instead of {len(header)} ({', '.join(header)}): fix the line"
                    )
                yield dict(zip(header, fields, strict=True)), where
    except (UnicodeError, csv.Error, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _broken(path, encoding, error) from error


def _rows(file: Any, separator: str) -> Iterator[tuple[int, list[str]]]:
    if separator in (",", ";"):  # what spreadsheets write, with quotation marks where a field needs them
        reader = csv.reader(file, delimiter=separator)
        for fields in reader:
            yield reader.line_num, fields
    else:  # tabs, | and :: come without quoting in the field's files: a quotation mark is part of the title
        for number, line in enumerate(file, 1):
            yield number, line.rstrip("\r\n").split(separator)


def _parquet(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[Record, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        there = file.schema_arrow.names
        missing = [name for name in columns if name not in there]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}, only {', '.join(there)}: {_COLUMN_FIX}")
        wanted = [name for name in there if name in {*columns, *optional}] if columns else None
        row = 0
        for batch in file.iter_batches(batch_size=1 << 14, columns=wanted):  # small: texts may be long
            for record in batch.to_pylist():
                row += 1
                yield record, f"{path}: row {row}"
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error}): download it again") from error


def watched(records: Iterable[tuple[Record, str]], path: Path, unit: str) -> Iterable[tuple[Record, str]]:
    """``records`` of ``path`` with a progress bar where the file is a large one."""
    from tqdm import tqdm

    small = path.stat().st_size < 1 << 24
    bar: Iterable[tuple[Record, str]] = tqdm(records, desc=path.name, unit=f" {unit}", mininterval=1, disable=small)
    return bar


def present(record: Record, key: str, where: str) -> Any:
    """``record[key]``, which may be empty. Raises UserError, naming what is there, where the column is missing."""
    if key not in record:
        raise UserError(f"{where}: no column {key!r}, only {', '.join(map(str, record))}: {_COLUMN_FIX}")
    return record[key]


def value(record: Record, key: str, where: str) -> Any:
    """``record[key]``. Raises UserError, naming what is there, where the column is missing or empty."""
    found = present(record, key, where)
    if found is None or found == "":
        raise UserError(f"{where}: {key!r} is empty: every record needs one")
    return found


def identifier(record: Record, key: str, where: str) -> str:
    """An id as text; a whole number that was stored as a float ("12.0" by way of pandas) as that number."""
    found = value(record, key, where)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    text = str(found).strip()
    if found != found or not text:
        raise UserError(f"{where}: {key!r} is empty: every record needs one")
    return text


def number(record: Record, key: str, where: str) -> float:
    """A finite number. Raises UserError for anything else."""
    found = value(record, key, where)
    try:
        result = float(found)
    except (TypeError, ValueError):
        result = float("nan")
    if isinstance(found, bool) or not abs(result) < float("inf"):
        raise UserError(f"{where}: {key!r} must be a number, got {found!r}: fix the line, or set the column's name")
    return result


def moment(record: Record, key: str, where: str) -> float:
    """A time as a number: numbers as they are, dates (ISO 8601, or Parquet's own) as seconds since 1970, in UTC where
    they name no zone. Raises UserError for anything else."""
    found = value(record, key, where)
    found = found.strip() if isinstance(found, str) else found
    if isinstance(found, str) and not found.replace(".", "", 1).lstrip("-").isdigit():
        try:
            found = datetime.datetime.fromisoformat(found)
        except ValueError:
            return number(record, key, where)  # "1e9", or the message
    if isinstance(found, datetime.date):
        whole = found if isinstance(found, datetime.datetime) else datetime.datetime(*found.timetuple()[:3])
        return (whole if whole.tzinfo else whole.replace(tzinfo=datetime.UTC)).timestamp()
    return number(record, key, where)


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


def first_words(text: str, n: int = 12) -> str:
    """What stands for a text that has no title."""
    return analysis.first_words(text, n)
