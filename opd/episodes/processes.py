"""Runs environments in processes of their own: one that hangs is killed, one that crashes takes nobody along.

`Processes` starts the server (`opd.episodes.env_server`) that forks them; `Remote` is one environment, called from a
worker's thread. A process holds one environment, is used again for episode after episode, and is ended at the
first failure.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from opd import grading
from opd.episodes.answers import Answer
from opd.episodes.env_server import command_line
from opd.episodes.faults import Failure
from opd.errors import ConfigError
from opd.grading import Trainer
from opd.sandbox.forks import COMMAND, INTEGER, read_frame, write_frame
from opd.types import Fault, Task

_PATIENCE = 10.0  # seconds that the server is given to end by itself


class Processes:
    """Owns the server that forks the environments' processes. Its methods may be called from any thread."""

    def __init__(self, make_env: Callable[[], Any], *, preload: Sequence[str] = ()) -> None:
        """Keep `make_env`, which each process calls, and `preload`, the modules that the server imports once for all.

        Raises ConfigError when `make_env` cannot be sent to another process.
        """
        try:
            self._factory = pickle.dumps(make_env)
        except Exception as error:  # what pickle says depends on what it meets
            raise ConfigError(
                f"env.workers = processes: the environment's factory cannot be sent to a process ({error}). Name the "
                "environment by its id or import path, or set env.workers: threads"
            ) from error
        self._preload = list(preload)
        self._lock = threading.Lock()
        self._closed = False
        self._server: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        with self._lock:
            self._start()  # its imports go on while others load a model

    def fork(self) -> tuple[int, socket.socket]:
        """Fork a process for an environment; return its id and the connection to it. Raises Failure."""
        ours, theirs = socket.socketpair()
        with theirs, self._lock:
            if not self._closed and (self._server is None or self._server.poll() is not None):
                self._start()
            pid = self._ask(b"F", 0, theirs.fileno())
        if pid is None or pid < 0:
            ours.close()
            why = "its server ended" if pid is None else "the machine has no room for one more"
            raise Failure(Fault.DIED, f"no process for an environment: {why}")
        with suppress(OSError):  # dead already: the first call says so
            write_frame(ours, self._factory)
        return pid, ours

    def end(self, pid: int) -> int:
        """Kill a process and whatever it started; return its status as `os.waitpid` gives it."""
        with self._lock:
            return self._ask(b"E", pid) or 0

    def close(self) -> None:
        """End the server and all that it has forked."""
        self._closed = True
        if self._control is not None:
            hang_up(self._control)  # whoever waits for an answer of a server that hangs lets the lock go
        with self._lock:
            self._stop()

    def _start(self) -> None:
        self._stop()
        self._control, theirs = socket.socketpair()
        plan = {"descriptor": theirs.fileno(), "modules": self._preload, "path": sys.path}
        with theirs:
            self._server = subprocess.Popen(
                command_line(plan),
                stdin=subprocess.DEVNULL,
                env={"OMP_NUM_THREADS": "1", **os.environ},  # many processes, each with a thread for every core?
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the trainer, which ends the server in its own time
            )

    def _stop(self) -> None:
        if self._server is None or self._control is None:
            return
        hang_up(self._control)
        self._control.close()
        try:
            self._server.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self._server.pid, signal.SIGKILL)  # what it has forked ends with it
            self._server.wait()
        self._server = self._control = None

    def _ask(self, command: bytes, pid: int, *descriptors: int) -> int | None:
        """Send the server a command and return its answer; None where it has none to give any more."""
        if self._control is None:
            return None
        message = COMMAND.pack(command, pid)
        try:
            if descriptors:
                socket.send_fds(self._control, [message], descriptors)
            else:
                self._control.sendall(message)
            answer = self._control.recv(INTEGER.size, socket.MSG_WAITALL)
        except OSError:
            return None
        return None if len(answer) < INTEGER.size else int(INTEGER.unpack(answer)[0])


class Remote:
    """Hosts one environment in a process, which is forked at the first reset. One thread at a time may call it."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._pid: int | None = None
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()
        self._in_use = threading.Lock()  # the connection, by the thread that calls
        self._given_up = False

    def reset(self, goal: Task, trainer: Trainer | None = None) -> Answer:
        """Begin an episode in the process, like `opd.episodes.answers.reset`. Raises Failure."""
        self._begin()
        told = None if trainer is None else asdict(trainer)
        return self._answer({"call": "reset", "goal": asdict(goal), "trainer": told})

    def score_group(self, members: Sequence[Any], ids: Sequence[Sequence[int]]) -> list[Answer]:
        """Score a group in the process, like `opd.episodes.answers.score_group`. Raises Failure."""
        self._begin()
        reply = self._call({"call": "score_group", "members": list(members), "ids": [list(one) for one in ids]})
        return [Answer(**one) for one in reply["answers"]]

    def _begin(self) -> None:
        """Fork the process, unless it is there."""
        if self._connection is None:
            pid, connection = self._processes.fork()
            with self._lock:
                self._pid, self._connection = pid, connection
            if self._given_up:  # meanwhile
                self._end()

    def step(self, action: str) -> Answer:
        """Take a step in the process, like `opd.episodes.answers.step`. Raises Failure."""
        return self._answer({"call": "step", "action": action})

    def close(self) -> None:
        """Close the environment, then end its process. Raises Failure where closing fails; it is ended all the same."""
        try:
            if self._connection is not None:
                self._call({"call": "close"})
        finally:
            self._end()

    def kill(self) -> None:
        """End the process now, whatever it does. Any thread may call this."""
        self._given_up = True
        self._end()

    def _answer(self, request: dict[str, Any]) -> Answer:
        return Answer(**self._call(request)["answer"])

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        connection = self._connection
        assert connection is not None
        try:
            with self._in_use:
                reply = _exchange(connection, request)
        except (OSError, ValueError, TypeError):  # not ours to trust: it may have written anything
            raise Failure(Fault.DIED, f"the environment's process {_describe_end(self._end())}") from None
        finally:
            if self._pid is None:  # ended meanwhile, by whom could not close what was in use
                connection.close()
        if "fault" in reply:
            raise Failure(Fault(reply["fault"]), reply["reason"])
        return reply

    def _end(self) -> int:
        with self._lock:
            pid, connection, self._pid = self._pid, self._connection, None
            if pid is None or connection is None:
                return 0
            status = self._processes.end(pid)
        hang_up(connection)  # a thread may wait at it
        if self._in_use.acquire(blocking=False):
            connection.close()
            self._in_use.release()
        return status


def _exchange(connection: socket.socket, request: dict[str, Any]) -> dict[str, Any]:
    """Ask, and wait for the answer. What the process says of grading goes to whoever listens on this thread."""
    write_frame(connection, json.dumps(request).encode())
    while True:
        frame = read_frame(connection)
        if frame is None:
            raise ConnectionError
        reply: dict[str, Any] = json.loads(frame)
        if "grading" not in reply:
            return reply
        grading.notify(reply["grading"])


def hang_up(connection: socket.socket) -> None:
    """Shut the connection down, so that both sides read that there is no more to come."""
    with suppress(OSError):  # the other side was quicker
        connection.shutdown(socket.SHUT_RDWR)


def _describe_end(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
