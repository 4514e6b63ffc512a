"""Tables of tasks: files, folders and hub data sets, read once per process and cut into disjoint splits."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from opd.envs.text_env import SPLITS, task_split
from opd.errors import ConfigError, DataError
from opd.types import ONLY_TEXT, Message, medium_in

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_PRECEDENCE = ("eval", "warm", "train")
"""The order in which splits keep a task that stands in more than one of them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)  # equal by identity, so that it can key a cache
class Table:
    """Holds rows and the names of their columns. Every row has every column."""

    path: str
    rows: Sequence[Row]
    columns: list[str]

    def require(self, column: str, *, setting: str) -> None:
        """Raise ConfigError, with the nearest name, when there is no such column."""
        if column not in self.columns:
            near = get_close_matches(column, self.columns, n=1)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise ConfigError(
                f"{setting}: {self.path} has no column {column!r}. Its columns: {', '.join(self.columns)}.{hint}"
            )


def looks_like_file(path: str) -> bool:
    """True if the path ends like a file that `load_file` reads; otherwise it names a data set."""
    return Path(path).suffix in _FORMATS


@lru_cache(maxsize=16)
def load_file(path: str) -> Table:
    """Load a .jsonl, .json, .csv or .parquet file.

    Raises ConfigError when there is none such, DataError when a line of a .jsonl file is no JSON object.
    """
    file = Path(path)
    if not looks_like_file(path):
        raise ConfigError(f"path: {path!r} cannot be read as a file of rows; allowed endings: {', '.join(_FORMATS)}")
    if not file.is_file():
        raise ConfigError(f"path: there is no file {path!r}")
    if file.suffix == ".jsonl":
        return _load_jsonl(file)
    import datasets

    rows = datasets.load_dataset(_FORMATS[file.suffix], data_files=path, split="train")
    return Table(path=path, rows=rows, columns=rows.column_names)


@lru_cache(maxsize=16)
def load_dataset(path: str, name: str | None) -> dict[str, Table]:
    """Load all splits of a data set: a folder that `save_to_disk` wrote, or what `datasets.load_dataset` takes.

    `name` is the configuration of a hub data set. Raises ConfigError when it cannot be loaded.
    """
    if path.startswith((".", "/", "~")) and not Path(path).exists():
        raise ConfigError(f"path: there is no file or folder {path!r}")
    import datasets

    try:
        if Path(path, "dataset_dict.json").is_file() or Path(path, "dataset_info.json").is_file():
            loaded = datasets.load_from_disk(path)
        else:
            loaded = datasets.load_dataset(path, name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"path: {path!r} is no file here, and as a data set it cannot be loaded: {error}") from error
    splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded
    return {
        split: Table(path=f"{path} ({split})", rows=rows, columns=rows.column_names) for split, rows in splits.items()
    }


def _load_jsonl(file: Path) -> Table:
    rows: list[dict[str, Any]] = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_parse_row(line, where=f"{file}, line {number}"))
    if not rows:
        raise DataError(f"{file} has no rows")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return Table(path=str(file), rows=[dict.fromkeys(columns) | row for row in rows], columns=columns)


def _parse_row(line: str, *, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row must be a JSON object, not {type(row).__name__}")
    return row


def by_split(path: str | Mapping[str, str], name: str | None, splits: Mapping[str, str] | None) -> dict[str, Table]:
    """Load the table of each split that the three settings describe. Raises ConfigError when they do not fit."""
    if isinstance(path, str) and not looks_like_file(path):
        return _dataset_tables(path, name, splits or {"train": "train"})
    if name is not None or splits is not None:
        raise ConfigError("name and splits are for data sets; for files write path: {train: FILE, eval: FILE}")
    files = {"train": path} if isinstance(path, str) else path
    _check_splits(files, setting="path")
    return {split: load_file(file) for split, file in files.items()}


def _dataset_tables(path: str, name: str | None, splits: Mapping[str, str]) -> dict[str, Table]:
    _check_splits(splits, setting="splits")
    tables = load_dataset(path, name)
    for theirs in splits.values():
        if theirs not in tables:
            raise ConfigError(f"splits: {path} has no split {theirs!r}. Its splits: {', '.join(tables)}")
    return {ours: tables[theirs] for ours, theirs in splits.items()}


def _check_splits(chosen: Mapping[str, str], *, setting: str) -> None:
    if unknown := [split for split in chosen if split not in SPLITS]:
        raise ConfigError(f"{setting}: there is no split {unknown[0]!r}; allowed: {', '.join(SPLITS)}")
    if "train" not in chosen:
        raise ConfigError(f"{setting} names no train split")


@lru_cache(maxsize=16)
def disjoint(tables: tuple[tuple[str, Table], ...], prompt_column: str, held_out: float) -> dict[str, list[Row]]:
    """Cut the tables into splits so that no prompt is in two of them. All callers share the rows; do not change them.

    With no eval table, a share `held_out` of the train prompts becomes it, chosen by a stable hash. A prompt
    that stands in several splits stays in one (eval before warm before train), and a log line counts the rows
    that are dropped. Raises DataError when that leaves a split without rows.
    """
    keyed = {split: [(_key(row[prompt_column]), row) for row in table.rows] for split, table in tables}
    if "eval" not in keyed:
        keyed["eval"] = [(key, row) for key, row in keyed["train"] if _is_held_out(key, held_out)]
        keyed["train"] = [(key, row) for key, row in keyed["train"] if not _is_held_out(key, held_out)]
    taken: set[str] = set()
    splits: dict[str, list[Row]] = {}
    for split in (split for split in _PRECEDENCE if split in keyed):
        splits[split] = [row for key, row in keyed[split] if key not in taken]
        if dropped := len(keyed[split]) - len(splits[split]):
            logger.warning("the %s split: dropped %d rows whose prompt is in another split too", split, dropped)
        if not splits[split]:
            raise DataError(f"the {split} split has no rows; look at path, splits and held_out = {held_out}")
        taken.update(key for key, _ in keyed[split])
    return splits


def _is_held_out(key: str, share: float) -> bool:
    return task_split(key, held_out=share, warm=0.0) == "eval"


def _key(prompt: object) -> str:
    return json.dumps(prompt, sort_keys=True, default=str)


def checked_prompt(prompt: object, *, where: str) -> str | list[Message]:
    """Raise DataError unless the prompt is text or a list of messages."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        return prompt
    for number, message in enumerate(prompt if isinstance(prompt, list) else ()):
        if medium := medium_in(message.get("content") if isinstance(message, dict) else message):
            raise DataError(f"{where}: the prompt's messages[{number}] holds {medium!r}: {ONLY_TEXT}")
    raise DataError(f"{where}: a prompt must be a string or a list of messages, not {prompt!r:.80}")


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )
