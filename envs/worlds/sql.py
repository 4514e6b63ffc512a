"""Asks an agent to look things up in a database: questions in words, answered with SQL over a real SQLite database.

The database can only be read, within limits on work and on results (`sql_database`); its tables, the names of
its columns and its rows are drawn for each task (`sql_worlds`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np

from opd.envs.text_env import Start, task_split
from opd.envs.tool_env import ToolEnv, ToolError, tool
from opd.envs.worlds.sql_database import Database, show
from opd.envs.worlds.sql_worlds import WORLDS, Question, Schema, draw_question, draw_schema, fill
from opd.errors import ConfigError, DataError, EnvError
from opd.tool_calls import format_call

SYSTEM = (
    "Answer the question from the SQLite database: run SELECT statements to find out, then give the answer. "
    "The database can only be read."
)
_DRAWS = 5_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Says what a question asks for."""

    joins: int
    filters: int
    hows: tuple[str, ...]
    """The aggregates, of which one is drawn for each question (see `sql_worlds.Question.how`)."""


_SIMPLE = ("count", "sum", "avg", "min", "max")
LEVELS = {
    1: Level(joins=0, filters=1, hows=_SIMPLE),
    2: Level(joins=1, filters=1, hows=_SIMPLE),
    3: Level(joins=2, filters=2, hows=(*_SIMPLE, "most")),
    4: Level(joins=3, filters=3, hows=(*_SIMPLE, "most")),
}


class SqlEnv(ToolEnv):
    """Answer a question with SQL over a database of five tables. Reward 1 for the right answer, else 0.

    The feedback to a wrong answer names the columns that no query has used and every right one must. Privileged
    are `solution` (the query) and `plan` (its parts in words). No question is in two splits, whatever the
    database behind it.

    Args:
        level: 1 (no join, one filter) to 4 (three joins, two or three filters, groups); or several, evenly mixed,
            by the task's index where there is one.
        max_rows: rows of a result that are shown.
        time_limit: seconds that a query may take; a limit on its work stops it long before on most machines.
        max_steps: truncate after this many turns.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  (gymnasium's own declaration)
        "render_modes": [],
        "tasks": {"train": None, "eval": None, "warm": None},
    }

    def __init__(
        self,
        *,
        level: int | list[int] = 1,
        max_rows: int = 20,
        time_limit: float = 2.0,
        max_steps: int | None = 8,
    ) -> None:
        self.levels = [level] if isinstance(level, int) else list(level)
        if not self.levels or set(self.levels) - set(LEVELS):
            raise ConfigError(f"level = {level} must be one or more of: {', '.join(map(str, LEVELS))}")
        if max_rows < 1 or time_limit <= 0:
            raise ConfigError(f"max_rows = {max_rows} must be 1 or more, time_limit = {time_limit} above 0 (seconds)")
        super().__init__(max_steps=max_steps)
        self.max_rows = max_rows
        self.time_limit = time_limit
        self.database = Database()
        self.schema = Schema({}, {})
        self.question = Question(base="", how="count", column=None)
        self.expected: str | int | float = 0

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        number = int(rng.integers(len(self.levels))) if index is None else index
        level = LEVELS[self.levels[number % len(self.levels)]]
        for _ in range(_DRAWS):
            world = tuple(WORLDS)[int(rng.integers(len(WORLDS)))]
            question = draw_question(rng, world, joins=level.joins, filters=level.filters, hows=level.hows)
            asked = "" if question is None else question.words(WORLDS[world])
            if question is None or task_split(asked) != split:
                continue
            self._open(rng, world)
            expected = self._unique_answer(question)
            if expected is not None:
                self.question, self.expected = question, expected
                self.database.read.clear()
                return Start(
                    prompt="\n".join([*self.schema.statements(), "", asked]),
                    system=SYSTEM,
                    privileged={"plan": question.plan(self.schema), "solution": question.query(self.schema)},
                )
        raise EnvError(f"no question of {level} was found in split {split!r}")

    @tool
    def query(self, sql: str) -> str:
        """Run one SELECT statement and see its first rows.

        Args:
            sql: the statement, in SQLite's dialect
        """
        try:
            return show(self.database.query(sql, max_rows=self.max_rows))
        except DataError as error:
            raise ToolError(str(error)) from None

    @tool
    def answer(self, value: str) -> str:
        """Answer the question. This ends the task.

        Args:
            value: a number or a name, nothing else
        """
        right = _is_same_answer(value, self.expected)
        self.finish(float(right), success=right, feedback=None if right else self._explain())
        return "right" if right else "wrong"

    def close(self) -> None:
        self.database.close()
        super().close()

    def oracle(self) -> list[str]:
        """Return the actions of a perfect episode."""
        return [
            format_call("query", {"sql": self.question.query(self.schema)}),
            format_call("answer", {"value": str(self.expected)}),
        ]

    def _open(self, rng: np.random.Generator, world: str) -> None:
        """Make a new database in place of the last one."""
        self.database.close()
        self.database = Database(time_limit=self.time_limit)
        self.schema = draw_schema(rng, world)
        fill(self.database, self.schema, rng)

    def _unique_answer(self, question: Question) -> str | int | float | None:
        """Return the one right answer. None: it is empty, shared by two, or the same without the conditions."""
        found: str | int | float | None = self._first_value(question.query(self.schema))
        if found in (None, 0) or found == self._first_value(replace(question, filters=()).query(self.schema)):
            return None
        if question.how == "most":
            sizes = [size for (size,) in self.database.query(question.group_sizes(self.schema), max_rows=2).rows]
            return None if len(set(sizes)) < len(sizes) else found
        return found

    def _first_value(self, query: str) -> Any:
        return next((row[0] for row in self.database.query(query).rows), None)

    def _explain(self) -> str:
        unused = sorted(f"{table}.{column}" for table, column in self.question.needed(self.schema) - self.database.read)
        why = f"no query has used {', '.join(unused)}" if unused else "the right columns were read, but not in this way"
        return f"Wrong answer: {why}."


def _is_same_answer(given: str, expected: str | int | float) -> bool:
    """True if both are the same: numbers to two decimals, names in any case."""
    if isinstance(expected, str):
        return given.strip().casefold() == expected.casefold()
    try:
        number = float(given.strip().replace(",", ""))
    except ValueError:
        return False
    return isfinite(number) and abs(number - expected) <= 0.005 + 1e-9 * abs(expected)
