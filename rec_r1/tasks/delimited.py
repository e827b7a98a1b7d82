"""The rows of a text file whose columns are divided by commas, semicolons, tabs or another separator."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator

csv.field_size_limit(1 << 24)  # Characters of a cell. Python's own limit is 131,072, less than some texts have.


def rows(lines: Iterable[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row, with the number of its last line.

    lines: the lines of the file, with their line ends.
    separator: what divides the columns. With commas and semicolons, which spreadsheets write, a cell may stand in
        quotation marks. In published files with tabs, | or ::, a quotation mark is part of a title.

    Raises csv.Error for a cell that is too long, and for a quotation mark that is open at the end of the file.
    """
    if separator not in (",", ";"):
        for number, line in enumerate(lines, 1):
            yield number, line.rstrip("\r\n").split(separator)
        return
    last, cells = "", [""]

    def remembered() -> Iterator[str]:
        nonlocal last
        for line in lines:
            last = line
            yield line

    reader = csv.reader(remembered(), delimiter=separator)
    for cells in reader:
        yield reader.line_num, cells
    # A cell whose quotation mark stays open takes the rest of the file, and Python's reader does not report it.
    if cells and "\n" in cells[-1] and not last.rstrip("\r\n").endswith('"'):
        raise csv.Error(f"the cell that begins with {cells[-1].splitlines()[0][:40]!r} is not closed")
