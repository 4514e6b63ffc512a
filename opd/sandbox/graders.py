"""Third-party code that reads what a model wrote, in processes that can be killed and can hurt nothing.

Graders evaluate answers as Python, as formulas or as SQL, and match patterns that take years on some texts. Python
cannot stop a thread, and many such computations let no other thread run. So a grader is held by a process of its own
(`grader_child`), made by what is pickled here; a session with it is a fork of that process, locked before it reads any
text, and killed when it is late or done with. Whatever goes wrong there is `Ungraded`; that the process cannot start is
an EnvError.
"""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import lru_cache
from typing import Any

from opd.errors import ConfigError, EnvError
from opd.grading import grading
from opd.sandbox.forks import COMMAND, INTEGER, MOST_BYTES
from opd.sandbox.process import sealed
from opd.sandbox.syscalls import seccomp_filter

logger = logging.getLogger(__name__)

_START = 120.0
"""Seconds to import a library and make a grader on a busy machine."""
_PATIENCE = 30.0
"""Seconds for a fork, or for ending one; each takes milliseconds."""
_AT_ONCE = 16
"""Calls that are computed at one time; a batch of answers that all hang must be through before the graders of it are
given up (`rollout.grading_timeout`)."""
_MOST_HELD = 8
"""Graders that are kept ready when no session needs them."""
_MOST_REPLY = 1 << 24
_PASSED_ON = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "NLTK_DATA", "PATH", "TZ", "VIRTUAL_ENV")
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Ungraded(Exception):
    """A call that has no result: it was late, refused, or raised, or its process died. `str(error)` says which."""


class Grader:
    """An object that reads a model's text, in processes of its own.

    Args:
        make: makes the object, there; it must be picklable. Graders with the same one share a process.
        name: what it is, for messages.
        time_limit: seconds for one call.

    Raises ConfigError when `make` cannot be pickled, or the limit is below one second.
    """

    def __init__(self, make: Callable[[], Any], *, name: str, time_limit: float = 10.0) -> None:
        if not time_limit >= 1:
            raise ConfigError(f"{name}: time_limit = {time_limit!r} must be at least 1 (seconds)")
        try:
            self._factory = pickle.dumps(make)
        except Exception as error:  # what pickle says depends on what it meets
            raise ConfigError(
                f"{name} cannot be sent to a process of its own ({error}); it must be importable by its name"
            ) from error
        self.name = name
        self.time_limit = time_limit

    def score(self, method: str, *, text: str, **arguments: Any) -> float | None:
        """What a method of the object returns for these arguments: a finite number, or None.

        Where there is no such result the answer is wrong: 0.0, and a warning quotes `text`. Raises EnvError when the
        process cannot start.
        """
        try:
            with grading(), self.session() as session:
                value = session.call(method, **arguments)
            if value is None or (isinstance(value, int | float) and math.isfinite(value)):
                return None if value is None else float(value)
            reason = f"its score is {value!r:.80}"
        except Ungraded as error:
            reason = str(error)
        except OverflowError:  # an integer that no float holds
            reason = "its score is out of range"
        logger.warning("%s: the answer %.200r scores 0: %s", self.name, text[:200], reason)
        return 0.0

    def start(self) -> None:
        """Start the process that holds the object, so that the first call need not wait for it. Raises EnvError."""
        holder = _HOLDERS.get(self._factory, self.name)
        try:
            holder.start()
        finally:
            holder.release()

    def session(self) -> GraderSession:
        """A process with the object as it was made. Raises EnvError when it cannot start."""
        return GraderSession(_HOLDERS.get(self._factory, self.name), self.time_limit)


class GraderSession:
    """Calls of one object, which remembers what was called before. For one thread at a time; `close` ends it."""

    def __init__(self, holder: _Holder, time_limit: float) -> None:
        self.time_limit = time_limit
        self._holder = holder
        try:
            self._pid, self._connection = holder.fork()
        except BaseException:
            holder.release()
            raise
        self._abandoned = weakref.finalize(self, holder.abandon, self._pid, self._connection)  # if nobody calls close

    def call(self, method: str, **arguments: Any) -> Any:
        """What the method returns, as JSON has it. Raises Ungraded; the session is of no use after that."""
        # Into the child by pickle: data sets hold tuples and numpy's texts. What comes back is JSON, and nothing else.
        request = pickle.dumps((method, self.time_limit, arguments))
        if len(request) > MOST_BYTES:
            self.close()
            raise Ungraded(f"it is too long ({len(request):,} bytes; at most {MOST_BYTES:,} are sent)")
        with _HOLDERS.slots:
            try:
                reply = _exchange(self._connection, request, time.monotonic() + self.time_limit)
            except TimeoutError:
                self.close()
                raise Ungraded(f"no answer within {self.time_limit:g} s (time_limit)") from None
            except (OSError, ValueError):  # not ours to trust: it may have written anything
                raise Ungraded(f"the process that grades it {_told_end(self._end())}") from None
        if "value" in reply:
            return reply["value"]
        self.close()
        if "refused" in reply:
            raise Ungraded(f"it tried what text may not do ({reply['refused']})")
        raise Ungraded(f"the grader raised {reply.get('raised')}")

    def close(self) -> None:
        """End its process."""
        self._end()

    def _end(self) -> int:
        """The process's status; 0 once it was ended."""
        if self._abandoned.detach() is None:
            return 0
        self._connection.close()
        try:
            return self._holder.end(self._pid)
        finally:
            self._holder.release()

    def __enter__(self) -> GraderSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Holder:
    """The process that holds one grader. Its methods may be called from any thread."""

    def __init__(self, factory: bytes, name: str) -> None:
        self.sessions = 0
        """Those that are open, or about to be."""
        self._factory, self._name = factory, name
        self._lock = threading.Lock()
        self._abandoned: deque[int] = deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Raises EnvError when the process cannot start."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()

    def fork(self) -> tuple[int, socket.socket]:
        """A new fork: its id there, and the connection to it. Raises EnvError."""
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
        """Kill a fork; its status as `os.waitpid` gives it."""
        with self._lock:
            return (self._ask(b"E", pid) if self._process is not None else None) or 0

    def abandon(self, pid: int, connection: socket.socket) -> None:
        """Let a fork go that nobody closed: it ends by itself, and is waited for later.

        A collection of garbage calls this, at any time and on any thread: so no lock is taken that may be held.
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
            told = _exchange(self._control, self._factory, time.monotonic() + _START)
        except TimeoutError:
            told = {"error": f"no answer within {_START:g} s"}
        except (OSError, ValueError) as error:
            told = {"error": str(error)}
        if "error" in told:
            self._stop()
            raise EnvError(
                f"{self._name}: the process that grades does not start: {told['error']}. What it needs must be "
                f"installed for {sys.executable} and readable, without network; docs/sandbox.md says how it runs"
            )
        if not told.get("filtered"):
            _say_once("the kernel takes no filter of system calls here")
        self._control.settimeout(_PATIENCE)

    def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._control = None

    def _ask(self, command: bytes, pid: int, *descriptors: int) -> int | None:
        """The process's answer; None where it has none to give any more."""
        assert self._control is not None
        try:
            socket.send_fds(self._control, [COMMAND.pack(command, pid)], descriptors)
            answer = self._control.recv(INTEGER.size, socket.MSG_WAITALL)
        except OSError:
            return None
        return None if len(answer) < INTEGER.size else int(INTEGER.unpack(answer)[0])


class _Holders:
    """The graders' processes of this process: a few are kept, the one that was not asked for longest goes first."""

    def __init__(self) -> None:
        self.slots = threading.BoundedSemaphore(_AT_ONCE)
        self._lock = threading.RLock()  # a collection of garbage may release while it is held
        self._held: OrderedDict[bytes, _Holder] = OrderedDict()
        # A child is told of its parent's end when the thread ends that started it: this one lasts.
        self._spawner = ThreadPoolExecutor(1, "opd-graders")

    def get(self, factory: bytes, name: str) -> _Holder:
        """The holder of a grader, for one session more; `release` gives it back."""
        with self._lock:
            holder = self._held.setdefault(factory, _Holder(factory, name))
            self._held.move_to_end(factory)
            holder.sessions += 1
            idle = [key for key, held in self._held.items() if not held.sessions]
            surplus = [self._held.pop(key) for key in idle[: max(0, len(self._held) - _MOST_HELD)]]
        for one in surplus:
            one.close()
        return holder

    def release(self, holder: _Holder) -> None:
        with self._lock:
            holder.sessions -= 1

    def spawn(self, control: socket.socket) -> subprocess.Popen[bytes]:
        plan = {"descriptor": control.fileno(), "parent": os.getpid()}
        path = json.dumps(sys.path)  # both find the same modules
        code = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); import opd.sandbox.grader_child as c; "
        argv = [sys.executable, "-c", f"{code}c.main(sys.argv[1])", json.dumps(plan), path]
        return self._spawner.submit(_popen, argv, control.fileno()).result()

    def close(self) -> None:
        for holder in self._held.values():
            holder.close()
        self._held.clear()


def _popen(argv: list[str], descriptor: int) -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment |= dict.fromkeys(_ONE_THREAD, "1")
    passed = [descriptor]
    with ExitStack() as held:
        if _works_wrapped():
            environment["TMPDIR"] = "/dev/shm"  # its own, and all that it may write to before it is locked
            rules = held.enter_context(sealed(seccomp_filter())).fileno()
            passed.append(rules)
            argv = [*_wrapping(), "--seccomp", str(rules), "--", *argv]
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            pass_fds=passed,
            start_new_session=True,  # Ctrl-C is for the trainer, which ends its graders in its own time
        )


def _wrapping() -> list[str]:
    """bubblewrap, with this machine's files read-only, no network, and none of this machine's processes."""
    namespaces = ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    return [str(shutil.which("bwrap")), *namespaces, "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]


@lru_cache(maxsize=1)
def _works_wrapped() -> bool:
    """Whether this machine has bubblewrap and lets it work; it is said once where not."""
    try:
        seccomp_filter()
        done = subprocess.run(
            [*_wrapping(), "--", sys.executable, "-c", ""], capture_output=True, text=True, timeout=_PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired, ConfigError) as error:
        _say_once(f"bubblewrap (bwrap) does not work here: {error}")
        return False
    if done.returncode != 0:
        _say_once(f"bubblewrap (bwrap) does not work here: {done.stderr.strip()[:200]}")
    return done.returncode == 0


@lru_cache
def _say_once(what: str) -> None:
    logger.warning("%s; graders run with less around them, see docs/sandbox.md", what)


def _exchange(connection: socket.socket, payload: bytes, deadline: float) -> dict[str, Any]:
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
    """Seconds to the deadline. Raises TimeoutError when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _told_end(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        return "has used up its processor time (time_limit)"
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else "ended"
    return f"was ended by signal {-code}"


_HOLDERS = _Holders()
_INHERITED: list[_Holders] = []


def _forget() -> None:
    """In a forked process: the graders are the parent's, neither to be asked nor ended."""
    global _HOLDERS
    _INHERITED.append(_HOLDERS)
    _HOLDERS = _Holders()


atexit.register(lambda: _HOLDERS.close())
os.register_at_fork(after_in_child=_forget)
