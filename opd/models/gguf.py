"""Reads what the header of a GGUF file says, without the package that reads its tensors."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

MAGIC = b"GGUF"
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The types of a value, by number, as `struct` names them."""
_TEXT, _ARRAY = 8, 9
_MOST_TEXT = 10_000_000
"""Bytes of the longest text that a header holds, a chat template; more is damage."""


def positions_of_gguf(file: Path) -> tuple[str, int] | None:
    """Return how many positions a model knows, after the name of the entry; None where the file does not say.

    It reads no further than that entry, which stands before the vocabulary.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(4) != MAGIC:
                return None
            _number(stream, "I")  # version
            _number(stream, "Q")  # tensors
            for _ in range(_number(stream, "Q")):
                key = _text(stream)
                value = _value(stream, _number(stream, "I"))
                if key.endswith(".context_length"):
                    return key, int(value)
    except (OSError, struct.error, UnicodeDecodeError, KeyError):
        return None
    return None


def _value(stream: BinaryIO, kind: int) -> Any:
    """Read a value; of an array of numbers, which is skipped, None."""
    if kind == _TEXT:
        return _text(stream)
    if kind != _ARRAY:
        return _number(stream, _NUMBERS[kind])
    inner, count = _number(stream, "I"), _number(stream, "Q")
    if inner in _NUMBERS:
        stream.seek(count * struct.calcsize(f"<{_NUMBERS[inner]}"), 1)
        return None
    for _ in range(count):
        _value(stream, inner)
    return None


def _text(stream: BinaryIO) -> str:
    length = _number(stream, "Q")
    if length > _MOST_TEXT:
        raise struct.error("the file is damaged")
    return stream.read(length).decode()


def _number(stream: BinaryIO, kind: str) -> Any:
    return struct.unpack(f"<{kind}", stream.read(struct.calcsize(f"<{kind}")))[0]
