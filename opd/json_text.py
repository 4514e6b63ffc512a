"""Reading one JSON value that stands somewhere in a text, strictly, and in time that grows with its length."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any, NoReturn

MOST_DEPTH = 64
"""The deepest nesting of brackets: far beyond any tool's arguments, far below Python's recursion limit."""

# What may stand between strings and brackets (`json.loads` is stricter), then a string or a bracket. Possessive
# throughout, so that nothing is looked at twice. `<` is in neither: no tag can be read as a part of JSON.
_FILLER = re.compile(r"[\s\w,:.+-]*+")
_PIECE = re.compile(r'[\s\w,:.+-]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}])', re.DOTALL)


class JsonError(ValueError):
    """Raised where a text holds no JSON; `str(error)` says why."""

    def __init__(self, reason: str, *, at: int | None = None, extra: bool = False) -> None:
        super().__init__(reason)
        self.at = at
        """The place of the character that broke it, from 0; None where that is not known."""
        self.extra = extra
        """The value itself is whole: something stands behind it."""


def read_json(text: str, start: int) -> tuple[Any, int]:
    """Read the value that begins at `start` with a bracket or brace; return it and the position after it.

    Strict: no single quotes, comments, trailing commas, NaN, numbers beyond a float's range, or keys that stand
    twice in an object. One thing more than RFC 8259 is read: line breaks, tabs and other control characters inside
    strings, as they stand, since models write them and they mean nothing else. Raises JsonError.
    """
    # The extent first: the error of `json` takes time that grows with the whole text it was given.
    end = _extent(text, start)
    try:
        return _DECODER.decode(text[start:end]), end
    except ValueError as error:  # JSONDecodeError, our own, and an integer of more digits than Python converts
        raise JsonError(str(error)) from None


def parse_json(text: str) -> Any:
    """Return the value that a whole text holds, as strictly as `read_json`. Raises JsonError."""
    value, end = decode_at(text, len(text) - len(text.lstrip()))
    if rest := text[end:].lstrip():
        raise JsonError(f"column {len(text) - len(rest) + 1}: something stands behind it", at=end, extra=True)
    return value


def decode_at(text: str, at: int) -> tuple[Any, int]:
    """Return the value that begins at a place of a text of JSON, and the place behind it.

    Strict as `read_json`; whole numbers of more than 308 digits are refused too, since no float holds them. Raises
    JsonError.
    """
    try:
        value, end = _WHOLE_TEXTS.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise JsonError(f"column {error.colno}: {error.msg}", at=error.pos) from None
    except RecursionError:
        raise JsonError("it is nested too deeply") from None
    except ValueError as error:
        raise JsonError(str(error)) from None
    if text.count("[", at, end) + text.count("{", at, end) > MOST_DEPTH:
        _extent(text[at:end], 0)
    return value, end


def _extent(text: str, start: int) -> int:
    """Find the end of the brackets that open at `start`; else one past the character that breaks the value."""
    depth, at = 0, start
    while piece := _PIECE.match(text, at):
        at = piece.end()
        last = text[at - 1]
        if last in "[{":
            depth += 1
            if depth > MOST_DEPTH:
                raise JsonError("it is nested too deeply")
        elif last in "]}":
            depth -= 1
            if depth == 0:
                return at
    filler = _FILLER.match(text, at)
    return (at if filler is None else filler.end()) + 1


def each_once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its items, as `object_pairs_hook` of json. Raises ValueError for a key that stands twice."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {key[:80]!r} stands twice")
        made[key] = value
    return made


def _float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:20]} is out of range")
    return number


def _int(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"the number {digits[:20]}... of {len(digits):,} digits is out of range; write it as a text")
    return int(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=each_once, parse_float=_float, parse_constant=_refuse_constant, strict=False
)
_MOST_DIGITS = 308
_WHOLE_TEXTS = json.JSONDecoder(
    object_pairs_hook=each_once, parse_float=_float, parse_int=_int, parse_constant=_refuse_constant, strict=False
)
