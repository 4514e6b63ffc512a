"""What asks a run to end early: signals, and the time that it was given."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from opd.disk import write_whole

TIME_LIMIT = "train.max_hours"
NOT_FINISHED = 75
"""The exit code that asks a queue to start the run again: the time was up (EX_TEMPFAIL of sysexits.h)."""
EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": NOT_FINISHED, TIME_LIMIT: NOT_FINISHED}
"""The exit code of a run that ended early, by what asked for it; 128 and the number of a signal that ends a process."""
STOPPED = "stopped.json"
"""The file that says what ended a run early; a run that goes on removes it."""
_AGAIN = 1.0
"""Seconds after which another Ctrl-C is one of its own: launchers pass the first one on to every process."""


@dataclass(slots=True)
class Stops:
    """True once the run is to end: a signal came, or its time is up."""

    until: float = float("inf")
    """When the time is up, by `time.monotonic()`."""
    received: list[str] = field(default_factory=list)
    """The names of the signals that came so far."""
    since: float = 0.0
    """When the first of them came."""

    def __bool__(self) -> bool:
        return self.reason is not None

    @property
    def reason(self) -> str | None:
        """The name of what asks for the end; None while nothing does."""
        if self.received:
            return self.received[0]
        return TIME_LIMIT if time.monotonic() >= self.until else None

    def note(self, number: int, frame: FrameType | None) -> None:
        """Take a signal. Raises KeyboardInterrupt for another Ctrl-C: it means now."""
        again, now = bool(self.received), time.monotonic()
        self.received.append(signal.Signals(number).name)
        if not again:
            self.since = now
            with suppress(OSError, ValueError, RuntimeError):  # the console may be gone, or in the middle of a line
                print("stopping: the run is saved; Ctrl-C stops it at once", file=sys.stderr, flush=True)
        elif number == signal.SIGINT and now - self.since > _AGAIN:
            raise KeyboardInterrupt


@contextmanager
def stop_signals(seconds: float = float("inf")) -> Iterator[Stops]:
    """Collect SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C, and the end of the time, in what is yielded.

    SIGHUP and SIGUSR1 that are ignored (nohup) stay so. In a thread that is not the main one no signal is collected:
    whoever runs the main thread decides about them.
    """
    stops = Stops(until=time.monotonic() + seconds)
    ignored = {n for n in (signal.SIGHUP, signal.SIGUSR1) if signal.getsignal(n) is signal.SIG_IGN}
    wanted = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1} - ignored
    try:
        previous = {number: signal.signal(number, stops.note) for number in wanted}
    except ValueError:  # not the main thread
        yield stops
        return
    try:
        yield stops
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def write_stop(out: Path, reason: str, *, step: int, steps: int, saved: int | None) -> None:
    """Write down what ended the run in the folder `out` after `step` of its `steps`; `saved` is that of its last
    checkpoint."""
    told = {
        "by": reason,
        "exit_code": EXIT_CODES[reason],
        "step": step,
        "steps": steps,
        "checkpoint": None if saved is None else f"checkpoints/step-{saved}",
        "resume": f"opd train {out} --resume" + ("" if saved else " auto"),
    }
    write_whole(out / STOPPED, json.dumps(told, indent=1) + "\n")
