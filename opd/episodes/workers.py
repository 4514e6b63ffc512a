"""Keeps a pool of threads for calls that may hang: one that overruns its limit is given up, never waited for.

The standard executor joins its threads when the interpreter exits, so that one hung environment would keep
a finished run alive; these are daemon threads, and a lost one is replaced.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opd.errors import Interrupted
from opd.grading import listening

_POLL = 0.2  # seconds between looks for calls that overran


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeLimits:
    """Holds the seconds that a call may take; what it spends on grading (`opd.grading`) counts apart."""

    call: float
    grading: float
    name: str = "the limit"
    """The setting that `call` comes from, for the message."""


@dataclass(slots=True, kw_only=True)
class _Job:
    """Holds a call and its clock, which shows what it does now: the call itself, or grading."""

    key: int
    call: Callable[[], Any]
    limits: TimeLimits
    give_up: Callable[[], None]
    since: float = 0.0
    grades: bool = False
    spent: float = 0.0
    """Seconds of the call itself before it began to grade."""

    def begin(self) -> None:
        self.since = time.monotonic()

    def grading(self, begins: bool) -> None:
        now = time.monotonic()
        if begins:
            self.spent = now - self.since
        self.since, self.grades = (now if begins else now - self.spent), begins

    def overrun(self, now: float) -> str | None:
        """Say what took too long; None if nothing did."""
        limits = self.limits
        limit, name = (limits.grading, "rollout.grading_timeout") if self.grades else (limits.call, limits.name)
        return f"no answer within {limit:g} s ({name})" if now - self.since > limit else None


class Workers:
    """Runs calls concurrently; each key has at most one call at a time. One thread alone may use it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._jobs: queue.SimpleQueue[tuple[int, _Job] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._key_of: dict[int, int] = {}  # ticket -> key, for every call that somebody still waits for
        self._running: dict[int, _Job] = {}  # by ticket: every call that runs and is not given up
        self._tickets = 0
        for _ in range(size):
            self._hire()

    def _hire(self) -> None:
        threading.Thread(target=self._work, name="opd-env", daemon=True).start()

    def _work(self) -> None:
        process = os.getpid()
        while (taken := self._jobs.get()) is not None:
            ticket, job = taken
            job.begin()
            self._running[ticket] = job
            try:
                with listening(job.grading):
                    result = job.call()
            except BaseException as error:  # whatever an environment raises is an answer, sys.exit() too
                result = error
            if os.getpid() != process:  # the environment has forked, and this is the other one: it has no run to go on
                os._exit(1)
            # Whoever takes the ticket away, this thread or `_overdue`, decides what becomes of the call.
            if self._running.pop(ticket, None) is None:
                return  # given up meanwhile, and replaced
            self._results.put((ticket, result))
            del taken, job, result  # an idle thread must not keep the last environment alive

    def start(
        self, key: int, call: Callable[[], Any], *, limits: TimeLimits, give_up: Callable[[], None] = lambda: None
    ) -> None:
        """Queue a call. Its result, or the exception it raised, comes out of `finished` under `key`.

        Should it overrun, `give_up` is called (to kill a process, say) and a TimeoutError comes out.
        """
        self._tickets += 1
        self._key_of[self._tickets] = key
        self._jobs.put((self._tickets, _Job(key=key, call=call, limits=limits, give_up=give_up)))

    def finished(self, *, wait: str, stopped: Callable[[], bool] = lambda: False) -> list[tuple[int, Any]]:
        """Return (key, result or exception) of calls that ended, and a TimeoutError for each that overran.

        `wait`: "none" returns what is there, "any" waits for at least one, "all" for every open call. Raises
        Interrupted once `stopped` holds while it waits.
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
                if stopped():
                    raise Interrupted from None
                continue
            if ticket in self._key_of:
                done.append((self._key_of.pop(ticket), result))

    def running(self) -> dict[int, str]:
        """Say what each call that runs at the moment does, by key: "call" or "grading". Any thread may call this."""
        jobs = self._running.copy().items()
        return {job.key: "grading" if job.grades else "call" for ticket, job in jobs if ticket in self._key_of}

    def forget(self) -> None:
        """Forget the calls that are still open: nobody waits for them any more, and their results never come out."""
        self._key_of.clear()

    def close(self) -> None:
        """Let the threads go once they are idle; those that hang are daemons."""
        for _ in range(self._size):
            self._jobs.put(None)

    def _overdue(self) -> list[tuple[int, Any]]:
        now = time.monotonic()
        overdue: list[tuple[int, Any]] = []
        for ticket, job in self._running.copy().items():
            late = job.overrun(now)
            if late is not None and self._running.pop(ticket, None) is not None:
                self._hire()
                job.give_up()
                if ticket in self._key_of:
                    overdue.append((self._key_of.pop(ticket), TimeoutError(late)))
        return overdue
