"""A process that forks children for its parent, and the frames in which it talks with them.

It has one thread, so that forking it is safe. It ends with its parent, however that ends, and ends every child and
whatever the children have started. Environments (`opd.episodes.env_server`) and graders (`opd.sandbox.grader_child`)
live in such children.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

COMMAND = struct.Struct("!ci")
"""To the server: `F` (fork; a socket comes along) or `E` and the process that is to end. Answered by an `INTEGER`."""
INTEGER = struct.Struct("!i")
"""A process's id, or a status of `waitpid`."""
_LENGTH = struct.Struct("!I")
MOST_BYTES = 1 << 26
"""The longest frame that is read, in bytes."""


def write_frame(connection: socket.socket, payload: bytes) -> None:
    """Send bytes with their length before them. Raises OSError when the other side is gone."""
    connection.sendall(_LENGTH.pack(len(payload)) + payload)


def read_frame(connection: socket.socket) -> bytes | None:
    """Read the other side's next frame; None when it is gone, or sends what is no frame."""
    head = _read(connection, _LENGTH.size)
    if head is None:
        return None
    (size,) = _LENGTH.unpack(head)
    return _read(connection, size) if size <= MOST_BYTES else None


def _read(connection: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        try:
            part = connection.recv(min(size - len(parts), 1 << 20))
        except ConnectionError:
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)


_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    """Call Linux's prctl; elsewhere do nothing: the server still ends the children that it knows."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class ForkServer:
    """Forks children and ends them; it inherits a child's orphans, so that it can end them as well."""

    def __init__(self, control: socket.socket, work: Callable[[socket.socket], None]) -> None:
        """Each child runs `work` with its end of a connection."""
        self.control = control
        self._work = work
        self.children: set[int] = set()
        self._trainer = os.getppid()
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def watch_trainer(self) -> None:
        """Check every second that the trainer is there: an import may hang, and other copies of the control
        socket may be open."""

        def look(_: int, __: FrameType | None) -> None:
            if os.getppid() != self._trainer:
                self.close()

        signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)

    def serve(self) -> NoReturn:
        """Follow the trainer's commands until it is gone."""
        while True:
            try:
                message, descriptors, _, _ = socket.recv_fds(self.control, COMMAND.size, 1)
            except ConnectionError:
                message = b""
            if len(message) < COMMAND.size:
                self.close()
            command, pid = COMMAND.unpack(message)
            if command == b"E":
                answer = self.end(pid)
            else:  # no descriptor comes where too many are open
                answer = self.fork(socket.socket(fileno=descriptors[0])) if descriptors else -1
            self.control.sendall(INTEGER.pack(answer))

    def fork(self, connection: socket.socket) -> int:
        """Start a child at the other end of `connection`; return its id, or -1 where there is no room."""
        server = os.getpid()
        _flush()  # or the fork would print it once more
        with connection:
            try:
                pid = os.fork()
            except OSError:
                return -1
            if pid == 0:
                try:
                    _become_child(server)
                    self.control.close()
                    self._work(connection)
                finally:
                    _flush()
                    os._exit(0)  # not the server's own way out
        self.children.add(pid)
        return pid

    def end(self, pid: int) -> int:
        """Kill a process, its group, and what it left behind; return its status as `waitpid` gives it."""
        if pid not in self.children:
            return 0
        self.children.remove(pid)
        with suppress(OSError):
            os.killpg(pid, signal.SIGKILL)  # the id is not given away before it is waited for
        status = _kill(pid)
        self._sweep()
        return status

    def close(self) -> NoReturn:
        """End everything, then this process."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for pid in self.children:  # all at once, then one by one
            with suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
        for pid in list(self.children):
            self.end(pid)
        self._sweep()
        os._exit(0)

    def _sweep(self) -> None:
        """Kill what ended children have left behind, in rounds: each may orphan what the last one started."""
        for _ in range(100):
            strays = _children() - self.children
            if not strays:
                return
            for pid in strays:
                _kill(pid)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()


def _children() -> set[int]:
    """List this process's children, as Linux tells them; elsewhere none."""
    try:
        return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="utf-8").split()))
    except OSError:
        return set()


def _kill(pid: int) -> int:
    """Kill a child and wait for its end, but not for ever: one that waits for a dead disk cannot be killed."""
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return 0
        if ended:
            return status
        time.sleep(0.0005)
    return 0


def _become_child(server: int) -> None:
    """In a fresh fork: make a session of its own, which ends with the server, and drop what the server had set."""
    os.setsid()  # Ctrl-C in the trainer's terminal is not for environments, and killpg reaches what they start
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != server:  # it died before the line above
        os._exit(1)
    if "numpy" in sys.modules:  # Python's own generator sees to itself after a fork
        sys.modules["numpy"].random.seed()
