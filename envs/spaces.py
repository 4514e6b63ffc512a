"""Defines a gymnasium space of text. gymnasium's own `Text` refuses spaces, accents and empty strings by default."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from gymnasium import Space

# What parsers, prompts and encoders trip over: white space, quotes, tags, braces, accents, a combining
# mark, right-to-left text, wide characters, an emoji outside the basic plane, and NUL.
_ALPHABET = tuple("aZ09 \n\t.,-_\"'`\\/<>{}[]()|&%$#é\u0301ßñЖאع漢字한😀\0")
_SAMPLE_LENGTH = 64
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{6,16}(?=[>,;]| state=| length=)")


class TextSpace(Space[str]):
    """Holds every unicode string of at most `max_length` characters that UTF-8 can encode; the empty one too.

    A lone surrogate (half of an emoji, such as JSON's escape `\\ud83d` yields) is no text: no tokenizer and no
    file takes it. Samples are short, however large `max_length` is.
    """

    def __init__(self, max_length: int = 1_000_000, *, seed: int | np.random.Generator | None = None) -> None:
        if max_length < 0:
            raise ValueError(f"max_length = {max_length} must be 0 or more (characters)")
        self.max_length = max_length
        super().__init__(shape=None, dtype=str, seed=seed)

    def sample(self, mask: Any | None = None, probability: Any | None = None) -> str:
        """Draw a random string of at most 64 characters. Raises ValueError for a mask: text has no finite one."""
        if mask is not None or probability is not None:
            raise ValueError("TextSpace.sample takes neither a mask nor a probability")
        length = self.np_random.integers(0, min(self.max_length, _SAMPLE_LENGTH), endpoint=True)
        return "".join(_ALPHABET[i] for i in self.np_random.integers(0, len(_ALPHABET), size=length))

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length and clean(x) == x

    @property
    def is_np_flattenable(self) -> bool:
        return False

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, TextSpace) and self.max_length == other.max_length

    def __hash__(self) -> int:
        return hash((TextSpace, self.max_length))

    def __repr__(self) -> str:
        return f"TextSpace(max_length={self.max_length})"


def clean(text: str) -> str:
    """Replace every lone surrogate by `?`, so that UTF-8 can encode the text."""
    return text.encode("utf-8", "replace").decode("utf-8")


def without_addresses(text: str) -> str:
    """Leave out the memory addresses that Python writes for objects without words of their own.

    `<Box object at 0x7f3a5c01d2b0>` becomes `<Box object>`: an address differs from run to run, and a prompt that
    holds one would make a run no function of its seed.
    """
    return _ADDRESS.sub("", text) if " at 0x" in text else text
