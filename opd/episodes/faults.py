"""Tells which kind of failure an exception is: a broken infrastructure, or a broken environment."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

from opd.episodes.answers import BadAnswer
from opd.errors import EnvError
from opd.secrets import redact
from opd.types import Fault

MOST_CHARACTERS = 500
"""The characters that are kept of a reason: it is written beside every episode."""

# Clients of HTTP and sockets have roots of their own (httpx, aiohttp, urllib3, websockets, openai, grpc), and none
# of them is installed with this package: they are known by name.
_CONNECTION = ("Connect", "Network", "Transport", "RemoteProtocol", "Disconnected", "URLError", "gaierror", "EOFError")


_OURS = Path(__file__).parents[2]
_NOT_THEIRS = (
    *(str(_OURS / name) + "/" for name in ("opd", "envs", "rewards", "trainers", "launch")),
    sysconfig.get_path("stdlib") + "/",
    "<",
)


class Failure(EnvError):
    """Reports a failure whose kind is known already, because it comes from another process."""

    def __init__(self, fault: Fault, reason: str) -> None:
        super().__init__(reason)
        self.fault, self.reason = fault, reason  # as it was said: files keep it so


def explain(error: BaseException) -> tuple[Fault, str]:
    """Return an exception's kind and a short reason without secrets. Never raises, whatever class it is of."""
    try:
        reason = error.reason if isinstance(error, Failure) else f"{type(error).__name__}: {error}{_place(error)}"
    except Exception:  # somebody else's __str__
        reason = type(error).__name__
    return _fault(error), redact(reason.encode(errors="replace").decode())[:MOST_CHARACTERS]


def _fault(error: BaseException) -> Fault:
    if isinstance(error, Failure):
        return error.fault
    if isinstance(error, BadAnswer):
        return Fault.INVALID
    for cause in _causes(error):
        names = [cls.__name__ for cls in type(cause).__mro__]
        if any("Timeout" in name for name in names):
            return Fault.TIMEOUT
        if any(word in name for name in names for word in _CONNECTION) or isinstance(cause, BrokenPipeError):
            return Fault.CONNECTION
    return Fault.RAISED


def _place(error: BaseException) -> str:
    """Say where the exception left the code of an environment's author, as " (file, line n)"; "" where none took part.

    What is not this package, Python's own or an installed one is taken for theirs.
    """
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not f.filename.startswith(_NOT_THEIRS) and "site-packages" not in f.filename]
    return f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the exception and those it was raised from; at most ten, since they may form a ring."""
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__
