"""Cuts tables of tasks into splits that share no task: by prompt, or by row where all prompts are the same."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b

from opd.envs.tables import Row, Table
from opd.envs.text_env import task_split
from opd.errors import DataError

logger = logging.getLogger(__name__)

_PRECEDENCE = ("eval", "warm", "train")
"""The order in which splits keep a task that stands in more than one of them."""

Keyed = Mapping[str, Sequence[tuple[str, Row]]]
"""Of each split its rows, each with what may be in one split only."""


@lru_cache(maxsize=16)
def disjoint(tables: tuple[tuple[str, Table], ...], prompt_column: str, held_out: float) -> dict[str, list[Row]]:
    """Cut the tables into splits so that no prompt is in two of them. All callers share the rows; do not change them.

    With no eval table, a share `held_out` of the train prompts becomes it, chosen by a stable hash, and one prompt at
    least. A prompt that stands in several splits stays in one (eval before warm before train), and a log line counts
    the rows that are dropped.

    Where prompts repeat so much that a split would be left without rows (a table whose rows all say "Begin."), rows are
    kept apart instead, and a log line says that splits share prompts. Raises DataError where that does not help.
    """
    rows = {split: list(table.rows) for split, table in tables}
    prompts = {split: [(_key(row[prompt_column]), row) for row in rows[split]] for split in rows}
    times = Counter(key for keyed in prompts.values() for key, _ in keyed)
    splits = _apart(prompts, held_out, one_at_least=len(times) == times.total())
    if not all(splits.values()) and len(times) < times.total():
        splits = _apart({split: _by_row(rows[split]) for split in rows}, held_out, one_at_least=True)
        where = ", ".join(dict.fromkeys(table.path for _, table in tables))
        logger.warning(
            "%s: %d rows have %s between them, so splits are kept apart by row, and share prompts: success on "
            "eval is no success on prompts that were never seen",
            where,
            times.total(),
            "one prompt" if len(times) == 1 else f"{len(times)} prompts",
        )
    for split in splits:
        if not splits[split]:
            raise DataError(_empty(split, tables, held_out))
        if split in rows and len(rows) > 1 and (dropped := len(rows[split]) - len(splits[split])):
            logger.warning("the %s split: dropped %d rows whose prompt is in another split too", split, dropped)
    return splits


def _apart(keyed: Keyed, held_out: float, *, one_at_least: bool) -> dict[str, list[Row]]:
    """Cut rows into splits so that no key is in two of them; a split may be left without rows."""
    if "eval" not in keyed:
        chosen = _held_out(keyed["train"], held_out, one_at_least=one_at_least)
        keyed = {
            **keyed,
            "eval": [pair for pair in keyed["train"] if pair[0] in chosen],
            "train": [pair for pair in keyed["train"] if pair[0] not in chosen],
        }
    taken: set[str] = set()
    splits: dict[str, list[Row]] = {}
    for split in (split for split in _PRECEDENCE if split in keyed):
        splits[split] = [row for key, row in keyed[split] if key not in taken]
        taken.update(key for key, _ in keyed[split])
    return splits


def _held_out(keyed: Sequence[tuple[str, Row]], share: float, *, one_at_least: bool) -> set[str]:
    """Choose a share of the keys by their hash; of few, with `one_at_least`, one key if there are two or more."""
    keys = sorted({key for key, _ in keyed})
    chosen = {key for key in keys if task_split(key, held_out=share, warm=0.0) == "eval"}
    if one_at_least and len(keys) > 1 and not 0 < len(chosen) < len(keys):
        chosen = {min(keys, key=lambda key: blake2b(key.encode()).digest())}
    return chosen


def _by_row(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Give each row a key of its own: what it says, and how many rows before it say the same."""
    seen: Counter[str] = Counter()
    keyed = []
    for row in rows:
        text = _key(row)
        keyed.append((f"{text}#{seen[text]}", row))
        seen[text] += 1
    return keyed


def _empty(split: str, tables: Sequence[tuple[str, Table]], held_out: float) -> str:
    """Say why a split has no rows, and what to do."""
    given = dict(tables)
    if "eval" not in given:
        count, where = len(given["train"].rows), given["train"].path
        return (
            f"the {split} split has no rows: {where} has {count}, of which held_out = {held_out} are held out. Give "
            "more rows, or a table for each split: path: {train: FILE, eval: FILE}"
        )
    return (
        f"the {split} split has no rows: all {len(given[split].rows)} of {given[split].path} stand in another split "
        "too. Give each split rows of its own, or leave eval out, and held_out chooses"
    )


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)
