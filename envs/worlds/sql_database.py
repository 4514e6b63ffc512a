"""Holds an SQLite database in memory that strangers may query: filled once, then only read, within limits.

SQLite's own means do it: an authorizer that knows what may be read and called, a progress handler that counts the
work, and limits on the length of texts. The work is limited in steps of SQLite's virtual machine first, since
these are the same on every machine, and in seconds only as a last resort.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd.errors import DataError

MOST_STEPS = 1_000_000
"""Instructions of SQLite's virtual machine for one query; a tenth of a second or less."""
_EVERY = 1000  # instructions between two looks at the limits
_MOST_LENGTH = 2_000  # of a query, a text or a row, so that a row of a runaway query is small

# Whatever is not here cannot be called: what reads files or loads code, what makes huge texts,
# what is random or tells the time (a run is a function of its seed).
_HARMLESS = """
    abs avg ceil ceiling coalesce concat concat_ws count cume_dist dense_rank first_value floor glob group_concat
    ifnull iif instr lag last_value lead length like lower ltrim max min mod nth_value ntile nullif percent_rank pow
    power rank replace round row_number rtrim sign sqrt string_agg substr substring sum total trim typeof unicode upper
"""
_FUNCTIONS = frozenset(_HARMLESS.split())


@dataclass(frozen=True, slots=True)
class Result:
    """Holds what a query found."""

    columns: list[str]
    rows: list[tuple[Any, ...]]
    more: bool
    """True if there are further rows."""


class Database:
    """Holds the tables of one connection. `create` and `fill` come first; the first `query` closes it to all writing.

    `read` holds the columns, as (table, column), that queries have used so far. Not for two threads at once, but
    the thread may change from call to call.
    """

    def __init__(self, *, time_limit: float = 2.0) -> None:
        self.time_limit = time_limit
        self.read: set[tuple[str, str]] = set()
        # A statement from the cache would not be authorised again, nor its columns remembered.
        self._connection = sqlite3.connect(
            ":memory:", isolation_level=None, check_same_thread=False, cached_statements=0
        )
        self._connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        self._sealed = False
        self._steps = 0
        self._until = 0.0

    def create(self, statement: str) -> None:
        """Make a table, by trusted SQL."""
        self._connection.execute(statement)

    def fill(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        """Insert rows into a table of a trusted name."""
        marks = ", ".join("?" * len(rows[0]))
        self._connection.executemany(f'INSERT INTO "{table}" VALUES ({marks})', rows)

    def query(self, sql: str, *, max_rows: int = 50) -> Result:
        """Return the first rows of one SELECT.

        Raises DataError, with the reason, for anything that is refused or fails.
        """
        if len(sql) > _MOST_LENGTH:
            raise DataError(f"the query has {len(sql):,} characters; at most {_MOST_LENGTH:,} are run")
        self._seal()
        self._steps, self._until = 0, time.monotonic() + self.time_limit
        try:
            cursor = self._connection.execute(sql)
            rows = cursor.fetchmany(max_rows + 1)
            columns = [column for column, *_ in cursor.description or ()]
            cursor.close()
        except sqlite3.OperationalError as error:
            if str(error) == "interrupted":
                raise DataError("the query takes too long; join on keys, and ask for less") from None
            raise DataError(str(error)) from None
        except sqlite3.DatabaseError as error:  # what the authorizer refuses is of this class
            refused = "not authorized" in str(error) or "prohibited" in str(error)
            raise DataError(f"{error}; only SELECT is allowed" if refused else str(error)) from None
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError) as error:
            raise DataError(str(error) or type(error).__name__) from None
        if not columns:
            raise DataError("that is no query; write one SELECT statement")
        return Result(columns, rows[:max_rows], len(rows) > max_rows)

    def close(self) -> None:
        self._connection.close()

    def _seal(self) -> None:
        if self._sealed:
            return
        self._sealed = True
        connection = self._connection
        connection.execute("PRAGMA query_only = ON")
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MOST_LENGTH)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.set_authorizer(self._authorize)
        connection.set_progress_handler(self._is_over, _EVERY)

    def _authorize(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action == sqlite3.SQLITE_READ:
            self.read.add((first or "", second or ""))
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION:
            return sqlite3.SQLITE_OK if (second or "").lower() in _FUNCTIONS else sqlite3.SQLITE_DENY
        return sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY

    def _is_over(self) -> bool:
        self._steps += _EVERY
        return self._steps > MOST_STEPS or time.monotonic() > self._until


_READING = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE)


def show(result: Result) -> str:
    """Write a result as text: the names, then one line for each row."""
    lines = [" | ".join(result.columns), *(" | ".join(map(_cell, row)) for row in result.rows)]
    if result.more:
        lines.append(f"[only the first {len(result.rows)} rows are shown]")
    elif not result.rows:
        lines.append("[no rows]")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    return f"x'{value.hex()}'" if isinstance(value, bytes) else str(value)


def quote(value: str | int | float) -> str:
    """Write a value as SQL does."""
    return str(value) if not isinstance(value, str) else "'" + value.replace("'", "''") + "'"
