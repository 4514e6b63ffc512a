"""Values that are not JSON: Python's literals, and those of Gemma. Nothing is evaluated, and no text is read twice."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opd.formats.source import CallError, Source
from opd.json_text import MOST_DEPTH

_WORD = re.compile(r"[+-]?[\w.]++(?:(?<=[eE])[+-]\d++)?+")
_INTEGER = re.compile(r"[+-]?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][+-]?[0-9]+)?")
_CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How a family spells strings and keys; its numbers, constants, lists and objects are like Python's or JSON's."""

    string: re.Pattern[str]
    """A whole string, whose text is the group `text`."""
    unescape: Callable[[str], str] | None = None
    """Resolves the escapes of a string's text. Raises ValueError. None: there are none."""
    key: re.Pattern[str] | None = None
    """A key that is written without quotes, as group 1, together with its colon; None where keys are strings."""


def read_value(source: Source, at: int, spelling: Spelling, depth: int = 0) -> tuple[Any, int]:
    """Read one value; return it and where it ends. Raises CallError."""
    at = source.skip_space(at)
    if depth > MOST_DEPTH:
        raise CallError("it is nested too deeply")
    if string := spelling.string.match(source.text, at):
        return _text(string, spelling), string.end()
    opening = source.text[at : at + 1]
    if opening == "[":
        return _read_list(source, at + 1, spelling, depth)
    if opening == "{":
        return read_object(source, at + 1, spelling, depth)
    word = _WORD.match(source.text, at)
    if word is None:
        raise CallError(f"there is no value at {_quote(source, at)}")
    return _plain(word[0]), word.end()


def read_object(source: Source, at: int, spelling: Spelling, depth: int = 0) -> tuple[dict[str, Any], int]:
    """Read what follows the opening brace of an object; return it and where it ends. Raises CallError."""
    made: dict[str, Any] = {}
    while not source.holds("}", at):
        key, at = _read_key(source, source.skip_space(at), spelling)
        if key in made:
            raise CallError(f"the key {key[:80]!r} stands twice")
        made[key], at = read_value(source, at, spelling, depth + 1)
        at = _next(source, at, "}")
    return made, source.skip_space(at) + 1


def _read_list(source: Source, at: int, spelling: Spelling, depth: int) -> tuple[list[Any], int]:
    made: list[Any] = []
    while not source.holds("]", at):
        value, at = read_value(source, at, spelling, depth + 1)
        made.append(value)
        at = _next(source, at, "]")
    return made, source.skip_space(at) + 1


def _read_key(source: Source, at: int, spelling: Spelling) -> tuple[str, int]:
    if string := spelling.string.match(source.text, at):
        after = source.skip_space(string.end())
        if source.text.startswith(":", after):
            return _text(string, spelling), after + 1
    elif spelling.key is not None and (key := spelling.key.match(source.text, at)):
        return key[1].strip(), key.end()
    raise CallError(f"there is no key with a colon at {_quote(source, at)}")


def _next(source: Source, at: int, closing: str) -> int:
    """Return where the next item begins, or the closing bracket stands. Raises CallError."""
    at = source.skip_space(at)
    if source.text.startswith(closing, at):
        return at
    if source.text.startswith(",", at):
        return at + 1
    raise CallError(f"a comma or {closing} is missing at {_quote(source, at)}")


def _text(string: re.Match[str], spelling: Spelling) -> str:
    text = next((group for group in string.groups() if group is not None), "")
    if spelling.unescape is None:
        return text
    try:
        return spelling.unescape(text)
    except ValueError as error:
        raise CallError(str(error)) from None


def _plain(word: str) -> Any:
    """The number or constant that a word spells. Raises CallError."""
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    try:
        if _INTEGER.fullmatch(word):
            return int(word)
        if _FLOAT.fullmatch(word) and math.isfinite(number := float(word)):
            return number
    except ValueError:  # more digits than Python converts
        pass
    raise CallError(f"{word[:40]!r} is no string, number, true, false, null, list or object")


def _quote(source: Source, at: int) -> str:
    here = source.text[at : at + 20]
    return repr(here) if here else "its end"


_ESCAPE = re.compile(r"\\(\r\n|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|.)", re.DOTALL)
_ESCAPES = {
    **dict.fromkeys(("\n", "\r\n"), ""),
    **dict(zip("\\'\"abfnrtv", "\\'\"\a\b\f\n\r\t\v", strict=True)),
}


def unescape_python(text: str) -> str:
    """Resolve the escapes of a string as Python does. Raises ValueError for one that is incomplete, and for names."""
    return _ESCAPE.sub(_character, text)


def _character(escape: re.Match[str]) -> str:
    code = escape[1]
    if code in _ESCAPES:
        return _ESCAPES[code]
    if code in ("x", "u", "U", "N"):
        raise ValueError(f"the escape \\{code} in a string cannot be read")
    if code[0] in "xuU":
        return chr(int(code[1:], 16))
    return chr(int(code, 8)) if code[0] in "01234567" else escape[0]


PYTHON = Spelling(
    string=re.compile(
        r"'''((?:[^'\\]|\\.|'(?!''))*+)'''"
        r'|"""((?:[^"\\]|\\.|"(?!""))*+)"""'
        r"|'([^'\\]*+(?:\\.[^'\\]*+)*+)'"
        r'|"([^"\\]*+(?:\\.[^"\\]*+)*+)"',
        re.DOTALL,
    ),
    unescape=unescape_python,
)
