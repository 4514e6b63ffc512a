"""The console of a command: it may be closed, full or gone, and know few characters; the command goes on without it."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from opd.plain_text import LastingStream, printable
from opd.secrets import redact_log_records


@contextmanager
def lasting_console() -> Iterator[LastingStream]:
    """Let stdout and stderr last as long as the command does; yield stdout.

    Descriptors that were closed at the start are opened, so that no file of a run gets the number of one: what is
    printed would land in it. What other threads than the main one print (environments, say) may not steer the terminal.
    """
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    out, err = (LastingStream(_usable(stream), strict=_is_strangers) for stream in before)
    sys.stdout, sys.stderr = out, err
    records = logging.getLogRecordFactory()
    logging.setLogRecordFactory(_PlainRecord)
    redact_log_records()
    try:
        yield out
    finally:
        logging.setLogRecordFactory(records)
        for stream in (out, err):
            stream.flush()
            if stream.lost is not None:
                _let_go(stream.stream)
        sys.stdout, sys.stderr = before
        for stream in (out, err):
            if stream.stream not in before:
                stream.stream.close()


class _PlainRecord(logging.LogRecord):
    """A line of the log, which may hold what environments, tools and models said."""

    def getMessage(self) -> str:
        return printable(super().getMessage())


def _is_strangers() -> bool:
    """True for a thread that may run what is not ours."""
    return threading.current_thread() is not threading.main_thread()


def _open_closed_descriptors() -> None:
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            if null != number:
                os.dup2(null, number)
                os.close(null)


def _usable(stream: TextIO | None) -> TextIO:
    """Return a stream that can be written to: Python has none for a descriptor that was closed when it started."""
    if stream is None or stream.closed:
        return open(os.devnull, "w", encoding="utf-8")
    return stream


def _let_go(stream: TextIO) -> None:
    """Have what is left in a stream's buffers go nowhere: it must not fail once more when Python ends."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    with suppress(OSError, ValueError):
        stream.flush()
