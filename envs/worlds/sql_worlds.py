"""Describes what the look-up agent is asked about: small worlds, their tables, and questions with their queries.

Each world has a table of events, which point to two tables of things, which point to a table of what they belong
to. What the question calls a thing never changes, but what the database calls it is drawn for each task, so an
agent has to read the schema. Rows are drawn too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opd.envs.worlds.sql_database import Database, quote


@dataclass(frozen=True, slots=True)
class Column:
    """Describes a property: its name in questions, its names in databases, its values (words or a range of numbers)."""

    word: str
    names: tuple[str, ...]
    values: tuple[str, ...] | tuple[int, int]
    hows: tuple[str, ...] = ()
    """The aggregates that make sense: nobody asks for the total of ages."""

    @property
    def is_number(self) -> bool:
        return isinstance(self.values[0], int)


@dataclass(frozen=True, slots=True)
class Link:
    """Describes a column that points to the rows of another table. Its word says what the other row is to this one."""

    word: str
    table: str


@dataclass(frozen=True, slots=True)
class Table:
    """Describes a table: its word in questions (one, many), its names in databases, how many rows it has."""

    one: str
    many: str
    names: tuple[str, ...]
    rows: int
    columns: tuple[Column, ...]
    links: tuple[Link, ...] = ()
    titles: tuple[str, ...] = ()
    """The rows' own names, where they have such."""


_CITIES = ("Cairo", "Delhi", "Lima", "Oslo", "Paris", "Quito", "Rome", "Tokyo")
_COUNTRIES = ("Chile", "Egypt", "India", "Italy", "Japan", "Kenya")
_PEOPLE = (
    "Alice", "Ben", "Carla", "Diego", "Elena", "Felix", "Greta", "Hugo", "Ivan", "Judy", "Kate", "Liam", "Mona",
    "Nina", "Omar", "Paul", "Quinn", "Rosa",
)  # fmt: skip
_TOTAL = ("sum", "avg", "min", "max")
_SPREAD = ("avg", "min", "max")
_MONTH = Column("month", ("month", "month_no"), (1, 12))
_AGE = Column("age", ("age", "years_old"), (18, 80), _SPREAD)
_CITY = Table(
    "city", "cities", ("cities", "towns"), 6, (
        Column("country", ("country", "nation"), _COUNTRIES),
        Column("population", ("population", "inhabitants"), (100, 9000), _TOTAL),
    ), titles=_CITIES,
)  # fmt: skip

WORLDS: dict[str, dict[str, Table]] = {
    "shop": {
        "order": Table(
            "order", "orders", ("orders", "purchases"), 60,
            (Column("quantity", ("quantity", "amount"), (1, 20), _TOTAL), _MONTH),
            (Link("customer", "customer"), Link("product", "product")),
        ),
        "customer": Table(
            "customer", "customers", ("customers", "clients"), 14, (_AGE,), (Link("city", "city"),), _PEOPLE
        ),
        "product": Table(
            "product", "products", ("products", "articles"), 10, (
                Column("price", ("price", "unit_price"), (2, 90), _SPREAD),
                Column("kind", ("kind", "category"), ("food", "toy", "tool", "book")),
            ), (Link("maker", "maker"),),
            ("Lamp", "Kite", "Rope", "Drum", "Saw", "Cocoa", "Atlas", "Honey", "Puzzle", "Hammer", "Novel", "Robot"),
        ),
        "maker": Table(
            "maker", "makers", ("makers", "suppliers"), 4,
            (
                Column("country", ("country", "nation"), _COUNTRIES),
                Column("staff", ("staff", "employees"), (5, 400), _TOTAL),
            ),
            titles=("Acme", "Borealis", "Corvo", "Delta", "Elm", "Fjord"),
        ),
        "city": _CITY,
    },
    "library": {
        "loan": Table(
            "loan", "loans", ("loans", "borrowings"), 60,
            (Column("length in days", ("days", "duration_days"), (1, 40), _TOTAL), _MONTH),
            (Link("member", "member"), Link("book", "book")),
        ),
        "member": Table("member", "members", ("members", "readers"), 14, (_AGE,), (Link("city", "city"),), _PEOPLE),
        "book": Table(
            "book", "books", ("books", "volumes"), 10, (
                Column("number of pages", ("pages", "page_count"), (60, 900), _TOTAL),
                Column("genre", ("genre", "subject"), ("crime", "poetry", "travel", "history")),
            ), (Link("author", "author"),),
            ("Ashes", "Bridges", "Comets", "Dunes", "Echoes", "Ferns", "Gales", "Harbours", "Islands", "Jade", "Kelp"),
        ),
        "author": Table(
            "author", "authors", ("authors", "writers"), 4,
            (
                Column("country", ("country", "nation"), _COUNTRIES),
                Column("birth year", ("born", "birth_year"), (1900, 1990), ("min", "max")),
            ),
            titles=("Abel", "Brandt", "Costa", "Dumas", "Eco", "Frisch"),
        ),
        "city": _CITY,
    },
    "clinic": {
        "visit": Table(
            "visit", "visits", ("visits", "appointments"), 60,
            (Column("length in minutes", ("minutes", "duration_min"), (5, 90), _TOTAL), _MONTH),
            (Link("patient", "patient"), Link("doctor", "doctor")),
        ),
        "patient": Table(
            "patient", "patients", ("patients", "cases"), 14, (_AGE,), (Link("city", "city"),), _PEOPLE
        ),
        "doctor": Table(
            "doctor", "doctors", ("doctors", "physicians"), 10, (
                Column("salary", ("salary", "yearly_pay"), (40, 200), _TOTAL),
                Column("rank", ("rank", "grade"), ("junior", "senior", "chief")),
            ), (Link("ward", "ward"),),
            ("Adler", "Bauer", "Conti", "Dahl", "Eng", "Falk", "Gomez", "Haas", "Ito", "Jung", "Kraus"),
        ),
        "ward": Table(
            "ward", "wards", ("wards", "departments"), 4,
            (
                Column("floor", ("floor", "level"), (1, 6), ("min", "max")),
                Column("number of beds", ("beds", "bed_count"), (4, 60), _TOTAL),
            ),
            titles=("Cardiology", "Surgery", "Oncology", "Neurology", "Paediatrics"),
        ),
        "city": _CITY,
    },
}  # fmt: skip

NAME = Column("name", ("name", "label"), ())
Path = tuple[str, ...]
"""The words of the links from the table asked about to another."""


@dataclass(frozen=True, slots=True)
class Schema:
    """Describes how one database names and fills a world."""

    tables: dict[str, Table]
    names: dict[tuple[str, str], str]
    """Table and word (of a column, or of a link) -> the name in the database. An empty word gives the table's name."""

    def table(self, key: str) -> str:
        return self.names[key, ""]

    def column(self, key: str, word: str) -> str:
        return f"{self.table(key)}.{self.names[key, word]}"

    def at(self, base: str, path: Path) -> str:
        """Return the key of the table at the end of a path."""
        for word in path:
            base = next(link.table for link in self.tables[base].links if link.word == word)
        return base

    def statements(self) -> list[str]:
        """Write the tables in SQL."""
        return [self._statement(key, table) for key, table in self.tables.items()]

    def _statement(self, key: str, table: Table) -> str:
        columns = ["id INTEGER PRIMARY KEY"]
        if table.titles:
            columns.append(f"{self.names[key, NAME.word]} TEXT")
        columns += [f"{self.names[key, c.word]} {'INTEGER' if c.is_number else 'TEXT'}" for c in table.columns]
        columns += [
            f"{self.names[key, link.word]} INTEGER REFERENCES {self.table(link.table)}(id)" for link in table.links
        ]
        return f"CREATE TABLE {self.table(key)} ({', '.join(columns)})"


def draw_schema(rng: np.random.Generator, world: str) -> Schema:
    """Draw the names that a database of this world gives its tables and columns."""
    names: dict[tuple[str, str], str] = {}
    suffix = _pick(rng, ("_id", "_no", ""))
    for key, table in WORLDS[world].items():
        names[key, ""] = _pick(rng, table.names)
        for column in (*table.columns, *([NAME] if table.titles else [])):
            names[key, column.word] = _pick(rng, column.names)
        for link in table.links:
            names[key, link.word] = link.word + suffix
    return Schema(WORLDS[world], names)


def fill(database: Database, schema: Schema, rng: np.random.Generator) -> None:
    """Make the tables and draw their rows."""
    for statement in schema.statements():
        database.create(statement)
    for key, table in schema.tables.items():
        titles = rng.permutation(table.titles).tolist() if table.titles else []
        rows = []
        for number in range(1, table.rows + 1):
            row: list[Any] = [number, *titles[number - 1 : number]]
            row += [_draw_value(rng, column) for column in table.columns]
            row += [int(rng.integers(1, schema.tables[link.table].rows + 1)) for link in table.links]
            rows.append(row)
        database.fill(schema.table(key), rows)


def _draw_value(rng: np.random.Generator, column: Column) -> str | int:
    if column.is_number:
        low, high = column.values
        return int(rng.integers(int(low), int(high) + 1))
    return _pick(rng, tuple(str(value) for value in column.values))


def _pick(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


@dataclass(frozen=True, slots=True)
class Filter:
    """Describes a condition on a column of a table that a path leads to."""

    path: Path
    column: Column
    sign: str
    value: str | int

    def words(self) -> str:
        what = "'s ".join([*self.path, self.column.word])
        if self.sign == "=":
            return f"{what} is {self.value}"
        return f"{what} is {'at least' if self.sign == '>=' else 'at most'} {self.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Describes what is asked about the rows of one table."""

    base: str
    how: str
    """`count`, `sum`, `avg`, `min`, `max` (of a column), or `most` (which group has the most rows)."""
    column: Column | None
    group: Path = ()
    filters: tuple[Filter, ...] = field(default=())

    def joins(self) -> list[Path]:
        """List the paths to every table that has to be joined, shorter ones first."""
        ends = {self.group, *(f.path for f in self.filters)}
        return sorted({path[:n] for path in ends for n in range(1, len(path) + 1)}, key=lambda path: (len(path), path))

    def words(self, tables: dict[str, Table]) -> str:
        """Ask the question as a person does."""
        table = tables[self.base]
        those = f" whose {' and whose '.join(f.words() for f in self.filters)}" if self.filters else ""
        if self.how == "count":
            return f"How many {table.many} are there{those}?"
        if self.how == "most":
            return f"Which {self.group[-1]} has the most {table.many}{those}?"
        assert self.column is not None
        what = {"sum": "total", "avg": "average", "min": "smallest", "max": "largest"}[self.how]
        rounded = " Round to two decimals." if self.how == "avg" else ""
        return f"What is the {what} {self.column.word} of all {table.many}{those}?{rounded}"

    def query(self, schema: Schema) -> str:
        """Write the question in SQL."""
        return self._select(schema, self._selected(schema)) + (" LIMIT 1" if self.how == "most" else "")

    def group_sizes(self, schema: Schema) -> str:
        """Write, for `most`, a query for the number of rows in each group, largest first."""
        return self._select(schema, "COUNT(*)")

    def _select(self, schema: Schema, what: str) -> str:
        parts = [f"SELECT {what} FROM {schema.table(self.base)}", *self._join_parts(schema)]
        if self.filters:
            parts.append(f"WHERE {' AND '.join(self._condition(schema, f) for f in self.filters)}")
        if self.how == "most":
            parts.append(f"GROUP BY {schema.table(schema.at(self.base, self.group))}.id ORDER BY COUNT(*) DESC")
        return " ".join(parts)

    def plan(self, schema: Schema) -> str:
        """Put the query into words."""
        lines = [f"start from {schema.table(self.base)}"]
        lines += [f"join {part.removeprefix('JOIN ')}" for part in self._join_parts(schema)]
        lines += [f"keep {self._condition(schema, f)}" for f in self.filters]
        lines.append(
            f"group by {self._selected(schema)} and take the one with the most rows"
            if self.how == "most"
            else f"compute {self._selected(schema)}"
        )
        return "\n".join(lines)

    def needed(self, schema: Schema) -> set[tuple[str, str]]:
        """Return the columns, as (table, column), that no right query can do without."""
        words = [((*f.path,), f.column.word) for f in self.filters]
        if self.column is not None:
            words.append(((), self.column.word))
        if self.how == "most":
            words.append((self.group, NAME.word))
        keys = [(schema.at(self.base, path), word) for path, word in words]
        return {(schema.table(key), schema.names[key, word]) for key, word in keys}

    def _selected(self, schema: Schema) -> str:
        if self.how == "count":
            return "COUNT(*)"
        if self.how == "most":
            return schema.column(schema.at(self.base, self.group), NAME.word)
        assert self.column is not None
        inner = f"{self.how.upper()}({schema.column(self.base, self.column.word)})"
        return f"ROUND({inner}, 2)" if self.how == "avg" else inner

    def _join_parts(self, schema: Schema) -> list[str]:
        parts = []
        for path in self.joins():
            here, there = schema.at(self.base, path[:-1]), schema.at(self.base, path)
            parts.append(f"JOIN {schema.table(there)} ON {schema.column(here, path[-1])} = {schema.table(there)}.id")
        return parts

    def _condition(self, schema: Schema, f: Filter) -> str:
        return f"{schema.column(schema.at(self.base, f.path), f.column.word)} {f.sign} {quote(f.value)}"


def draw_question(
    rng: np.random.Generator, world: str, *, joins: int, filters: int, hows: Sequence[str]
) -> Question | None:
    """Draw a question of this shape; None where the draw does not fit."""
    tables = WORLDS[world]
    base = _pick(rng, tuple(tables))
    schema = Schema(tables, {})
    paths = list(_paths(schema, base))
    how = _pick(rng, hows)
    asked = [column for column in tables[base].columns if how in column.hows]
    column = asked[int(rng.integers(len(asked)))] if asked else None
    if (column is None) != (how in ("count", "most")) or (how == "most" and len(paths) == 1):
        return None
    groups = [path for path in paths if path]
    group = groups[int(rng.integers(len(groups)))] if how == "most" else ()
    drawn: list[Filter] = []
    for n in rng.permutation(len(paths))[:filters].tolist():
        key = schema.at(base, paths[n])
        known = [c for c in tables[key].columns if c is not column]
        if not known:
            return None
        chosen = known[int(rng.integers(len(known)))]
        sign = _pick(rng, (">=", "<=")) if chosen.is_number else "="
        drawn.append(Filter(paths[n], chosen, sign, _draw_bound(rng, chosen)))
    question = Question(base=base, how=how, column=column, group=group, filters=tuple(drawn))
    fits = len(question.joins()) == joins and all(f.path != group or how != "most" for f in drawn)
    return question if fits else None


def _paths(schema: Schema, base: str) -> Iterator[Path]:
    yield ()
    for link in schema.tables[base].links:
        for rest in _paths(schema, link.table):
            yield (link.word, *rest)


def _draw_bound(rng: np.random.Generator, column: Column) -> str | int:
    """Draw a word, or a number in the middle half of the range, rounded where it is large."""
    if not column.is_number:
        return _draw_value(rng, column)
    low, high = (int(value) for value in column.values)
    value = low + int((high - low) * rng.uniform(0.25, 0.75))
    return round(value, -2) if high - low > 1000 else value
