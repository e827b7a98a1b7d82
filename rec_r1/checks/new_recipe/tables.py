"""The tables in a folder: their columns, a sample of their rows, and what each column seems to hold."""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rec_r1.config import UserError
from rec_r1.tasks.raw_files import Record, read
from rec_r1.tasks.tables import identity, is_blank

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
SAMPLED_ROWS = 2000  # The rows of a table that guesses are made from.
GUESSED_ENCODING = "cp1252"  # That of files that are not UTF-8. It reads nearly all bytes, also of other encodings.
_HEAD_BYTES = 1 << 20  # The bytes of a text file that its encoding and separator are guessed from.

# The usual names of columns, the most specific first. Names are compared in lower case with `_` for other characters,
# and without the type that RecBole writes after a colon.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "id": ("id", "_id", "item_id", "product_id", "doc_id", "document_id", "docid", "asin", "parent_asin", "sku",
           "article_id", "movie_id", "movieid", "item", "product", "document", "productid", "itemid"),
    "title": ("title", "product_title", "name", "product_name", "item_name", "movie_title", "label", "headline"),
    "text": ("text", "description", "product_description", "body", "content", "contents", "abstract", "brand",
             "product_brand", "category", "categories", "features", "product_bullet_point", "bullet_points", "tags",
             "keywords", "color", "genres", "class"),
    "query": ("query", "search_query", "search_term", "searchterm", "user_query", "keyword", "keywords", "search", "q",
              "term", "question", "query_text"),
    "item": ("item_id", "product_id", "doc_id", "document_id", "docid", "asin", "parent_asin", "sku", "item", "product",
             "document", "corpus_id", "clicked_item", "object_id", "article_id", "movie_id", "movieid", "productid",
             "itemid", "id"),
    "user": ("user", "user_id", "userid", "customer_id", "customer", "visitor_id", "session_id", "session",
             "reviewer_id", "reviewerid", "client_id"),
    "time": ("timestamp", "time", "date", "datetime", "created_at", "event_time", "unixreviewtime", "ts", "day"),
    "grade": ("grade", "relevance", "judgment", "judgement", "relevant", "rel", "relevancy", "esci_label",
              "relevance_label", "relevance_grade", "relevance_score", "relevance_judgment", "graded_relevance"),
    "score": ("rating", "score", "label"),
    "event": ("event", "event_type", "action", "action_name", "type", "interaction", "interaction_type"),
    "clicks": ("clicks", "click", "clicked"),
    "purchases": ("purchases", "orders", "conversions", "sales", "purchase", "purchased", "ordered", "bought",
                  "converted", "conversion", "sold"),
    "position": ("position", "pos", "rank", "slot"),
    "split": ("split", "part", "fold", "set", "subset"),
}  # fmt: skip
# The words that such a name may have beside it, of these roles: is_relevant, n_clicks, purchase_count.
_BESIDE = {"is", "was", "has", "n", "nb", "num", "number", "of", "count", "total", "flag"}
_WITH_WORDS_BESIDE = ("grade", "clicks", "purchases")


@dataclass(frozen=True)
class Table:
    """A file of records.

    path: the file.
    columns: its columns' names, in their order; `a.b` is the field b inside an object a.
    given: those of them that are no fields inside an object.
    sample: its first SAMPLED_ROWS records.
    encoding: how its characters are written; ascii where any encoding reads it.
    separator: what separates the columns; None = as the file's ending says.
    """

    path: Path
    columns: tuple[str, ...]
    given: tuple[str, ...]
    sample: Sequence[Record]
    encoding: str = "utf-8"
    separator: str | None = None

    @property
    def stem(self) -> str:
        """The file's name without its endings, in the form of :func:`simple`."""
        return simple(self.path.name.lower().removesuffix(".gz").rpartition(".")[0])

    @property
    def kind(self) -> str:
        """The ending of the file's name that says how it is written, such as csv."""
        return _kind(self.path)

    def records(self) -> Iterator[tuple[Record, str]]:
        """All records, each with its `file:line`. Raises UserError for a line that cannot be read."""
        found = read(self.path, self.separator, encoding=readable(self.encoding))
        return ((_with_fields(record), where) for record, where in found)

    def cells(self, record: Record) -> int:
        """The same number for records that are equal in every cell, as the task catalog compares them.

        Blank cells are left out, because a JSON line may lack them. Lists are left out of Parquet, whose lists the task
        does not read.
        """
        lists = self.kind != "parquet"
        kept = ((key, str(value)) for key, value in record.items() if lists or not isinstance(value, list))
        return hash(tuple(sorted((key, value) for key, value in kept if not is_blank(record[key]))))

    def named(self, role: str) -> list[str]:
        """The columns whose name is usual for ``role``, a key of USUAL_NAMES; the most specific first."""
        usual = USUAL_NAMES[role]
        found = {column: simple(column) for column in self.columns}
        if role in _WITH_WORDS_BESIDE:
            found = {column: name if name in usual else _core(column) for column, name in found.items()}
        return sorted((c for c, name in found.items() if name in usual), key=lambda c: usual.index(found[c]))

    def values(self, column: str) -> list[str]:
        """The values of a column in the sample that are not empty, as texts."""
        found = (as_text(record.get(column)) for record in self.sample)
        return [value for value in found if value]


def simple(column: str) -> str:
    """A column's name in lower case, with `_` for other characters and without RecBole's type."""
    return re.sub(r"\W+", "_", column.partition(":")[0].strip().lower()).rstrip("_")


def _core(column: str) -> str:
    """A column's name in the form of :func:`simple`, without words such as `is` and `count`."""
    name = simple(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column))
    return "_".join(word for word in name.split("_") if word not in _BESIDE)


def all_values(table: Table, column: str) -> list[str]:
    """The different values of a column in the whole file, whose last rows may be the only purchases or test queries."""
    found = dict.fromkeys(as_text(record.get(column)) for record, _ in table.records())
    return [value for value in found if value]


def as_text(value: Any) -> str:
    """A field as a stripped text; "" for a missing one."""
    return identity(value) or ""


def readable(encoding: str) -> str:
    """The encoding that a file is read with: a file whose head is ASCII may have other characters behind it."""
    return "utf-8" if encoding == "ascii" else encoding


def _kind(path: Path) -> str:
    return path.name.lower().removesuffix(".gz").rpartition(".")[2]


def is_table(path: Path) -> bool:
    """Whether the ending of a file is that of a table."""
    return path.name.lower().removesuffix(".gz").endswith(ENDINGS)


def open_table(path: Path) -> Table:
    """Read the beginning of a table. Raises UserError where it cannot be read or has no record."""
    encoding = _encoding(path)
    separator = _separator(path, encoding)
    sample = [
        record for record, _ in itertools.islice(read(path, separator, encoding=readable(encoding)), SAMPLED_ROWS)
    ]
    if not sample:
        raise UserError(f"{path}: it has no records: remove the file, or add some")
    given = tuple(dict.fromkeys(key for record in sample for key in record))
    sample = [_with_fields(record) for record in sample]
    columns = tuple(dict.fromkeys(key for record in sample for key in record if key))  # An index of pandas has no name.
    return Table(path, columns, given, sample, encoding, separator)


def _with_fields(record: Record) -> Record:
    """A record, and behind it the fields inside its objects: `a.b` for the field b in an object a."""
    found = dict(record)
    for key, value in record.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": field for inner, field in _with_fields(value).items()}
    return found


def _head(path: Path) -> bytes:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            return bytes(file.read(_HEAD_BYTES))
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error}): check the file") from error


def _encoding(path: Path) -> str:
    if _kind(path) == "parquet":
        return "ascii"
    head = _head(path)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if head.isascii():
        return "ascii"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # The last character of the head may be cut.
    except UnicodeDecodeError:
        return _other_encoding(path, head)
    return "utf-8"


def _other_encoding(path: Path, head: bytes) -> str:
    try:
        head.decode(GUESSED_ENCODING)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: neither UTF-8 nor {GUESSED_ENCODING} ({error}): convert it to UTF-8, for example with "
            "iconv -f SHIFT_JIS -t UTF-8 if that is its encoding"
        ) from error
    return GUESSED_ENCODING


def _separator(path: Path, encoding: str) -> str | None:
    """The separator of a .csv file that is not the comma; None = as the ending says."""
    if _kind(path) != "csv":
        return None
    first = _head(path).decode(encoding, errors="ignore").lstrip("\ufeff").partition("\n")[0]
    with contextlib.suppress(csv.Error):
        found = csv.Sniffer().sniff(first, delimiters=",;\t|").delimiter
        return None if found == "," else found
    return None
