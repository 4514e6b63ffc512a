"""Tables of tasks: files, folders and hub data sets, read once per process and cut into disjoint splits."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from opd.envs.text_env import SPLITS
from opd.errors import ConfigError, DataError
from opd.rows import FORMATS, read_file
from opd.rows.cells import check_columns, convert_columns
from opd.types import ONLY_TEXT, Message, medium_in

Row = Mapping[str, Any]
_OTHER_FILES = (".arrow", ".gz", ".ndjson", ".pkl", ".tsv", ".txt", ".xls", ".xlsx", ".xz", ".zip", ".zst")
"""What the names of files end in and those of data sets do not."""
_MOST_NAMES = 20
"""Columns that a message names."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)  # equal by identity, so that it can key a cache
class Table:
    """Holds rows and the names of their columns. Every row has every column."""

    path: str
    rows: Sequence[Row]
    columns: list[str]
    where: Callable[[int], str]
    """Says where the row of a number, from 0, stands: the file and the line."""

    def require(self, column: str, *, setting: str) -> None:
        """Raise ConfigError, with the nearest name, when there is no such column."""
        if column not in self.columns:
            near = get_close_matches(column, self.columns, n=1)
            hint = f' Did you mean "{near[0]:.80}"?' if near else ""
            more = f", and {len(self.columns) - _MOST_NAMES} more" if len(self.columns) > _MOST_NAMES else ""
            names = ", ".join(map(_named, self.columns[:_MOST_NAMES]))
            raise ConfigError(f"{setting}: {self.path} has no column {column!r:.80}. Its columns: {names}{more}.{hint}")


def _named(column: str) -> str:
    """Return a column's name for a message: in one line, and short where it is text in a name's place."""
    return column if column.isprintable() and column == column.strip() and len(column) <= 40 else f"{column[:40]!r}"


def load_file(path: str, types: Mapping[str, str] | None = None) -> Table:
    """Load a .jsonl, .json, .csv or .parquet file; `types` are those of its columns (`opd.rows.TYPES`).

    Raises ConfigError when there is none such, DataError, with the line, for what cannot be read as a row.
    """
    file = Path(path).expanduser()
    try:
        state = file.stat()
    except (OSError, ValueError):
        return _load_file(file, (), ())  # which says what is wrong
    return _load_file(file, tuple(check_columns(types).items()), (state.st_mtime_ns, state.st_size, state.st_ino))


@lru_cache(maxsize=16)
def _load_file(file: Path, types: tuple[tuple[str, str], ...], state: tuple[int, ...]) -> Table:
    """Load a file as it is in a `state`: one that was written again is read again."""
    found = read_file(file, columns=dict(types))
    columns = found.columns
    rows = [row if len(row) == len(columns) else dict.fromkeys(columns) | row for row in found.rows]
    return Table(path=str(file), rows=rows, columns=columns, where=found.where)


@lru_cache(maxsize=16)
def load_dataset(path: str, name: str | None) -> dict[str, Table]:
    """Load all splits of a data set: a folder that `save_to_disk` wrote, or what `datasets.load_dataset` takes.

    `name` is the configuration of a hub data set. Raises ConfigError when it cannot be loaded.
    """
    local = Path(path).expanduser()
    if path.startswith((".", "/", "~")) and not local.exists():
        raise ConfigError(f"path: there is no file or folder {path!r}")
    if (local.exists() and not local.is_dir()) or local.suffix.lower() in _OTHER_FILES:
        raise ConfigError(f"path: {path!r} cannot be read as a file of rows; allowed endings: {', '.join(FORMATS)}")
    import datasets

    try:
        if (local / "dataset_dict.json").is_file() or (local / "dataset_info.json").is_file():
            loaded = datasets.load_from_disk(str(local))
        else:
            loaded = _as_written(str(local) if local.is_dir() else path, name)
    except Exception as error:  # it raises those of networks, archives, Arrow and pandas
        reason = "\n".join(str(error).splitlines()[:5])[:1000]
        raise ConfigError(
            f"path: {path!r} is no file here, and as a data set it cannot be loaded: {type(error).__name__}: {reason}"
        ) from error
    splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded
    return {split: _table_of(f"{path} ({split})", rows, rows.column_names) for split, rows in splits.items()}


def _as_written(path: str, name: str | None) -> Any:
    """Load a data set that is no folder of `save_to_disk`; cells of CSV stay the texts that they are."""
    import datasets

    builder = datasets.load_dataset_builder(path, name)
    if not hasattr(builder.config, "na_filter"):
        return datasets.load_dataset(path, name)
    as_text = {"na_filter": False, "encoding": "utf-8-sig"}
    first = datasets.load_dataset(path, name, **as_text)
    names = next(iter(first.values())).column_names
    features = datasets.Features({column: datasets.Value("string") for column in names})
    return datasets.load_dataset(path, name, features=features, **as_text)


def _table_of(path: str, rows: Sequence[Row], columns: list[str]) -> Table:
    return Table(path=path, rows=rows, columns=columns, where=lambda number: f"{path}, row {number + 1}")


def by_split(
    path: str | Mapping[str, str],
    name: str | None,
    splits: Mapping[str, str] | None,
    types: Mapping[str, str] | None = None,
) -> dict[str, Table]:
    """Load the table of each split that the settings describe. Raises ConfigError when they do not fit."""
    types = check_columns(types)
    if isinstance(path, str) and not looks_like_file(path):
        return _dataset_tables(path, name, splits or {"train": "train"}, types)
    if name is not None or splits is not None:
        raise ConfigError("name and splits are for data sets; for files write path: {train: FILE, eval: FILE}")
    files = {"train": path} if isinstance(path, str) else path
    if not isinstance(files, Mapping) or not all(isinstance(file, str) for file in files.values()):
        raise ConfigError(f"path = {path!r:.200} must be a file, or one for each split: {{train: FILE, eval: FILE}}")
    _check_splits(files, setting="path")
    return {split: load_file(file, types) for split, file in files.items()}


def looks_like_file(path: str) -> bool:
    """True if the path ends like a file of rows; otherwise it names a data set."""
    return Path(path).suffix.lower() in FORMATS


def _dataset_tables(
    path: str, name: str | None, splits: Mapping[str, str], types: Mapping[str, str]
) -> dict[str, Table]:
    _check_splits(splits, setting="splits")
    tables = load_dataset(path, name)
    for theirs in splits.values():
        if theirs not in tables:
            raise ConfigError(f"splits: {path} has no split {theirs!r}. Its splits: {', '.join(tables)}")
    return {ours: _typed(tables[theirs], tuple(types.items())) for ours, theirs in splits.items()}


@lru_cache(maxsize=16)
def _typed(table: Table, types: tuple[tuple[str, str], ...]) -> Table:
    """Return a data set's table with the types of its columns; the table itself where there are none to give."""
    if not types:
        return table
    rows = [dict(row) for row in table.rows]
    convert_columns(rows, dict(types), columns=table.columns, path=table.path, where=table.where)
    return _table_of(table.path, rows, table.columns)


def _check_splits(chosen: Mapping[str, str], *, setting: str) -> None:
    if unknown := [split for split in chosen if split not in SPLITS]:
        raise ConfigError(f"{setting}: there is no split {unknown[0]!r}; allowed: {', '.join(SPLITS)}")
    if "train" not in chosen:
        raise ConfigError(f"{setting} names no train split")


@lru_cache(maxsize=16)
def check_rows(table: Table, prompt_column: str, needed: tuple[str, ...]) -> None:
    """Raise DataError, with the file and the line, for a row without a prompt, or without text in a needed column."""
    for number, row in enumerate(table.rows):
        checked_prompt(row[prompt_column], where=f"{table.where(number)}, {prompt_column}")
        for column in needed:
            value = row[column]
            if value is None or (isinstance(value, str) and not value.strip()):
                raise DataError(
                    f"{table.where(number)}, {column}: there is nothing in this column, which the settings ask for. "
                    "Fill it, or remove the row"
                )


def checked_prompt(prompt: object, *, where: str) -> str | list[Message]:
    """Return a prompt: text, or messages without the nulls that Arrow fills in. Raises DataError for anything else."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        return [{key: value for key, value in message.items() if value is not None} for message in prompt]
    for number, message in enumerate(prompt if isinstance(prompt, list) else ()):
        if medium := medium_in(message.get("content") if isinstance(message, dict) else message):
            raise DataError(f"{where}: the prompt's messages[{number}] holds {medium!r}: {ONLY_TEXT}")
    raise DataError(f"{where}: a prompt must be a string or a list of messages, not {_shown(prompt)}")


def _shown(prompt: object) -> str:
    """Show what stands in a prompt's place, short also where it is long."""
    if isinstance(prompt, list):
        prompt = next((message for message in prompt if not _is_message(message)), prompt)
    return reprlib.repr(prompt)[:80]


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )
