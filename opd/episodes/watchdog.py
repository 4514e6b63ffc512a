"""Runs a thread that says what a round waits for, when nothing has happened for long."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType

logger = logging.getLogger(__name__)


class Watchdog:
    """Logs `describe()` once for each `interval` without `progress()`. Use it as a context around what may stall."""

    def __init__(self, interval: float, describe: Callable[[], str]) -> None:
        self._interval = interval
        self._describe = describe
        self._over = threading.Event()
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="opd-watchdog", daemon=True)

    def progress(self) -> None:
        """Note that something has ended that others may have waited for."""
        self._last = time.monotonic()

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        wait = self._interval
        while not self._over.wait(wait):
            idle = time.monotonic() - self._last
            intervals = int(idle / self._interval)
            if intervals:
                logger.warning("nothing has finished for %.0f s; waiting for %s", idle, self._describe())
            wait = (intervals + 1) * self._interval - idle
