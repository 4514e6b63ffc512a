"""A run's folder belongs to one process at a time: `run.lock` says to which, and the kernel lets go when that ends.

The file is locked with `flock` for as long as the run lives, so that a process that was killed leaves nothing that
must be cleaned away. Where two machines share a disk that does not pass such locks on, the file's age tells: its
owner touches it every `HEARTBEAT` seconds.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from opd.errors import LockError
from opd.standing import ADVICE

NAME = "run.lock"
HEARTBEAT = 20.0
SILENT = 120.0
"""Seconds without a sign of life after which the owner on another machine counts as dead."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that holds a folder, as its lock file names it."""

    host: str
    pid: int
    started: str
    """When it took the lock, in local time: ISO 8601, to the second."""

    @classmethod
    def this_process(cls) -> Owner:
        return cls(socket.gethostname(), os.getpid(), datetime.now().astimezone().isoformat(timespec="seconds"))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"


class RunLock:
    """The lock on a run's folder, held from its making until `release`.

    Makes the folder where it is missing. Raises LockError naming the process that holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder.stat()
        self._released = threading.Event()
        self._descriptor = self._hold()
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._beat, name="opd-lock", daemon=True).start()

    def _hold(self) -> int:
        """Lock the file, write this process into it, and return its descriptor."""
        descriptor, left = _take(self.path)
        if left is not None:
            _say(f"{self.path.parent}: {ended_without_a_word(left)}; this one takes over")
        try:
            os.pwrite(descriptor, json.dumps(asdict(Owner.this_process())).encode(), 0)
        except OSError as error:  # a full disk, say
            self.path.unlink()
            os.close(descriptor)
            raise LockError(
                f"{self.path} cannot be written: {error}. Make room, or choose another (--out DIR)"
            ) from None
        return descriptor

    def check(self) -> None:
        """Raise LockError if the folder is not this process's any more: nothing may be written there then."""
        folder = self.path.parent
        if not self._is_there():
            raise LockError(f"{folder} is gone: it was moved or deleted while its run was alive. Nothing more is saved")
        if _is_file_of(self.path, self._descriptor):
            return
        if not _is_open(self._descriptor):
            raise LockError(
                f"{self.path} was closed by something in this process: an environment that closes files which are not "
                f"its own. Nothing more is saved. {ADVICE}"
            )
        if self.path.exists():
            holder = _read(self.path) or "somebody"
            raise LockError(f"{folder} was taken over by {holder}. This process writes nothing more there")
        os.close(self._descriptor)
        self._descriptor = self._hold()  # the file alone was deleted

    def release(self) -> None:
        """Let the folder go, and leave no trace of the lock; nor of a folder that was made for it and stayed empty."""
        if self._released.is_set():
            return
        self._released.set()
        if _is_file_of(self.path, self._descriptor):
            self.path.unlink()
        _close(self._descriptor)
        if self._made and self._is_there() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()

    def _is_there(self) -> bool:
        """True: the folder has its name still. False: it was moved or deleted; another may have its place."""
        folder = self.path.parent
        return folder.is_dir() and os.path.samestat(folder.stat(), self._folder)

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT):
            if _is_file_of(self.path, self._descriptor):
                os.utime(self._descriptor)

    def _forget(self) -> None:
        """Close the descriptor in a forked process: the lock is the parent's, and must not outlive it here."""
        if not self._released.is_set():
            self._released.set()
            _close(self._descriptor)


def ended_without_a_word(owner: Owner) -> str:
    """Say of the owner whose lock was left behind how it may have ended: it did not come to its own end."""
    return (
        f"{owner} ended without a word: it was killed (for memory, say), its machine stopped, or an environment in a "
        "thread ended it (os._exit, a crash), which env.workers: processes would keep to its episode"
    )


def left_behind(folder: Path) -> Owner | None:
    """Return the owner that the lock of a folder names, whose process has ended; None where nobody left one."""
    path = folder / NAME
    return _read(path) if path.exists() else None


def check_free(folder: Path) -> None:
    """Raise LockError if another process holds the folder of a run; change nothing."""
    path = folder / NAME
    if not os.path.lexists(path):
        return
    descriptor = _open(path)
    try:
        _refuse_if_held(path, _flock(descriptor), _read(path))
    finally:
        os.close(descriptor)


def _take(path: Path) -> tuple[int, Owner | None]:
    """Return a locked descriptor of an empty file at `path`, and the dead owner that the file named, if any.

    Raises LockError where another process holds it. What a dead owner left is deleted and not written over: should it
    live after all, it sees that the file is another one.
    """
    dead = None
    while True:
        descriptor = _open(path)
        by_kernel = _flock(descriptor)
        if not _is_file_of(path, descriptor):  # its owner deleted it between the two calls
            os.close(descriptor)
            continue
        try:
            left = _read(path)
            _refuse_if_held(path, by_kernel, left, own_too=True)
        except LockError:
            os.close(descriptor)
            raise
        if not os.fstat(descriptor).st_size:
            return descriptor, dead
        dead = left
        path.unlink()
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open or make the file. Raises LockError if it is no ordinary file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        why = "it is no ordinary file"
    except OSError as error:
        why = str(error)
    raise LockError(f"{path} cannot be used as a lock: {why}. Delete it, or choose another folder (--out DIR)")


def _refuse_if_held(path: Path, by_kernel: bool | None, left: Owner | None, *, own_too: bool = False) -> None:
    """Raise LockError if the kernel or the file names a living owner; this process counts only if `own_too`."""
    if not own_too and left is not None and (left.host, left.pid) == (socket.gethostname(), os.getpid()):
        return
    if by_kernel is False or (left is not None and _alive(left, path, by_kernel=bool(by_kernel))):
        raise LockError(
            f"{path.parent} is in use by {left or 'another process'}. Wait for its end, stop it (Ctrl-C or SIGTERM "
            f"saves a checkpoint), or choose another folder (--out DIR). If it has ended, delete {path}"
        )


def _flock(descriptor: int) -> bool | None:
    """True: the kernel gives us its lock. False: another process has it. None: the disk knows no such locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _alive(owner: Owner, path: Path, *, by_kernel: bool) -> bool:
    """True: the owner that a file names may live, though the kernel's lock does not show it. False: it is dead."""
    if owner.host != socket.gethostname():
        return _age(path) < SILENT
    if by_kernel:
        return False  # on this machine it would hold that lock
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is another user's, and lives
    return _age(path) < SILENT  # else another process has its number, in a new container say


def _is_file_of(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:  # there is no such file any more, or the descriptor was closed
        return False


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _close(descriptor: int) -> None:
    with suppress(OSError):  # somebody else in this process closed it
        os.close(descriptor)


def _read(path: Path) -> Owner | None:
    """Return the owner that the file names; None for an empty file, or one that nobody finished."""
    try:
        owner = Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    fine = (type(owner.host), type(owner.pid), type(owner.started)) == (str, int, str)
    return owner if fine else None


def _age(path: Path) -> float:
    """Return the seconds since the file was touched, by the clock of the disk that it is on."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{NAME}.") as now:
        return os.stat(now.name).st_mtime - path.stat().st_mtime


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
