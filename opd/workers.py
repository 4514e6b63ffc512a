"""A pool of threads for calls that may hang: one that overruns its limit is given up, never waited for.

The standard executor joins its threads when the interpreter exits, so that one hung environment would keep
a finished run alive; these are daemon threads, and a lost one is replaced.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any


class Workers:
    """Runs calls concurrently; each key has at most one call at a time."""

    def __init__(self, size: int, *, time_limit: float) -> None:
        self.time_limit = time_limit
        self._jobs: queue.SimpleQueue[tuple[int, Callable[[], Any]]] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._key_of: dict[int, int] = {}  # ticket -> key, for every call that is not yet reported
        self._started: dict[int, float] = {}
        self._tickets = 0
        for _ in range(size):
            self._hire()

    def _hire(self) -> None:
        threading.Thread(target=self._work, name="opd-env", daemon=True).start()

    def _work(self) -> None:
        while True:
            ticket, call = self._jobs.get()
            self._started[ticket] = time.monotonic()
            try:
                result = call()
            except Exception as error:  # whatever an environment raises is an answer
                result = error
            self._results.put((ticket, result))
            if ticket not in self._key_of:
                return  # given up meanwhile, and replaced

    def start(self, key: int, call: Callable[[], Any]) -> None:
        """Queue a call; its result, or the exception it raised, comes out of `finished` under `key`."""
        self._tickets += 1
        self._key_of[self._tickets] = key
        self._jobs.put((self._tickets, call))

    def finished(self, *, wait: str) -> list[tuple[int, Any]]:
        """(key, result or exception) of calls that ended; a TimeoutError for each that overran.

        `wait`: "none" returns what is there, "any" waits for at least one, "all" for every open call.
        """
        done: list[tuple[int, Any]] = []
        while True:
            try:
                enough = wait == "none" or (wait == "any" and done) or not self._key_of
                ticket, result = self._results.get(block=not enough, timeout=0.2)
            except queue.Empty:
                done += self._overdue()
                if wait == "none" or (wait == "any" and done) or not self._key_of:
                    return done
                continue
            self._started.pop(ticket, None)
            key = self._key_of.pop(ticket, None)
            if key is not None:
                done.append((key, result))

    def _overdue(self) -> list[tuple[int, Any]]:
        now = time.monotonic()
        late = [t for t, since in list(self._started.items()) if t in self._key_of and now - since > self.time_limit]
        overdue: list[tuple[int, Any]] = []
        for ticket in late:
            self._started.pop(ticket, None)
            overdue.append((self._key_of.pop(ticket), TimeoutError(f"no answer within {self.time_limit:g} s")))
            self._hire()
        return overdue

    def close(self) -> None: ...
