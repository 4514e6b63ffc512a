"""Rows of CSV: a header, then a row each, every cell the text that stands there."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from opd.errors import DataError
from opd.rows.lines import MOST_LINE, numbered_lines

_OTHERS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield each row with the line that it begins in; blank lines are none. Raises DataError with the line."""
    csv.field_size_limit(max(csv.field_size_limit(), MOST_LINE))  # of the whole process; prompts are long
    header: list[str] = []
    for number, cells in _numbered(path):
        if not cells:
            continue
        if not header:
            header = _header(path, number, cells)
        elif len(cells) != len(header):
            raise DataError(
                f"{path}, line {number} has {_count(len(cells), 'cell')}, and the header {len(header)}. A cell with a "
                'comma or a line feed in it stands in quotes, and a quote within it is written twice ("")'
            )
        elif [cell.removeprefix("\ufeff") for cell in cells] == header:
            raise DataError(f"{path}, line {number} is the header once more, where files were joined. Remove the line")
        else:
            yield number, dict(zip(header, cells, strict=True))


def _numbered(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each row with the line that it begins in. Raises DataError with the line."""
    table = csv.reader((line for _, line in numbered_lines(path)), strict=True)
    while True:
        begun = table.line_num + 1
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}, line {begun}: no CSV: {_explained(str(error))}") from None
        yield begun, cells


def _explained(reason: str) -> str:
    if "end of data" in reason or "field larger" in reason:
        return 'a quote that opens in this row does not close; one within a cell is written twice ("")'
    if "new-line" in reason:
        return "a carriage return stands in a cell without quotes. Lines end with a line feed: convert the file"
    if "expected after" in reason:
        return 'a cell goes on behind its closing quote; a quote within it is written twice ("")'
    return reason


def _header(path: Path, number: int, cells: list[str]) -> list[str]:
    """Return the names of the columns; one without a name gets one. Raises DataError for what is no header."""
    other = next((name for mark, name in _OTHERS.items() if len(cells) == 1 and mark in cells[0]), None)
    if other is not None:
        raise DataError(f"{path}, line {number}: its cells are parted by {other}. Write the file with commas")
    if len(cells) == 2 and cells[0].strip() == "sep=":
        raise DataError(f"{path}, line {number} is a spreadsheet's note on separators. Remove the line")
    header = [cell if cell.strip() else f"column_{place}" for place, cell in enumerate(cells, start=1)]
    if doubled := [name for name, times in Counter(header).items() if times > 1]:
        raise DataError(f"{path}, line {number}: two columns are called {doubled[0]!r:.80}. Rename or remove one")
    return header


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
