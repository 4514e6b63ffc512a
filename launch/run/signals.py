"""Signals that end a run early, after the step at hand."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and the first Ctrl-C in the list that is yielded, so that the step at hand is finished and saved.

    A second signal raises KeyboardInterrupt. In a thread that is not the main one nothing is collected: whoever runs
    the main thread decides about signals.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt  # a second one means now
        received.append(number)
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    try:
        previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
