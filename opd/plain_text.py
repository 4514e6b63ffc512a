"""Text of strangers as it may be shown: what would steer a terminal is written out.

Environments, tools, models and tasks may say anything: escape codes that colour, move, retitle or fill a clipboard, a
return that overwrites a line, marks that turn the direction of reading. Files keep them, as JSON writes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, TextIO

_STEERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufff9-\ufffb\ud800-\udfff]"
)
"""Control characters of both kinds but for tab and line feed, marks of direction, separators of lines, lone halves."""
_OWN = re.compile("\r|\x1b\\[(?:[0-9;]{0,20}m|[0-9]{0,3}A)")
"""What programs of ours write to a terminal: a bar that is drawn anew, and colours."""


def printable(text: str) -> str:
    r"""Return a text as a terminal may show it: what would steer it stands there as Python writes it, `\x1b`.

    >>> printable("a\x1b[2Jb\n")
    'a\\x1b[2Jb\n'
    """
    return _STEERS.sub(lambda found: ascii(found[0])[1:-1], text)


def drawable(text: str) -> str:
    """Return a text with a character of width one in place of each that would steer a terminal."""
    return _STEERS.sub("\ufffd", text)


class LastingStream:
    """Writes to a stream of the console, which may go away, and lets nothing through that would steer a terminal.

    What the stream does not take (nobody reads it, its disk is full, it was closed) is dropped from then on. Characters
    that it has no bytes for are written out. All else is the stream's own.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        strict: Callable[[], bool] = lambda: True,
    ) -> None:
        """Wrap a stream. Where `strict()` is false, colours and the codes of progress bars are let through."""
        self.stream = stream
        self.lost: Exception | None = None
        """Why nothing more is written; None while it is."""
        self.say: Callable[[str], object] = lambda _: None
        """Is told once why nothing more is written."""
        self._strict = strict
        with suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        """Write a text, as far as it goes; return its length."""
        plain = printable(text) if self._strict() else _but_for(_OWN, text)
        self.attempt(lambda: self.stream.write(plain))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand what is buffered over."""
        self.attempt(self.stream.flush)

    def close(self) -> None:
        """Stay open: the console is the whole process's."""

    def as_it_is(self) -> _AsItIs:
        """Return the same stream for what draws on the terminal, and has made its texts drawable itself."""
        return _AsItIs(self)

    @property
    def closed(self) -> bool:
        """Always False."""
        return False

    def attempt(self, work: Callable[[], object]) -> None:
        """Do something with the stream; write nothing more once that fails."""
        if self.lost is not None:
            return
        try:
            work()
        except (OSError, ValueError) as error:
            self.lost = error
            self.say(str(error))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _AsItIs:
    """Writes to a lasting stream whatever it is given."""

    def __init__(self, lasting: LastingStream) -> None:
        self.lasting = lasting

    def write(self, text: str) -> int:
        self.lasting.attempt(lambda: self.lasting.stream.write(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lasting, name)


def _but_for(kept: re.Pattern[str], text: str) -> str:
    """Make a text printable but for what a pattern finds."""
    pieces, at = [], 0
    for found in kept.finditer(text):
        pieces += [printable(text[at : found.start()]), found[0]]
        at = found.end()
    return "".join([*pieces, printable(text[at:])])
