"""Reads tasks from a table, for libraries whose environments begin with a row of a data set."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from opd.envs.splits import disjoint
from opd.envs.tables import Row, by_split, check_rows, checked_prompt
from opd.errors import EnvError
from opd.types import Message


class Rows:
    """Holds the rows of each split. No prompt is in two of them, as for `opd/Dataset-v0`.

    Args:
        data: a file of rows, or `{train: FILE, eval: FILE}`, or a data set that `datasets` loads.
        prompt_column: the user message, or a list of messages.
        privileged_columns: which columns the teacher may see, under which names: `{solution: COLUMN}`.
        held_out: the share of prompts held out for eval, where no eval split is given.
        columns: the types of columns, `{age: int}`; without one a cell of a .csv is the text that it is.
    """

    def __init__(
        self,
        data: str | Mapping[str, str],
        prompt_column: str = "prompt",
        privileged_columns: Mapping[str, str] | None = None,
        *,
        held_out: float = 0.1,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.prompt_column = prompt_column
        self.privileged_columns = dict(privileged_columns or {})
        tables = by_split(data, None, None, columns)
        for table in tables.values():
            table.require(prompt_column, setting="prompt_column")
            for name, column in self.privileged_columns.items():
                table.require(column, setting=f"privileged_columns.{name}")
            check_rows(table, prompt_column, tuple(self.privileged_columns.values()))
        self.columns = [column for table in tables.values() for column in table.columns]
        self._rows = disjoint(tuple(tables.items()), prompt_column, held_out)
        self.counts: dict[str, int | None] = {split: len(rows) for split, rows in self._rows.items()}
        """What `metadata["tasks"]` says."""

    def pick(self, rng: np.random.Generator, split: str, index: int | None) -> Row:
        """Return a row of a split, by its number or at random. Raises EnvError when there is no such row."""
        rows = self._rows[split]
        number = int(rng.integers(len(rows))) if index is None else index
        if not 0 <= number < len(rows):
            raise EnvError(f"index {number} is outside the {split} split, which has {len(rows)} rows")
        return rows[number]

    def prompt(self, row: Row) -> list[Message]:
        """Return the messages that a row begins with. Raises DataError when its prompt is neither text nor messages."""
        prompt = checked_prompt(row[self.prompt_column], where=self.prompt_column)
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]

    def privileged(self, row: Row) -> dict[str, str]:
        """Return what the teacher may see of a row."""
        return {name: str(row[column]) for name, column in self.privileged_columns.items()}
