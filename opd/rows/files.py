"""A file of rows, whatever its format: where each row stands, and the columns that they have together."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.errors import ConfigError, DataError
from opd.rows.cells import check_columns, convert_columns
from opd.rows.csv_rows import read_csv
from opd.rows.json_rows import read_array, read_lines
from opd.rows.parquet_rows import read_parquet

Row = dict[str, Any]
Numbered = Iterable[tuple[int, Row]]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """Holds what was read: rows as they stand, each with its place."""

    path: Path
    rows: list[Row]
    places: Sequence[int]
    """Of each row the number of the line that it begins in, or its own number where `unit` is "row". From 1."""
    unit: str

    def where(self, number: int) -> str:
        """Say where the row of this number, from 0, stands: for the beginning of a message."""
        return f"{self.path}, {self.unit} {self.places[number]}"

    @property
    def columns(self) -> list[str]:
        """The names of all columns, in the order in which they come."""
        return list(dict.fromkeys(column for row in self.rows for column in row))


def read_file(path: Path, *, columns: Mapping[str, str] | None = None) -> File:
    """Read the rows of a file; the end of its name says its format.

    Args:
        columns: the types of some columns (`TYPES`); a text in one of them is read as such.

    Raises ConfigError where there is no such file, or its name ends otherwise; DataError, with the line or the row, for
    what cannot be read as rows, and for a file that has none.
    """
    types = check_columns(columns)
    _check_file(path)
    rows: list[Row] = []
    places: list[int] = []
    for place, row in FORMATS[path.suffix.lower()](path):
        rows.append(row)
        places.append(place)
    if not rows:
        empty = "is empty" if path.stat().st_size == 0 else "has no rows"
        raise DataError(f"{path} {empty}")
    unit = "line" if path.suffix.lower() != ".parquet" and len(set(places)) == len(places) else "row"
    file = File(path=path, rows=rows, places=places if unit == "line" else range(1, len(rows) + 1), unit=unit)
    convert_columns(rows, types, columns=file.columns, path=str(path), where=file.where)
    return file


def _check_file(path: Path) -> None:
    """Raise ConfigError unless the path is that of a file of rows."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(
            f"path: {str(path)!r} cannot be read as a file of rows; allowed endings: {', '.join(FORMATS)}"
        )
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise ConfigError(f"path: there is no file {str(path)!r}") from None
        raise ConfigError(f"path: {str(path)!r:.200} cannot be read: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise ConfigError(f"path: {str(path)!r} is {kind}, not a file of rows")


def _read_json(path: Path) -> Numbered:
    array = read_array(path)
    return read_lines(path) if array is None else array


FORMATS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": read_lines,
    ".json": _read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
"""What reads each format, by the end of a name."""
