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

_POLL = 0.2  # seconds between looks for calls that overran


class Workers:
    """Runs calls concurrently; each key has at most one call at a time. Used from one thread."""

    def __init__(self, size: int, *, time_limit: float) -> None:
        self.time_limit = time_limit
        self._size = size
        self._jobs: queue.SimpleQueue[tuple[int, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._key_of: dict[int, int] = {}  # ticket -> key, for every call that somebody still waits for
        self._started: dict[int, float] = {}  # ticket -> when, for every call that runs and is not given up
        self._tickets = 0
        for _ in range(size):
            self._hire()

    def _hire(self) -> None:
        threading.Thread(target=self._work, name="opd-env", daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            ticket, call = job
            self._started[ticket] = time.monotonic()
            try:
                result = call()
            except BaseException as error:  # whatever an environment raises is an answer, sys.exit() too
                result = error
            # Whoever takes the ticket away, this thread or `_overdue`, decides what becomes of the call.
            if self._started.pop(ticket, None) is None:
                return  # given up meanwhile, and replaced
            self._results.put((ticket, result))
            del job, call, result  # an idle thread must not keep the last environment alive

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
            enough = wait == "none" or (wait == "any" and done) or not self._key_of
            try:
                ticket, result = self._results.get(block=not enough, timeout=_POLL)
            except queue.Empty:
                done += self._overdue()
                if enough:
                    return done
                continue
            if ticket in self._key_of:
                done.append((self._key_of.pop(ticket), result))

    def forget(self) -> None:
        """Nobody waits any more for the calls that are still open: their results never come out."""
        self._key_of.clear()

    def close(self) -> None:
        """Let the threads go once they are idle; those that hang are daemons."""
        for _ in range(self._size):
            self._jobs.put(None)

    def _overdue(self) -> list[tuple[int, Any]]:
        now = time.monotonic()
        overdue: list[tuple[int, Any]] = []
        for ticket, since in self._started.copy().items():
            if now - since > self.time_limit and self._started.pop(ticket, None) is not None:
                self._hire()
                if ticket in self._key_of:
                    error = TimeoutError(f"no answer within {self.time_limit:g} s")
                    overdue.append((self._key_of.pop(ticket), error))
        return overdue
