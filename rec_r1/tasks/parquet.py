"""Read tables in the format of Parquet."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rec_r1.config import UserError

logger = logging.getLogger(__name__)
COLUMN_FIX = "rename the column, or name the right file"
_ROWS_AT_ONCE = 1 << 14  # few, because texts may be long


def records(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """The rows of a file as (column -> value, file and row).

    Some programs write texts without saying that they are texts. Columns of bytes are therefore read as UTF-8, and
    those that hold something else, such as pictures, are left out with a warning.

    path: the file.
    columns: the columns that it must have. () = all columns are read.
    optional: further columns that are read where they are there.

    Raises UserError for a file that cannot be read, and for a missing column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        there = file.schema_arrow.names
        missing = [name for name in columns if name not in there]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}, only {', '.join(there)}: {COLUMN_FIX}")
        wanted = [name for name in there if name in {*columns, *optional}] if columns else None
        row, left_out = 0, set[str]()
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=wanted):
            texts = {name: _as_text(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
            for name in [name for name, column in texts.items() if column is None and name not in left_out]:
                left_out.add(name)
                logger.warning("%s: column %r holds bytes that are no text in UTF-8, and is not read", path, name)
            kept = {name: column for name, column in texts.items() if name not in left_out}
            for record in pyarrow.RecordBatch.from_pydict(kept).to_pylist():
                row += 1
                yield record, f"{path}: row {row}"
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error}): download it again") from error


def _as_text(column: Any) -> Any:
    """A column whose bytes are texts, or None where they are no UTF-8."""
    import pyarrow

    wanted = _text_type(column.type)
    try:
        return column if wanted == column.type else column.cast(wanted)
    except pyarrow.ArrowInvalid:
        return None


def _text_type(given: Any) -> Any:
    """A type of Arrow with texts in place of bytes, also inside of dictionaries, lists and structs."""
    import pyarrow
    from pyarrow import types

    if types.is_dictionary(given):
        inner = _text_type(given.value_type)
        return given if inner == given.value_type else inner
    if types.is_list(given) or types.is_large_list(given):
        inner = _text_type(given.value_type)
        return given if inner == given.value_type else pyarrow.list_(inner)
    if types.is_struct(given):
        return pyarrow.struct([(field.name, _text_type(field.type)) for field in given])
    if types.is_large_binary(given):
        return pyarrow.large_string()
    of_bytes = types.is_binary(given) or types.is_binary_view(given) or types.is_fixed_size_binary(given)
    return pyarrow.string() if of_bytes else given
