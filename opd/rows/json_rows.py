"""Rows of JSON: an object a line (`.jsonl`, `.json`), or one array of objects (`.json`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd.errors import DataError
from opd.json_text import JsonError, decode_at, parse_json
from opd.rows.lines import numbered_lines, text_of

Row = dict[str, Any]
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")


def parse_row(text: str) -> Row:
    """Return the object that a line holds. Raises ValueError, which says what is wrong with it and what to do."""
    try:
        return checked_row(parse_json(text), text)
    except JsonError as error:
        raise ValueError(_explained(text.strip(), error)) from None


def checked_row(value: Any, text: str) -> Row:
    """Return a value that was read from a text, if it is a row. Raises ValueError else."""
    if not isinstance(value, dict):
        raise ValueError(f"a row must be a JSON object, not {_name(value)}{_mend(text, value)}")
    if _SURROGATE.search(text):  # a pair of them is a character
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"it holds a lone surrogate ({error.object[error.start]!a}), which is no text") from None
    return value


def read_lines(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the row of each line that is not blank, with its number. Raises DataError with the line."""
    for number, line in numbered_lines(path):
        if line.strip():
            try:
                yield number, parse_row(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {error}") from None


def read_array(path: Path) -> list[tuple[int, Row]] | None:
    """Return the objects of one JSON array, each with the line that it begins in; None where the file is no array.

    Raises DataError with the line.
    """
    text = text_of(path)
    if not text.lstrip().startswith("["):
        return None
    rows: list[tuple[int, Row]] = []
    counted, line = 0, 1
    try:
        for start, value, end in _items(text):
            line += text.count("\n", counted, start)
            counted = start
            rows.append((line, checked_row(value, text[start:end])))
    except _Misplaced as error:
        line = 1 + text.count("\n", 0, error.at)
        raise DataError(f"{path}, line {line}: {error}") from None
    except ValueError as error:
        raise DataError(f"{path}, line {line}, row {len(rows) + 1}: {error}") from None
    return rows


class _Misplaced(ValueError):
    def __init__(self, at: int, reason: str) -> None:
        super().__init__(reason)
        self.at = at


def _items(text: str) -> Iterator[tuple[int, Any, int]]:
    """Yield where each value of an array begins, the value, and where it ends. Raises ValueError with the place."""
    at = _skip(text, text.index("[") + 1)
    if text[at : at + 1] != "]":
        while True:
            yield (item := _item(text, at))
            at = _skip(text, item[2])
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise _Misplaced(at, _ENDLESS if at >= len(text) else "not JSON (a comma is missing between two rows)")
            at = _skip(text, at + 1)
            if text[at : at + 1] == "]":
                raise _Misplaced(at, "not JSON (a comma stands before the closing bracket)")
    if (rest := _skip(text, at + 1)) < len(text):
        raise _Misplaced(rest, "something stands behind the array. A .json file is one array, or an object a line")


def _item(text: str, at: int) -> tuple[int, Any, int]:
    if at >= len(text):
        raise _Misplaced(at, _ENDLESS)
    try:
        return (at, *decode_at(text, at))
    except JsonError as error:
        place = at if error.at is None else error.at
        raise _Misplaced(place, _ENDLESS if place >= len(text.rstrip()) else f"not JSON ({error})") from None


_ENDLESS = "not JSON (the array does not end: the file was cut, or a bracket is missing)"


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()


def _explained(text: str, error: JsonError) -> str:
    """Say what is wrong with a line that is no JSON, and the mend where the form of the file tells it."""
    if text.startswith("["):
        return f"not JSON ({error}): a row must be an object; an array over several lines is a .json file"
    if text.startswith("\ufeff"):
        return "a byte order mark stands in the middle of the file, where files were joined. Remove it"
    if not text.startswith("{"):
        return f"not JSON ({error}): a row must be a JSON object"
    if error.at is not None and error.at >= len(text):
        return f"not JSON ({error}): the object does not end on its line. Write each on one line, as json.dumps does"
    if error.at is not None and error.extra:
        rest = text[error.at :].lstrip()
        if rest.startswith("{"):
            return "a second object stands on the line. Write each on a line of its own"
        if rest == ",":
            return "a comma stands behind the object. Take it away, or make the file one array and let it end in .json"
    return f"not JSON ({error})"


def _name(value: Any) -> str:
    names = {list: "list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _mend(text: str, value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return ". An array of objects is a .json file: rename it"
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return ". It was written as JSON twice: write the object itself"
    return ""
