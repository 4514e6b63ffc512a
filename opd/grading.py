"""Holds the clock of grading: what scores an episode may take longer than a step, and has a limit of its own.

Whoever runs an environment's calls under a time limit listens; whoever grades says when that begins and ends.
Where nobody listens (an environment used by itself) `grading` does nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

Listener = Callable[[bool], None]
"""Told True when grading begins on its thread, and False when it ends."""

_here = threading.local()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """Says where the trainer stands that plays an environment, whose `trained_by` is told so before each reset."""

    step: int = 0
    """Steps that the student's weights have seen."""
    steps: int = 0
    """Steps of the run's stage; 0 where it is not said."""


MOST_REASONS = 100
"""Reasons that are kept of one call of an environment."""
_noted: ContextVar[list[str] | None] = ContextVar("opd_ungraded", default=None)


def note_ungraded(reason: str) -> None:
    """Take note that a grader had no result for a text, and why, where somebody wants to know (`noting`)."""
    noted = _noted.get()
    if noted is not None and len(noted) < MOST_REASONS:
        noted.append(reason)


@contextmanager
def noting() -> Iterator[list[str]]:
    """Collect the reasons that are noted inside, also on threads that get this context (`opd.background`)."""
    reasons: list[str] = []
    token = _noted.set(reasons)
    try:
        yield reasons
    finally:
        _noted.reset(token)


@contextmanager
def grading() -> Iterator[None]:
    """Wrap what scores an episode (or decorate it: `@grading()`): `rollout.grading_timeout` counts inside."""
    outermost = not getattr(_here, "inside", False)
    if outermost:
        _here.inside = True
        notify(True)
    try:
        yield
    finally:
        if outermost:
            _here.inside = False
            notify(False)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell `listener` of the grading that happens on this thread."""
    _here.listener = listener
    try:
        yield
    finally:
        del _here.listener


def notify(begins: bool) -> None:
    """Tell this thread's listener, if there is one."""
    listener: Listener | None = getattr(_here, "listener", None)
    if listener is not None:
        listener(begins)
