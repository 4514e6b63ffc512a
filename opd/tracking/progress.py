"""How far the work at hand has come, in words, and a thread that asks for a line now and then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Progress:
    """So many of so many, since when."""

    clock: Callable[[], float]
    what: str = "episodes"
    done: int = 0
    total: int | None = None
    """None: not known."""
    since: float = 0.0

    def begin(self) -> None:
        """Start to count anew."""
        self.what, self.done, self.total, self.since = "episodes", 0, None, self.clock()

    def expect(self, more: int | None, what: str) -> None:
        """Note that so many more are to come; None: nobody knows how many."""
        if what != self.what:
            self.begin()
        self.what, self.total = what, None if more is None else self.done + more

    @property
    def seconds(self) -> float:
        """The seconds since the count began."""
        return self.clock() - self.since

    def in_words(self, span: Callable[[float], str]) -> str:
        """Say how many are done, how fast, and how long the rest takes, with durations as `span` writes them."""
        if not self.done and self.total is None:
            return f"{span(self.seconds)} so far"
        of = f" of {self.total:,}" if self.total is not None else ""
        counted = f"{self.done:,}{of} {self.what}"
        if not self.done or self.total is None or self.done >= self.total or self.seconds <= 0:
            return f"{counted}, {span(self.seconds)} so far"
        rate = self.done / self.seconds
        return f"{counted}, {rate:.3g}/s, {span((self.total - self.done) / rate)} left"


class Ticker:
    """Calls `tick` once a second on a thread, until it is closed."""

    def __init__(self, tick: Callable[[], None], *, seconds: float = 1.0) -> None:
        self._over = threading.Event()

        def run() -> None:
            while not self._over.wait(seconds):
                tick()

        self._thread = threading.Thread(target=run, name="opd-console", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, and wait for what it does at the moment."""
        self._over.set()
        self._thread.join()
