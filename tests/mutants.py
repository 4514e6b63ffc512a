"""Files of rows that were well-formed once: a mutant is one of them, hurt in one or two ways that happen to files.

`mutant(number)` is the same file for the same number, always. The kinds of harm are those of disks and copies (bytes
flipped, cut, lines lost, doubled, joined), of other programs (encodings, line ends, archives, pages of errors in a
file's place), and of people (a field of another type, a key twice, a comma too many).
"""

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SUMS = [
    {"prompt": f"What is {n} + {n}, é?", "answer": str(2 * n), "proof": f"twice {n} is\n{2 * n}"} for n in range(24)
]
CHATS = [
    {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{n} + 1?"}], "answer": n + 1,
     "proof": "count on", "tests": [{"input": [n], "output": n + 1}]}
    for n in range(24)
]  # fmt: skip
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"place": "box"}'}}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}
TALKS = [
    {"messages": [{"role": "user", "content": f"Go on with {n}, né?"}, {"role": "assistant", "content": "ab the 1"},
                  {"role": "tool", "content": "ab"}, {"role": "assistant", "content": "in", "weight": n % 2}],
     "success": n % 3 > 0}
    for n in range(1, 12)
]  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    1.0,
    0.5,
    "",
    " ",
    "false",
    "True",
    "1",
    "NaN",
    "null",
    "007",
    "NA",
    "\x00",
    "\u2028",
    [],
    {},
    [[]],
    [None],
    [{}],
    {"a": 1},
    {"role": "user"},
    float("nan"),
    float("inf"),
    10**20,
    10**400,
    "\ud800",
    "x" * 60_000,
    [[[[[1]]]]],
    [{"role": "user", "content": "x"}],
    {"role": "user", "content": None},
)
ODD_BYTES = [
    *(
        text.encode()
        for text in ("\u2028", "\x85", "\x1c", "\x1e", "\x0c", "\r", "\n", "\x00", "\ufeff", "\x1b[31m", "\u202e")
    ),
    *(
        mark.encode()
        for mark in ('"', "'", ",", "{", "}", "[", "]", ":", "\\", "\\ud800", "NaN", "1e400", "//", "#", ";", "\t")
    ),
    *(b"\xe9", b"\xff", b"\xed\xa0\x80", b"[" * 5_000, b'{"a":' * 5_000, b"9" * 5_000),
]
PAGES = [
    *(b"", b"\n\n\n", b" ", b"null\n", b"[]", b"{}", b"[[]]", b"PAR1", b"PK\x03\x04rest", bytes(512), b"\xff\xfe"),
    *(b"\xef\xbb\xbf", b"prompt\n", b'{"prompt": "a"}\n', b"[1, 2]\n[3, 4]\n", b"Error: rate limit exceeded"),
    b"<!DOCTYPE html>\n<html><body>404 not found</body></html>\n",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
]


@dataclass(frozen=True)
class Mutant:
    """A file that was hurt: its bytes, its name's end, what reads it (`table` or `chat`), and what was done to it."""

    suffix: str
    kind: str
    data: bytes
    harm: str


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def _csv(rows: list[dict[str, Any]]) -> bytes:
    def cell(value: object) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return '"' + text.replace('"', '""') + '"' if set(text) & set('",\n') else text

    columns = list(rows[0])
    table = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    return "".join(",".join(map(cell, line)) + "\n" for line in table).encode("utf-8", "surrogatepass")


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    ".jsonl": _lines,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": _csv,
    ".parquet": _parquet,
}
FILES = [
    *((suffix, "table", SUMS) for suffix in WRITERS),
    *((suffix, "table", CHATS) for suffix in (".jsonl", ".json", ".parquet")),
    *((".jsonl", "chat", TALKS) for _ in range(3)),
]
"""The end of a name, what reads the file, and its rows."""


def well_formed(place: int) -> Mutant:
    """The file that mutants of that place were made of."""
    suffix, kind, rows = FILES[place]
    return Mutant(suffix, kind, WRITERS[suffix](rows), "none")


def mutant(number: int) -> Mutant:
    """The file of that number."""
    random = Random(number)
    suffix, kind, rows = FILES[number % len(FILES)]
    data, harm = _hurt_rows(random, suffix, rows) if random.random() < 0.4 else (WRITERS[suffix](rows), [])
    if not harm or random.random() < 0.3:
        data, other = _hurt_bytes(random, data)
        harm = [*harm, other]
    return Mutant(suffix, kind, data, ", ".join(harm))


def _hurt_rows(random: Random, suffix: str, rows: list[dict[str, Any]]) -> tuple[bytes, list[str]]:
    """Write rows of which one, or all, have something else in a field, or as JSON that is written otherwise."""
    rows = json.loads(json.dumps(rows))
    way = random.choice(("retype", "retype", "retype", "lose", "rename", "all", "form"))
    if way == "form":
        form = random.choice(list(FORMS))
        return FORMS[form](rows), [form]
    value = random.choice(ODD_VALUES)
    chosen = rows if way == "all" else [random.choice(rows)]
    steps = [random.random() for _ in range(6)]
    for row in chosen:
        holder, key = _field(row, list(steps))
        if way == "lose":
            del holder[key]
        elif way == "rename" and isinstance(holder, dict):
            holder[f"{key} "] = holder.pop(key)
        else:
            holder[key] = value
    try:
        return WRITERS[suffix](rows), [f"{way} {str(value)[:20]!a}"]
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):  # Parquet cannot hold it
        return _lines(rows), [f"{way} {str(value)[:20]!a} as lines"]


def _field(row: dict[str, Any], steps: list[float]) -> tuple[Any, Any]:
    """Choose a field of a row, or one within it."""
    holder: Any = row
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = keys[int(steps.pop() * len(keys))]
        if not steps or not isinstance(holder[key], dict | list) or not holder[key] or steps[-1] < 0.3:
            return holder, key
        holder = holder[key]


FORMS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "array": lambda rows: json.dumps(rows).encode(),
    "pretty": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows).encode(),
    "concatenated": lambda rows: "".join(map(json.dumps, rows)).encode(),
    "spaced": lambda rows: " ".join(map(json.dumps, rows)).encode(),
    "with commas": lambda rows: ",\n".join(map(json.dumps, rows)).encode(),
    "lists": lambda rows: "\n".join(json.dumps(list(row.values())) for row in rows).encode(),
    "list of lists": lambda rows: json.dumps([list(row.values()) for row in rows]).encode(),
    "columns": lambda rows: json.dumps({key: [row[key] for row in rows] for key in rows[0]}).encode(),
    "in data": lambda rows: json.dumps({"data": rows}).encode(),
    "repr": lambda rows: "\n".join(map(repr, rows)).encode(),
    "trailing commas": lambda rows: _lines(rows).replace(b"}\n", b",}\n"),
    "texts": lambda rows: "\n".join(json.dumps(json.dumps(row)) for row in rows).encode(),
    "semicolons": lambda rows: _csv(rows).replace(b",", b";"),
    "tabs": lambda rows: _csv(rows).replace(b",", b"\t"),
    "with index": lambda rows: b"\n".join(b"%d," % n + line for n, line in enumerate(_csv(rows).split(b"\n"))),
    "other": lambda rows: _csv(rows) if len(rows) % 2 else _parquet(rows),
    "keys twice": lambda rows: _lines(rows).replace(b'{"', b'{"prompt": "x", "messages": [], "', 1),
    "header twice": lambda rows: _csv(rows).split(b"\n")[0] + b"," + _csv(rows),
    "no rows": lambda rows: _csv(rows).split(b"\n")[0] + b"\n",
}


def _hurt_bytes(random: Random, data: bytes) -> tuple[bytes, str]:
    way = random.choice(list(HARMS))
    return HARMS[way](random, data), way


def _flip(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 3, 20)) if changed else 0):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


def _insert(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.choice(ODD_BYTES) + data[at:]


def _at_line(change: Callable[[list[bytes], int], object]) -> Callable[[Random, bytes], bytes]:
    def hurt(random: Random, data: bytes) -> bytes:
        lines = data.split(b"\n")
        change(lines, random.randrange(len(lines)))
        return b"\n".join(lines)

    return hurt


def _encode(name: str) -> Callable[[Random, bytes], bytes]:
    return lambda random, data: data.decode("utf-8", "replace").encode(name, "replace")


HARMS: dict[str, Callable[[Random, bytes], bytes]] = {
    "flip": _flip,
    "insert": _insert,
    "insert ": _insert,
    "cut": lambda random, data: data[: random.randrange(len(data) + 1)],
    "cut out": lambda random, data: data[: (at := random.randrange(len(data) + 1))] + data[at + random.randrange(9) :],
    "behead": lambda random, data: data[random.randrange(len(data) + 1) :],
    "drop line": _at_line(lambda lines, n: lines.pop(n)),
    "double line": _at_line(lambda lines, n: lines.insert(n, lines[n])),
    "join lines": _at_line(lambda lines, n: lines.__setitem__(slice(n, n + 2), [b"".join(lines[n : n + 2])])),
    "blank line": _at_line(lambda lines, n: lines.insert(n, b"  ")),
    "move line": _at_line(lambda lines, n: lines.append(lines.pop(n))),
    "twice": lambda random, data: data + data,
    "windows": lambda random, data: data.replace(b"\n", b"\r\n"),
    "old mac": lambda random, data: data.replace(b"\n", b"\r"),
    "mark": lambda random, data: b"\xef\xbb\xbf" + data,
    "latin": _encode("latin-1"),
    "utf-16": _encode("utf-16"),
    "utf-16-le": _encode("utf-16-le"),
    "utf-32": _encode("utf-32"),
    "utf-7": _encode("utf-7"),
    "gzip": lambda random, data: gzip.compress(data),
    "bzip2": lambda random, data: bz2.compress(data),
    "xz": lambda random, data: lzma.compress(data),
    "page": lambda random, data: random.choice(PAGES),
    "zeros": lambda random, data: data[: random.randrange(len(data) + 1)] + bytes(300),
}
