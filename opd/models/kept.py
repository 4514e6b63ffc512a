"""What was worked out of a text, kept for the next time: each turn renders its whole conversation anew."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

MOST_CHARACTERS = 16_000_000


class KeptByText(Generic[T]):
    """Calls a function of a text (and of what else it depends on) once while its result is kept.

    What is kept is bounded by the characters of the texts, not by their number: results of tools may have megabytes.
    Those that were asked for longest ago go first. Threads may call it at once.
    """

    def __init__(self, work: Callable[..., T], most: int = MOST_CHARACTERS) -> None:
        self._work, self._most = work, most
        self._kept: OrderedDict[tuple[object, ...], T] = OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()

    def __call__(self, text: str, *others: object) -> T:
        """Return the result for `text` and the hashable `others`."""
        key = (text, *others)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        result = self._work(*key)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = result
                self._characters += _size(key)
            while self._characters > self._most:
                gone, _ = self._kept.popitem(last=False)
                self._characters -= _size(gone)
        return result


_ENTRY = 500
"""What an entry costs besides its text, in characters."""


def _size(key: tuple[object, ...]) -> int:
    return len(str(key[0])) + _ENTRY
