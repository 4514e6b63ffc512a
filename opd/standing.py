"""What a process has but once, and strangers' code in it may change: its folder, its console, its ways of counting.

An environment in a thread, or a module that is imported, shares all of this with the run. `Standing` remembers it and
puts it back. What it does not hold (the variables of the process, `sys.modules`, descriptors beyond the console's,
timers, limits) cannot be put back, or may be changed for good reason; `env.workers: processes` keeps that away too.
"""

from __future__ import annotations

import fcntl
import gc
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

ADVICE = "env.workers: processes keeps what an environment does to its process away from the run"


class _Kept(NamedTuple):
    """Something of the process that is kept: how it is read and set, and which other value does harm."""

    name: str
    read: Callable[[], Any]
    put: Callable[[Any], object]
    harms: Callable[[Any, Any], bool] = lambda now, before: True


def _attribute(owner: Any, name: str, harms: Callable[[Any, Any], bool] = lambda now, before: True) -> _Kept:
    return _Kept(
        f"{owner.__name__}.{name}", lambda: getattr(owner, name), lambda value: setattr(owner, name, value), harms
    )


_MASK = threading.Lock()


def _masked() -> int:
    """Read the mask of new files' permissions."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))
    except (OSError, StopIteration):  # elsewhere the system tells it only to whoever sets it
        with _MASK:
            mask = os.umask(0o077)
            os.umask(mask)
        return mask


def _collects(on: bool) -> None:
    (gc.enable if on else gc.disable)()


_KEPT = (
    _Kept("the current folder (os.chdir)", os.getcwd, os.chdir),
    _Kept("the mask of permissions (os.umask)", _masked, os.umask),
    *(_attribute(sys, name) for name in ("stdout", "stderr", "stdin")),
    _attribute(threading, "excepthook", lambda now, before: not callable(now)),
    _Kept(
        "sys.setrecursionlimit", sys.getrecursionlimit, sys.setrecursionlimit, lambda now, before: bool(now < before)
    ),
    _Kept("logging.disable", lambda: logging.root.manager.disable, logging.disable),
    _Kept("gc.disable", gc.isenabled, _collects),
)


def _of_torch() -> tuple[_Kept, ...]:
    """What is kept of torch, where somebody has imported it: it decides how a run's numbers come out."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "set_float32_matmul_precision"):
        return ()
    return (
        _Kept("torch.set_default_dtype", torch.get_default_dtype, torch.set_default_dtype),
        _Kept(
            "torch.use_deterministic_algorithms",
            torch.are_deterministic_algorithms_enabled,
            torch.use_deterministic_algorithms,
        ),
        _Kept(
            "torch.set_float32_matmul_precision",
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
        ),
    )


class Standing:
    """The process as it stood when this was made. `restore` puts it back, and says what had changed."""

    def __init__(self, *, numbers: bool = True) -> None:
        """Remember it; with `numbers` also what decides how torch counts."""
        self._values: list[tuple[_Kept, Any]] = []
        for kept in (*_KEPT, *(_of_torch() if numbers else ())):
            with suppress(OSError):  # the folder may be gone already
                self._values.append((kept, kept.read()))
        self._errors = [entry for entry in warnings.filters if entry[0] == "error"]
        self._console = {number: copy for number in (0, 1, 2) if (copy := _copy_of(number)) is not None}

    def restore(self) -> list[str]:
        """Put back what has changed; return its names."""
        changed = [kept.name for kept, value in self._values if _put_back(kept, value)]
        changed += [f"file descriptor {number}" for number, copy in self._console.items() if _reopened(number, copy)]
        for kept, value in self._values:
            if kept.name in ("sys.stdout", "sys.stderr") and getattr(value, "closed", False):
                setattr(sys, kept.name.removeprefix("sys."), _reopened_stream(kept.name, value))
                changed.append(f"{kept.name} (closed)")
        if added := [entry for entry in warnings.filters if entry[0] == "error" and entry not in self._errors]:
            warnings.filters[:] = [entry for entry in warnings.filters if entry not in added]  # type: ignore[index]
            warnings._filters_mutated()  # type: ignore[attr-defined]
            changed.append("warnings.simplefilter('error')")
        return changed

    def close(self) -> None:
        """Let the copies of the console's descriptors go."""
        for copy in self._console.values():
            with suppress(OSError):
                os.close(copy)
        self._console = {}


@contextmanager
def kept_standing(who: str) -> Iterator[None]:
    """Put back what strangers' code inside changes of this process; warn of it, naming `who`.

    In a thread that is not the main one nothing is: others are at work beside it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    standing = Standing(numbers=False)
    try:
        yield
    finally:
        if changed := standing.restore():
            logger.warning("%s changed %s of this process; it is put back", who, ", ".join(changed))
        standing.close()


def _put_back(kept: _Kept, value: Any) -> bool:
    """Put one thing back. True: it had changed."""
    try:
        now = kept.read()
    except OSError:  # the current folder was deleted
        now = None
    if now is value or now == value or not kept.harms(now, value):
        return False
    if hasattr(now, "rich_proxied_file") or hasattr(value, "rich_proxied_file"):
        return False  # a live bar came or went, which is ours
    with suppress(OSError, ValueError, TypeError):
        kept.put(value)
    return True


def _copy_of(number: int) -> int | None:
    """Copy a descriptor of the console; None where it is closed."""
    try:
        return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 64)
    except OSError:
        return None


def _reopened(number: int, copy: int) -> bool:
    """Open a descriptor of the console again. True: it had been closed, and the next file would have had its number."""
    try:
        os.fstat(number)
        return False
    except OSError:
        pass
    try:
        os.dup2(copy, number)
    except OSError:  # the copy was closed too
        null = os.open(os.devnull, os.O_RDWR)
        if null != number:
            os.dup2(null, number)
            os.close(null)
    return True


def _reopened_stream(name: str, closed: Any) -> Any:
    """Open a stream anew over the console's descriptor, which a stream that is closed leaves open."""
    number = 1 if name == "sys.stdout" else 2
    return open(number, "w", encoding=getattr(closed, "encoding", "utf-8"), errors="backslashreplace", closefd=False)
