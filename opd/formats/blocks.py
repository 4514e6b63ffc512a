"""Reading the calls that stand between a family's markers, and answering those that cannot be read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from opd.formats.bodies import Body
from opd.formats.form import Block, Format
from opd.formats.reply import MalformedCall
from opd.formats.source import CallError, Calls, Source


@dataclass(frozen=True)
class Marks:
    """The markers of a format, as patterns and sets."""

    all: re.Pattern[str]
    """Any marker that opens a call or a frame, or opens or closes a thought."""
    calls: re.Pattern[str] | None
    """Any marker that opens a call or a frame."""
    thought_end: re.Pattern[str]
    wrappers: re.Pattern[str] | None
    thoughts: dict[str, str]
    """From the opening marker of a thought to the closing one."""
    outer: tuple[str, ...]
    """What may follow a call that nothing closes."""


@cache
def marks_of(form: Format) -> Marks:
    openers = [*(opener for opener, _ in form.frame), *(block.opener for block in form.blocks if not block.framed)]
    thoughts = [marker for pair in form.thought for marker in pair]
    return Marks(
        all=_any_of([*openers, *thoughts]),
        calls=_any_of(openers) if openers else None,
        thought_end=_any_of([closer for _, closer in form.thought]),
        wrappers=_any_of(form.wrappers) if form.wrappers else None,
        thoughts=dict(form.thought),
        outer=(*openers, *thoughts, *(closer for _, closer in form.frame)),
    )


@cache
def literal(marker: str) -> re.Pattern[str]:
    return re.compile(re.escape(marker))


def _any_of(markers: Iterable[str]) -> re.Pattern[str]:
    """A pattern of any of the markers, the longest first; a look at one character spares most positions the rest."""
    longest_first = sorted(dict.fromkeys(markers), key=len, reverse=True)
    firsts = "".join(re.escape(first) for first in sorted({marker[0] for marker in longest_first}))
    return re.compile(f"(?=[{firsts}])(?:{'|'.join(map(re.escape, longest_first))})")


class CallReader:
    """Reads the calls of one text. Its methods take the position to read from and return where to go on."""

    def __init__(self, source: Source, names: frozenset[str]) -> None:
        self.source = source
        self.text = source.text
        self.names = names
        self.calls: Calls = []
        self.end = 0
        """The position behind the last call."""

    def forget(self) -> None:
        """Drop what was read: it turned out to be a thought."""
        self.calls, self.end = [], 0

    def block(self, form: Format, at: int, *, framed: bool = False) -> Block | None:
        """The block whose opening marker stands at `at`, and whose body begins as it must."""
        for block in form.blocks:
            if self.text.startswith(block.opener, at) and (framed or not block.framed):
                start = block.starts.match(self.text, at + len(block.opener)) if block.starts else None
                offered = start.groupdict().get("offered") if start else None
                if (start or not block.starts) and (offered is None or offered in self.names):
                    return block
        return None

    def read_frame(self, form: Format, at: int, closer: str) -> int:
        """Read the calls of a frame; what else stands between them is answered as a malformed call."""
        before = len(self.calls)
        while True:
            at = self.source.skip_space(at)
            if self.text.startswith(closer, at) and len(self.calls) > before:
                self.end = at + len(closer)
                return self.end
            if block := self.block(form, at, framed=True):
                at = self.read_block(form, block, at + len(block.opener))
            elif len(self.calls) > before and (at == len(self.text) or self.text.startswith(marks_of(form).outer, at)):
                return at
            else:
                error = f"there is something else than tool calls before {closer}; write {form.example}"
                return self._refuse(form, error, at, closer)

    def read_block(self, form: Format, block: Block, start: int) -> int:
        """Read what follows the opening marker of a call."""
        if not (block.closer and block.must_close):
            return self.read_open(form, block.body, block.example, start, block.closer)
        not_closed = f"the tool call is not closed by {block.closer}"
        if self.source.find(literal(block.closer), start) is None:
            return self._refuse(form, not_closed, start, block.closer)
        try:
            calls, end = block.body.read(self.source, start, block.example)
        except CallError as error:
            return self._refuse(form, str(error), start if error.at is None else error.at, block.closer)
        if self.source.holds(block.closer, end):
            return self._take(calls, self.source.skip_space(end) + len(block.closer))
        if self.source.holds(block.opener, end):
            return self._take([MalformedCall(error=not_closed)], end)
        return self._refuse(form, _more("the object", block.example), end, block.closer)

    def read_open(self, form: Format, body: Body, example: str, start: int, closer: str = "") -> int:
        """Read calls that need no closing marker: nothing but a marker may follow them."""
        try:
            calls, end = body.read(self.source, start, example)
        except CallError as error:
            return self._refuse(form, str(error), start if error.at is None else error.at, closer)
        after = self.source.skip_space(end)
        if closer and self.text.startswith(closer, after):
            return self._take(calls, after + len(closer))
        if after == len(self.text) or self.text.startswith(marks_of(form).outer, after):
            return self._take(calls, end)
        return self._refuse(form, _more("the call", example), end, closer)

    def _take(self, calls: Calls, end: int) -> int:
        self.calls += calls
        self.end = end
        return end

    def _refuse(self, form: Format, error: str, at: int, closer: str = "") -> int:
        """Note a call that cannot be read and go on behind it, or at the end of the thought or frame it is part of.

        Only markers tell where that is; without them it is the end of the text.
        """
        stops = [
            marks_of(form).thought_end,
            *(literal(frame_end) for _, frame_end in form.frame if frame_end != closer),
        ]
        ends = [stop.start() for pattern in stops if (stop := self.source.find(pattern, at))]
        if closer and (close := self.source.find(literal(closer), at)):
            ends.append(close.end())
        return self._take([MalformedCall(error=error)], min([len(self.text), *ends]))


def _more(what: str, example: str) -> str:
    return f"the tool call is not valid JSON (there is more after {what}); write {example}"
