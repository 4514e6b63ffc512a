"""The processes that hold graders: started behind bubblewrap where there is one, forked for a session, and ended.

Who asks them is in `opd.sandbox.graders`, what runs in them in `opd.sandbox.grader_child`.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

from opd.errors import ConfigError, EnvError
from opd.sandbox.forks import COMMAND, INTEGER
from opd.sandbox.process import sealed_file
from opd.sandbox.syscalls import seccomp_filter

logger = logging.getLogger(__name__)

_START = 120.0
"""Seconds to import a library and make a grader on a busy machine."""
_PATIENCE = 30.0
"""Seconds for a fork, or for ending one; each takes milliseconds."""
_AT_ONCE = 16
"""Calls that run at one time. A batch of answers that all hang must end before `rollout.grading_timeout` gives its
graders up."""
_MOST_HELD = 8
"""Graders that are kept ready when no session needs them."""
_MOST_REPLY = 1 << 24
_PASSED_ON = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "NLTK_DATA", "PATH", "TZ", "VIRTUAL_ENV")
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Holder:
    """Starts and replaces the process that holds one grader, and forks it. Safe to use from any thread."""

    def __init__(self, factory: bytes, name: str) -> None:
        self.sessions = 0
        """The number of sessions that are open, or about to be."""
        self._factory, self._name = factory, name
        self._lock = threading.Lock()
        self._abandoned: deque[int] = deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Start the process unless it runs. Raises EnvError when it cannot start."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()

    def fork(self) -> tuple[int, socket.socket]:
        """Fork the process: the fork's id there, and the connection to it. Raises EnvError."""
        while self._abandoned:
            self.end(self._abandoned.popleft())
        with self._lock:
            for _ in range(2):  # a process that was killed is replaced
                if self._process is None or self._process.poll() is not None:
                    self._start()
                ours, theirs = socket.socketpair()
                with theirs:
                    pid = self._ask(b"F", 0, theirs.fileno())
                if pid is not None and pid > 0:
                    return pid, ours
                ours.close()
                self._stop()
        raise EnvError(f"{self._name}: the process that grades cannot fork; the machine has no room for one more")

    def end(self, pid: int) -> int:
        """Kill a fork; return its status as `os.waitpid` gives it."""
        with self._lock:
            return (self._ask(b"E", pid) if self._process is not None else None) or 0

    def abandon(self, pid: int, connection: socket.socket) -> None:
        """Let go of a fork that nobody closed: it ends by itself, and `fork` waits for it later.

        Garbage collection calls this, at any time and on any thread: so it takes no lock that may be held.
        """
        connection.close()
        self._abandoned.append(pid)
        self.release()

    def release(self) -> None:
        _HOLDERS.release(self)

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _start(self) -> None:
        self._stop()
        self._control, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = _HOLDERS.spawn(theirs)
            answer = exchange(self._control, self._factory, time.monotonic() + _START)
        except TimeoutError:
            answer = {"error": f"no answer within {_START:g} s"}
        except (OSError, ValueError) as error:
            answer = {"error": str(error)}
        if "error" in answer:
            self._stop()
            raise EnvError(
                f"{self._name}: the process that grades does not start: {answer['error']}. What it needs must be "
                f"installed for {sys.executable} and readable, without network; docs/sandbox.md says how it runs"
            )
        if not answer.get("filtered"):
            _warn_once("the kernel takes no filter of system calls here")
        self._control.settimeout(_PATIENCE)

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._control = None

    def _ask(self, command: bytes, pid: int, *descriptors: int) -> int | None:
        """Send the process a command; return its answer, or None where it gives none any more."""
        assert self._control is not None
        try:
            socket.send_fds(self._control, [COMMAND.pack(command, pid)], descriptors)
            answer = self._control.recv(INTEGER.size, socket.MSG_WAITALL)
        except OSError:
            return None
        return None if len(answer) < INTEGER.size else int(INTEGER.unpack(answer)[0])


class Holders:
    """Keeps a few graders' processes for this process; the one that was not asked for longest goes first."""

    def __init__(self) -> None:
        self.slots = threading.BoundedSemaphore(_AT_ONCE)
        self._lock = threading.RLock()  # a collection of garbage may release while it is held
        self._held: OrderedDict[bytes, Holder] = OrderedDict()
        # A child is told of its parent's end when the thread ends that started it: this one lasts.
        self._spawner = ThreadPoolExecutor(1, "opd-graders")

    def get(self, factory: bytes, name: str) -> Holder:
        """Lend a grader's holder to one more session; `release` gives it back."""
        with self._lock:
            holder = self._held.setdefault(factory, Holder(factory, name))
            self._held.move_to_end(factory)
            holder.sessions += 1
            idle = [key for key, held in self._held.items() if not held.sessions]
            surplus = [self._held.pop(key) for key in idle[: max(0, len(self._held) - _MOST_HELD)]]
        for one in surplus:
            one.close()
        return holder

    def release(self, holder: Holder) -> None:
        with self._lock:
            holder.sessions -= 1

    def spawn(self, control: socket.socket) -> subprocess.Popen[bytes]:
        plan = {"descriptor": control.fileno(), "parent": os.getpid()}
        path = json.dumps(sys.path)  # both find the same modules
        code = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); import opd.sandbox.grader_child as c; "
        argv = [sys.executable, "-c", f"{code}c.main(sys.argv[1])", json.dumps(plan), path]
        return self._spawner.submit(_spawn, argv, control.fileno()).result()

    def close(self) -> None:
        for holder in self._held.values():
            holder.close()
        self._held.clear()


def _spawn(argv: list[str], descriptor: int) -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment |= dict.fromkeys(_ONE_THREAD, "1")
    passed = [descriptor]
    with ExitStack() as held:
        if _bubblewrap_works():
            environment["TMPDIR"] = "/dev/shm"  # its own, and all that it may write to before it is locked
            rules = held.enter_context(sealed_file(seccomp_filter())).fileno()
            passed.append(rules)
            argv = [*_bubblewrap(), "--seccomp", str(rules), "--", *argv]
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            pass_fds=passed,
            start_new_session=True,  # Ctrl-C is for the trainer, which ends its graders in its own time
        )


def _bubblewrap() -> list[str]:
    """The command before a command that hides network and processes and makes this machine's files read-only."""
    namespaces = ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    return [str(shutil.which("bwrap")), *namespaces, "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]


@lru_cache(maxsize=1)
def _bubblewrap_works() -> bool:
    """True: this machine has bubblewrap and lets it work. False: it does not, and a warning has said so once."""
    try:
        seccomp_filter()
        done = subprocess.run(
            [*_bubblewrap(), "--", sys.executable, "-c", ""],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired, ConfigError) as error:
        _warn_once(f"bubblewrap (bwrap) does not work here: {error}")
        return False
    if done.returncode != 0:
        _warn_once(f"bubblewrap (bwrap) does not work here: {done.stderr.strip()[:200]}")
    return done.returncode == 0


@lru_cache
def _warn_once(what: str) -> None:
    logger.warning("%s; graders run with less around them, see docs/sandbox.md", what)


def exchange(connection: socket.socket, payload: bytes, deadline: float) -> dict[str, Any]:
    """Send a frame and read the JSON object that answers it.

    Raises TimeoutError at the deadline, ConnectionError when the other side is gone, ValueError for anything else than
    an object.
    """
    connection.settimeout(_left(deadline))
    connection.sendall(len(payload).to_bytes(4) + payload)
    size = int.from_bytes(_receive(connection, 4, deadline))
    if size > _MOST_REPLY:
        raise ValueError("the reply is too long")
    reply = json.loads(_receive(connection, size, deadline))
    if not isinstance(reply, dict):
        raise ValueError("the reply is no object")
    return reply


def _receive(connection: socket.socket, size: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < size:
        connection.settimeout(_left(deadline))
        part = connection.recv(min(size - len(received), 1 << 20))
        if not part:
            raise ConnectionError("the other side is gone")
        received += part
    return bytes(received)


def _left(deadline: float) -> float:
    """The seconds to the deadline. Raises TimeoutError when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


_HOLDERS = Holders()
_INHERITED: list[Holders] = []


def holders() -> Holders:
    """The graders' processes of this process."""
    return _HOLDERS


def _forget() -> None:
    """Begin anew in a forked process: the graders are the parent's, neither to be asked nor ended."""
    global _HOLDERS
    _INHERITED.append(_HOLDERS)
    _HOLDERS = Holders()


atexit.register(lambda: _HOLDERS.close())
os.register_at_fork(after_in_child=_forget)
