"""Programs in namespaces of their own, made by bubblewrap (`bwrap`).

Nothing of the host is there but /usr and Python, read-only. The program's user is none of the host's: started by
root it becomes `nobody`, for the kernel neither counts root's processes nor keeps root out of /proc/sys. The
working folder is a tmpfs of a fixed size; it is filled and read from outside, through its descriptor, while no
untrusted process lives.
"""

from __future__ import annotations

import json
import os
import platform
import re
import select
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import lru_cache
from pathlib import Path
from resource import prlimit
from typing import IO

from opd.errors import ConfigError, SandboxError
from opd.sandbox.limits import SandboxLimits
from opd.sandbox.process import Job, KilledWhy, Process, command, environment, python, sealed_file
from opd.sandbox.syscalls import seccomp_filter

_HOME, _SCRATCH = "/sandbox", "/tmp"
_OWN = (_HOME, _SCRATCH, "/proc", "/dev")
_USER = 1000
"""The program's user and group id inside."""
_NOBODY = 65534
"""The host's user and group id of sandboxes that root starts."""
_SHARED_MEMORY = 16 << 20
"""Bytes of /dev/shm."""
_PATIENCE = 30.0
"""Seconds that making or ending a sandbox may take on a crowded machine; each takes milliseconds."""

_INSTALL = """\
bubblewrap (the command bwrap), which keeps untrusted programs from this machine, is not installed. To install it:
  Debian, Ubuntu  apt-get install bubblewrap
  Fedora, RHEL    dnf install bubblewrap
  Arch            pacman -S bubblewrap
  Alpine          apk add bubblewrap
  openSUSE        zypper install bubblewrap
The mode "limits", which bounds time and memory but keeps nothing safe, has to be asked for by name."""

_SWITCHES = (
    ("/proc/sys/user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile that lets bwrap do it",
    ),
)
"""Features that a host may have switched off: the file that says so, its value then, the mend (as root)."""


@lru_cache(maxsize=1)
def require_bubblewrap() -> None:
    """Try a sandbox once in the life of this process. Raises ConfigError with the mend when it does not work."""
    job = Job(argv=["true"], limits=SandboxLimits())
    try:
        process = Bubblewrapped(job, ())
    except SandboxError as error:
        raise ConfigError(f"{error}\n{_why_refused()}") from error
    try:
        process.start()
        complaint = process.popen.communicate(timeout=_PATIENCE)[1].decode("utf-8", "replace")
    finally:
        process.close()
    if process.popen.returncode != 0:
        raise ConfigError(f"a sandbox was made, but nothing runs in it: {complaint or process.popen.returncode}")


def _why_refused() -> str:
    for path, off, mend in _SWITCHES:
        with suppress(OSError):
            if Path(path).read_text(encoding="utf-8").strip() == off:
                return f"{path} is {off}, so no new user namespace may be made here. As root: {mend}"
    return (
        "The kernel refused it. Inside a container, this is the container's own sandbox: start it with --privileged, "
        "or docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined "
        '--security-opt systempaths=unconfined. The mode "limits", which keeps nothing safe, works without.'
    )


class Bubblewrapped(Process):
    """One program in its own namespaces.

    `readable` are further paths of the host that it may read. Raises SandboxError when bwrap cannot make them,
    ConfigError when there is no bwrap.
    """

    def __init__(self, job: Job, readable: Sequence[str]) -> None:
        super().__init__()
        self._limits = job.limits
        self._kernel_limits = job.limits.of_process(processes=_kernel_limit(job.limits.processes))
        self.owner = _NOBODY if _can_be_nobody() else None
        self._init: int | None = None
        try:
            self._channel, theirs = socket.socketpair()
            self.held.enter_context(self._channel)
            with theirs:
                self._first_pid = self._spawn(job, readable, theirs)
            self._init = os.pidfd_open(self._first_pid)
            self.held.callback(os.close, self._init)
            self._receive_folders()
        except (OSError, KeyError, json.JSONDecodeError) as error:
            complaint = self._complaint()
            self.close()
            raise SandboxError(f"bubblewrap could not make a sandbox: {complaint or error}") from error
        except BaseException:
            self.close()
            raise

    def _spawn(self, job: Job, readable: Sequence[str], theirs: socket.socket) -> int:
        """Start bwrap; returns the host's process id of the sandbox's first process."""
        with ExitStack() as passed:  # what is given to bwrap and not kept
            stdin, rules = (passed.enter_context(sealed_file(data)) for data in (job.stdin, seccomp_filter()))
            info, info_in = _pipe(passed)
            mapped_out, mapped = _pipe(passed)
            user = ["--userns-block-fd", str(mapped_out.fileno()), "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
            if self.owner is None:
                user = ["--uid", str(_USER), "--gid", str(_USER)]
            inside = command(
                job,
                channel=theirs.fileno(),
                user=None if self.owner is None else _USER,
                home=_HOME,
                scratch=_SCRATCH,
                kernel_limits=self._kernel_limits,
            )
            fds = ["--info-fd", str(info_in.fileno()), "--seccomp", str(rules.fileno())]
            self.spawn(
                [_bwrap(), *_arguments(job.limits, readable), *user, *fds, "--", *inside],
                stdin=stdin,
                env=environment(_HOME, _SCRATCH, readable),
                cwd="/",
                pass_fds=[file.fileno() for file in (theirs, info_in, mapped_out, rules)],
            )
            info_in.close()
            answer = b""
            while b"}" not in answer and (more := os.read(info.fileno(), 4096)):
                answer += more
            pid = int(json.loads(answer)["child-pid"])
            if self.owner is not None:
                for kind in ("uid", "gid"):
                    Path(f"/proc/{pid}/{kind}_map").write_text(f"0 0 1\n{_USER} {self.owner} 1\n", encoding="utf-8")
                os.write(mapped.fileno(), b"1")
            return pid

    def _receive_folders(self) -> None:
        self._channel.settimeout(_PATIENCE)
        ready, folders, _, _ = socket.recv_fds(self._channel, 1, 4)
        for folder in folders:
            self.held.callback(os.close, folder)
        if not ready or len(folders) != 4:
            raise OSError("its first process did not start")
        self.folder, self.scratch, shared_memory, self._processes = folders
        self._writable = (self.folder, self.scratch, shared_memory)
        if self.owner is not None:
            for folder in self._writable:
                os.fchown(folder, self.owner, self.owner)

    def start(self) -> None:
        for limit, values in self._kernel_limits.items():
            # The sandbox's first process is bwrap's own, but belongs to the same user where that is not root.
            prlimit(self._first_pid, limit, values)
        self._channel.send(b"g")

    def excess(self) -> KilledWhy | None:
        for folder in self._writable:
            used = os.statvfs(folder)
            too_large = (used.f_blocks - used.f_bfree) * used.f_frsize > self._limits.folder_bytes
            if too_large or used.f_files - used.f_ffree > self._limits.files + _KEPT_FILES:
                return "folder"
        statuses = list(_statuses(self._processes))
        if sum(_number(status, b"Threads") for status in statuses) > self._limits.processes + 1:
            return "processes"
        resident = sum(_number(status, b"RssAnon") + _number(status, b"RssShmem") for status in statuses) << 10
        if resident > self._limits.memory_bytes and self._proportional_bytes() > self._limits.memory_bytes:
            return "memory"
        return None

    def _proportional_bytes(self) -> int:
        """Count the bytes of memory, shared pages once: slower, but fair to forks, which share pages."""
        rollups = [_read(self._processes, f"{pid}/smaps_rollup") for pid in _pids(self._processes)]
        return sum(_number(rollup, b"Pss_Anon") + _number(rollup, b"Pss_Shmem") for rollup in rollups) << 10

    def kill(self) -> None:
        if self._init is None:
            self.popen.kill()
        else:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init, signal.SIGKILL)
            # A first process is gone only when all of its namespace are.
            if not select.select([self._init], [], [], _PATIENCE)[0]:
                raise SandboxError(f"processes of a sandbox do not end (first of them: {self._first_pid})")
        self.popen.wait(_PATIENCE)

    def _complaint(self) -> str:
        """Read the message with which bwrap gave up."""
        if not hasattr(self, "popen") or self.popen.stderr is None:
            return ""
        self.popen.kill()
        return self.popen.stderr.read(2000).decode("utf-8", "replace").strip()


_KEPT_FILES = 2  # a folder itself, and the program's own file in /tmp


def _bwrap() -> str:
    path = shutil.which("bwrap")
    if path is None:
        raise ConfigError(_INSTALL)
    return path


@lru_cache(maxsize=4)
def _bounds_folders(bwrap: str) -> bool:
    """True if this build can make a tmpfs of a given size; if not, the watcher alone bounds the folders."""
    return "--size" in subprocess.run([bwrap, "--help"], capture_output=True, encoding="utf-8", check=False).stdout


def _arguments(limits: SandboxLimits, readable: Sequence[str]) -> list[str]:
    """The arguments for bwrap: namespaces and the file system."""
    arguments = ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--hostname", "sandbox"]
    arguments += ["--cap-drop", "ALL", *_system(), "--proc", "/proc", "--dev", "/dev"]
    for path, size in (("/dev/shm", _SHARED_MEMORY), (_HOME, limits.folder_bytes), (_SCRATCH, limits.folder_bytes)):
        arguments += ["--size", str(size)] if _bounds_folders(_bwrap()) else []
        arguments += ["--tmpfs", path]
    for path in (str(Path(python()).parents[1]), *readable):
        if not Path(path).is_relative_to("/usr"):
            for parent in list(reversed(Path(path).parents))[1:]:
                arguments += ["--dir", str(parent)]  # as /etc above
            arguments += ["--ro-bind", path, path]
    return [*arguments, "--remount-ro", "/dev", "--remount-ro", "/"]


def _system() -> Iterator[str]:
    """The arguments that bind programs and libraries, and the links that lead to them."""
    yield from ("--ro-bind", "/usr", "/usr")
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(name):
            yield from ("--symlink", os.readlink(name), name)
        elif os.path.isdir(name):
            yield from ("--ro-bind", name, name)
    yield from ("--dir", "/etc")  # made on the way, it would be closed to the program
    for name in ("/etc/alternatives", "/etc/ld.so.cache"):
        if os.path.exists(name):
            yield from ("--ro-bind", name, name)


def check_readable(readable: Sequence[str]) -> tuple[str, ...]:
    """Raise ConfigError for a path that does not exist, or would hide what the sandbox itself puts there."""
    for path in readable:
        if not os.path.isabs(path) or not os.path.exists(path):
            raise ConfigError(f"readable: {path!r} must be the absolute path of something that exists")
        if any(Path(own).is_relative_to(path) or (own != _SCRATCH and Path(path).is_relative_to(own)) for own in _OWN):
            raise ConfigError(f"readable: {path!r} would hide one of the sandbox's own folders: {', '.join(_OWN)}")
    return tuple(os.path.normpath(path) for path in readable)


def _can_be_nobody() -> bool:
    """True if this process is root, and not just of a namespace that has no other users."""
    if os.geteuid() != 0:
        return False
    ranges = (map(int, line.split()) for line in Path("/proc/self/uid_map").read_text(encoding="utf-8").splitlines())
    return any(first <= _NOBODY < first + count for first, _, count in ranges)


def _kernel_limit(processes: int) -> int | None:
    """The limit on processes for the kernel; None before Linux 5.14, which counts the user's processes everywhere."""
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    assert version is not None
    return processes + 1 if tuple(map(int, version.groups())) >= (5, 14) else None  # 1: bwrap's own


def _pipe(held: ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    read, write = os.pipe()
    return held.enter_context(os.fdopen(read, "rb", 0)), held.enter_context(os.fdopen(write, "wb", 0))


def _pids(proc: int) -> list[str]:
    """The sandbox's processes, without its first one."""
    return [name for name in os.listdir(proc) if name.isdigit() and name != "1"]


def _statuses(proc: int) -> Iterator[bytes]:
    for pid in _pids(proc):
        yield _read(proc, f"{pid}/status")


def _read(proc: int, path: str) -> bytes:
    """Read a file of a process; empty once the process is gone."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    except OSError:
        return b""
    with os.fdopen(file, "rb") as opened, suppress(OSError):
        return opened.read()
    return b""


def _number(text: bytes, name: bytes) -> int:
    found = re.search(rb"^" + name + rb":\s+(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0
