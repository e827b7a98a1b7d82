"""The rows of a text file whose columns are divided by commas, semicolons, tabs or another separator."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence

csv.field_size_limit(1 << 24)  # Characters of a cell. Python's own limit is 131,072, less than some texts have.


def rows(lines: Iterable[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row, with the number of its last line.

    lines: the lines of the file, with their line ends.
    separator: what divides the columns. With commas and semicolons, which spreadsheets write, a cell may stand in
        quotation marks. In published files with tabs, | or ::, a quotation mark is part of a title.

    Raises csv.Error for a cell that is too long, and for a cell over several lines whose quotation mark is not closed,
    or is closed by a mark that text follows.
    """
    if separator not in (",", ";"):
        for number, line in enumerate(lines, 1):
            yield number, line.rstrip("\r\n").split(separator)
        return
    read: list[str] = []  # The lines of a row.

    def remembered() -> Iterator[str]:
        for line in lines:
            read.append(line)
            yield line

    reader = csv.reader(remembered(), delimiter=separator)
    for cells in reader:
        if any("\n" in cell for cell in cells):
            _refuse_swallowed_rows(read, reader.line_num, separator)
        yield reader.line_num, cells
        read.clear()


def _refuse_swallowed_rows(read: Sequence[str], last: int, separator: str) -> None:
    """Raise csv.Error where a quotation mark that should not be there takes the rows after it into its cell.

    Python's reader goes on to the next mark, wherever it is, or to the end of the file. It reports neither, unless it
    is strict. Single lines are not read strictly, because nothing is lost there, and a space may follow a closing mark.

    read: the lines of a row with a cell of several lines.
    last: the number of the last of them.
    """
    try:
        list(csv.reader(read, delimiter=separator, strict=True))
    except csv.Error as error:
        _, _, cell = read[0].rpartition(f'{separator}"')
        begin = (cell or read[0]).strip().lstrip('"')[:40]
        raise csv.Error(f"the cell that begins with {begin!r} in line {last - len(read) + 1} is not closed") from error
