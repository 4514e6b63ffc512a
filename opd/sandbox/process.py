"""The interface of a running untrusted program, for the watcher in `run`, and how its command is made."""

from __future__ import annotations

import fcntl
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import IO, Any, Literal

from opd.sandbox.limits import SandboxLimits

KilledWhy = Literal["seconds", "cpu_seconds", "memory", "processes", "output", "folder"]

_INSIDE = Path(__file__).with_name("inside.py").read_text(encoding="utf-8")
_SCRIPT = "program"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A program to run, with its environment."""

    argv: Sequence[str]
    stdin: bytes = b""
    script: str | None = None
    """Text of a program for the interpreter that `argv` names; of any length, so it goes by a file."""
    limits: SandboxLimits


class Process(ABC):
    """A program whose folders and limits are in place, and that waits for `start`."""

    popen: Popen[bytes]
    folder: int
    """Descriptor of the working folder."""
    scratch: int
    """Descriptor of the folder for temporary files."""
    owner: int | None = None
    """The user to whom files in the folders must be given; None: they have the right owner already."""

    def __init__(self) -> None:
        self.held = ExitStack()
        """Resources that `close` frees."""

    @abstractmethod
    def start(self) -> None:
        """Let the program begin."""

    @abstractmethod
    def excess(self) -> KilledWhy | None:
        """Name the limit that the processes exceed, as seen from outside; None where they keep to all."""

    @abstractmethod
    def kill(self) -> None:
        """End every process of the run; return when none is left."""

    def close(self) -> None:
        """Kill the processes and free what is held."""
        with self.held:
            if hasattr(self, "popen"):
                self.kill()

    def spawn(self, argv: Sequence[str], **options: Any) -> None:
        self.popen = Popen(argv, stdout=PIPE, stderr=PIPE, **options)
        for pipe in (self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                self.held.enter_context(pipe)


def python() -> str:
    """The path of the interpreter behind this one: a virtual environment's is only a link to it."""
    named = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
    return str(named) if named.exists() else os.path.realpath(sys.executable)


def environment(home: str, scratch: str, importable: Sequence[str]) -> Mapping[str, str]:
    """A program's whole environment: nothing of ours is in it, and each run gets the same."""
    return {
        "HOME": home,
        "TMPDIR": scratch,
        "PATH": f"{Path(python()).parent}:/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join([home, *importable]),
        "PYTHONSAFEPATH": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def command(
    job: Job, *, channel: int, user: int | None, home: str, scratch: str, kernel_limits: Mapping[int, tuple[int, int]]
) -> list[str]:
    """The command that runs `inside.py`, which becomes the job's program."""
    limits = ",".join(f"{name}:{soft}:{hard}" for name, (soft, hard) in kernel_limits.items())
    script = [] if job.script is None else [f"{scratch}/{_SCRIPT}"]
    begin = [python(), "-I", "-S", "-c", _INSIDE]
    return [*begin, str(channel), str(-1 if user is None else user), home, limits, *job.argv, *script]


def sealed_file(data: bytes) -> IO[bytes]:
    """Make a file in memory that nobody can change any more, open at its start."""
    file = os.fdopen(os.memfd_create("opd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+b", buffering=0)
    file.write(data)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    file.seek(0)
    return file


def write_script(process: Process, script: str) -> None:
    """Write a job's script to the place that `command` names, outside the working folder."""
    file = os.open(_SCRIPT, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o644, dir_fd=process.scratch)
    with os.fdopen(file, "wb") as opened:
        opened.write(script.encode("utf-8", "replace"))
