"""The process that holds a grader: it makes the grader once, and forks for every session.

A fork is locked before it reads any of the model's text: the kernel refuses it programs, processes, sockets and
writing (`syscalls.locked_filter`), an audit hook refuses the same by name, and limits bound what it computes. So text
that a grader takes for code can spoil nothing but its own score, and nothing of it is left for the next session.
`opd.sandbox.graders` is the other side.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pickle
import resource
import socket
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from opd.errors import ConfigError
from opd.sandbox.forks import ForkServer, read_frame, write_frame
from opd.sandbox.syscalls import locked_filter

_MEMORY = 1 << 30
"""Bytes of address space that a session may take beside what the grader itself has."""
_OPEN_FILES = 128
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SIGKILL, _SECCOMP_MODE_FILTER = 9, 2

# Names of audit events (docs.python.org/3/library/audit_events.html): whole families, and single ones.
_REFUSED_FAMILIES = {
    *("ctypes", "fcntl", "ftplib", "http", "imaplib", "nntplib", "poplib", "pty", "shutil", "smtplib", "socket"),
    *("subprocess", "syslog", "tempfile", "urllib", "webbrowser", "winreg"),
}
_REFUSED = {
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile"),
    *("os.kill", "os.killpg", "signal.pthread_kill", "resource.prlimit"),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.utime"),
    *("os.chmod", "os.chown", "os.chflags", "os.lockf", "os.setxattr", "os.removexattr"),
}


def main(plan: str) -> NoReturn:
    """Serve the socket whose `descriptor` the plan, a JSON text, names; the first frame there makes the grader."""
    settings = json.loads(plan)
    _end_with_parent(settings["parent"])
    descriptor = settings["descriptor"]
    os.closerange(3, descriptor)
    os.closerange(descriptor + 1, 1024)  # what bubblewrap left open
    control = socket.socket(fileno=descriptor)
    try:
        grader = pickle.loads(read_frame(control) or b"")()
    except BaseException as error:  # sys.exit() too
        _reply(control, {"error": _describe_error(error)})
        sys.exit(1)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy every page
    filtered = _can_be_filtered()
    _reply(control, {"filtered": filtered})
    ForkServer(control, partial(serve, grader, filtered)).serve()


def serve(grader: Any, filtered: bool, connection: socket.socket) -> None:
    """Answer calls of the grader's methods, in a fork, until the other side is gone.

    A grader that needs something before this process is locked has a method `prepare`.
    """
    if hasattr(grader, "prepare"):
        grader.prepare()
    refused: list[str] = []
    lock(refused, filtered=filtered)
    while (frame := read_frame(connection)) is not None:
        method, seconds, arguments = pickle.loads(frame)
        _limit_computing(seconds)
        reply: dict[str, Any]
        try:
            reply = {"value": getattr(grader, method)(**arguments)}
            json.dumps(reply)
        except BaseException as error:  # sys.exit() too
            reply = {"raised": _describe_error(error)}
        if refused:  # whatever the grader made of it
            reply = {"refused": refused[0]}
        _reply(connection, reply)


def lock(refused: list[str], *, filtered: bool) -> None:
    """Forbid this process all that a grader does not need; `refused` gets the audit events that were tried anyway."""
    sys.dont_write_bytecode = True
    with suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="utf-8") as file:
        file.write("1000")  # the first to go when the machine runs out of memory
    limits = {
        resource.RLIMIT_AS: _address_space() + _MEMORY,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
    }
    if not filtered:
        limits[resource.RLIMIT_NPROC] = 0  # counts threads too; the kernel does not hold root to it
    for limit, value in limits.items():
        with suppress(OSError, ValueError):  # lower already, or unknown to this system
            resource.setrlimit(limit, (value, value))
    if filtered:
        _filter_system_calls()
    sys.addaudithook(partial(_refuse, refused))


def _refuse(refused: list[str], event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: refuse an event. No other thread of Python runs between the event and its action."""
    if event == "open":
        _, mode, flags = arguments
        writes = (isinstance(flags, int) and flags & _WRITES) or (isinstance(mode, str) and set(mode) & set("wax+"))
        if not writes:
            return
    elif event not in _REFUSED and event.partition(".")[0] not in _REFUSED_FAMILIES:
        return
    refused.append("opening a file for writing" if event == "open" else event)
    raise PermissionError(f"{refused[-1]} is refused to a process that grades")


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _filter_system_calls() -> None:
    """Install the filter of system calls. Raises OSError where the kernel does not take it."""
    code = locked_filter()
    program = _Program(len(code) // 8, code)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))


def _prctl(option: int, value: int, argument: Any = 0) -> None:
    if sys.platform != "linux":
        raise OSError("prctl is Linux's")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, argument, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _can_be_filtered() -> bool:
    """Try the filter in a fork of this process. True: the kernel takes it."""
    pid = os.fork()
    if pid == 0:
        try:
            _filter_system_calls()
        except (OSError, ConfigError):
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def _end_with_parent(parent: int) -> None:
    with suppress(OSError):
        _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() not in (parent, 1):  # 1: bubblewrap, which ends with the parent itself
        os._exit(1)


def _limit_computing(seconds: float) -> None:
    """Let the kernel end this process after so many seconds of computing: Python runs no signal handler while it
    multiplies huge integers."""
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used + seconds) + 1, hard))


def _address_space() -> int:
    """The bytes that this process has mapped, where the system tells; else an amount that any grader needs."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    except OSError:
        return 4 * _MEMORY


def _reply(connection: socket.socket, reply: dict[str, Any]) -> None:
    write_frame(connection, json.dumps(reply).encode())


def _describe_error(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}".split("\n")[0][:500]
    except BaseException:  # an exception of the model's own making
        return type(error).__name__
