"""Running and watching untrusted programs, as `docs/sandbox.md` describes."""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import IO, Any

from opd.errors import ConfigError, DataError
from opd.sandbox.bubblewrap import Bubblewrapped, check_readable, require_bubblewrap
from opd.sandbox.folder import Entry, Folder, read_folder, to_folder, write_folder
from opd.sandbox.limits import SandboxLimits
from opd.sandbox.process import Job, KilledWhy, Process, python, write_script
from opd.sandbox.unprotected import WARNING, Unprotected

MODES = ("bwrap", "limits")
_LOOK = 0.05
"""Seconds between two checks of what the processes use."""
_CHUNK = 1 << 16
_LONGEST_ARGUMENT = 100_000  # characters; Linux takes 128 KiB

Files = Mapping[str, str | bytes | Entry]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of a run."""

    stdout: str
    stderr: str
    exit_code: int
    """128 + n where signal n ended it."""
    killed_why: KilledWhy | None
    """The limit that ended it, by its name in `SandboxLimits`; None where none did."""
    timed_out: bool
    truncated: bool
    """True if there was more output than the limit lets through."""
    seconds: float
    folder: Folder
    """The working folder afterwards; as it was before when it has grown too large ("folder")."""

    @property
    def files(self) -> dict[str, bytes]:
        """The contents of the files of the folder, by relative path; links are not followed."""
        return {path: entry.data for path, entry in self.folder.items() if entry.kind == "file"}


class Sandbox:
    """Runs programs that may be hostile. Safe to use from several threads at once.

    Args:
        limits: bounds of each run, or a mapping of them.
        mode: "bwrap" (namespaces), or "limits", which protects nothing and warns.
        readable: further files and folders that programs may read, at their own paths; Python imports from them.
            Where this runs as root, programs do not: what they read must be open to others.

    Raises ConfigError when this machine cannot do it, and says how it could.
    """

    def __init__(
        self,
        limits: SandboxLimits | Mapping[str, Any] | None = None,
        *,
        mode: str = "bwrap",
        readable: Sequence[str] = (),
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f'sandbox: {mode!r} is unknown. Allowed: {", ".join(MODES)} ("limits" protects nothing)')
        if not hasattr(os, "pidfd_open"):
            raise ConfigError("sandbox: untrusted programs are run on Linux only, 5.3 or newer")
        self.limits = SandboxLimits.of(limits)
        self.mode = mode
        self.readable = check_readable(readable)
        if mode == "bwrap":
            require_bubblewrap()
        else:
            warnings.warn(WARNING, RuntimeWarning, stacklevel=2)

    def run(self, argv: Sequence[str], *, stdin: str | bytes = "", files: Files | None = None) -> Outcome:
        """Run a program with `files` in its working folder.

        Everything that the program does is an outcome, not an error. Raises ConfigError for arguments or files that
        cannot be handed over, SandboxError when the sandbox itself fails.
        """
        parts = [_replace_surrogates(part) for part in argv]
        if not parts or any("\0" in part or len(part) > _LONGEST_ARGUMENT for part in parts):
            raise ConfigError(
                f"argv = {argv!r:.200} must name a program, without NUL characters and with arguments of at most "
                f"{_LONGEST_ARGUMENT:,} characters; long text goes into a file or stdin"
            )
        return self._run(parts, None, stdin, files)

    def run_python(self, code: str, *, stdin: str | bytes = "", files: Files | None = None) -> Outcome:
        """Run Python code with the version of Python that runs this. Raises as `run` does."""
        return self._run([python()], code, stdin, files)

    def run_shell(self, command: str, *, stdin: str | bytes = "", files: Files | None = None) -> Outcome:
        """Run a command line, or many, in bash where there is one, else in sh. Raises as `run` does."""
        return self._run(["bash" if shutil.which("bash") else "sh"], command, stdin, files)

    def session(self, files: Files | None = None) -> Session:
        """Open a working folder that begins with `files` and lasts from one run to the next."""
        return Session(self, files or {})

    def _run(self, argv: Sequence[str], script: str | None, stdin: str | bytes, files: Files | None) -> Outcome:
        begun = time.monotonic()
        most_bytes, most_files = self.limits.folder_bytes, self.limits.files
        folder = to_folder(files or {}, most_bytes=most_bytes, most_files=most_files)
        given = stdin.encode("utf-8", "replace") if isinstance(stdin, str) else stdin
        job = Job(argv=argv, stdin=given, script=script, limits=self.limits)
        with closing(self._make(job)) as process:
            write_folder(process.folder, folder, owner=process.owner)
            if script is not None:
                write_script(process, script)
            process.start()
            (stdout, stderr), why = _watch(process, self.limits)
            code = process.popen.returncode
            exit_code = code if code >= 0 else 128 - code
            if why is None and exit_code == 128 + signal.SIGXCPU:
                why = "cpu_seconds"
            try:
                folder = read_folder(process.folder, most_bytes=most_bytes, most_files=most_files)
            except DataError:
                why = "folder"
        return Outcome(
            stdout=stdout,
            stderr=stderr,
            exit_code=exit_code,
            killed_why=why,
            timed_out=why == "seconds",
            truncated=why == "output",
            seconds=time.monotonic() - begun,
            folder=folder,
        )

    def _make(self, job: Job) -> Process:
        return Bubblewrapped(job, self.readable) if self.mode == "bwrap" else Unprotected(job, self.readable)


class Session:
    """A working folder that lasts through several runs, as an agent's episode needs it.

    It is data, not a folder of this machine: nothing runs between runs, and there is nothing to clean up. A process
    that a run leaves in the background ends with it. Files that a run leaves are there in the next one; a run that
    leaves more than the limits allow is undone. For one thread at a time.
    """

    def __init__(self, sandbox: Sandbox, files: Files) -> None:
        self.sandbox = sandbox
        limits = sandbox.limits
        self.folder = to_folder(files, most_bytes=limits.folder_bytes, most_files=limits.files)

    @property
    def files(self) -> dict[str, bytes]:
        """The contents of the files, by relative path; links are not followed."""
        return {path: entry.data for path, entry in self.folder.items() if entry.kind == "file"}

    def run(self, argv: Sequence[str], *, stdin: str | bytes = "") -> Outcome:
        """Run a program as `Sandbox.run` does."""
        return self._keep(self.sandbox.run(argv, stdin=stdin, files=self.folder))

    def run_python(self, code: str, *, stdin: str | bytes = "") -> Outcome:
        """Run Python code as `Sandbox.run_python` does; files last, variables do not."""
        return self._keep(self.sandbox.run_python(code, stdin=stdin, files=self.folder))

    def run_shell(self, command: str, *, stdin: str | bytes = "") -> Outcome:
        """Run a command line as `Sandbox.run_shell` does; each begins in the working folder."""
        return self._keep(self.sandbox.run_shell(command, stdin=stdin, files=self.folder))

    def _keep(self, outcome: Outcome) -> Outcome:
        self.folder = outcome.folder
        return outcome


def _watch(process: Process, limits: SandboxLimits) -> tuple[list[str], KilledWhy | None]:
    """Collect stdout and stderr until the program ends or a limit ends it; then kill every process of it."""
    streams = [_Stream(pipe, limits.output_bytes) for pipe in (process.popen.stdout, process.popen.stderr)]
    why: KilledWhy | None = None
    deadline = time.monotonic() + limits.seconds
    look = time.monotonic() + _LOOK
    with selectors.DefaultSelector() as selector, os.fdopen(os.pidfd_open(process.popen.pid), "rb", 0) as ended:
        selector.register(ended, selectors.EVENT_READ)
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        while why is None:
            ready = [key.fileobj for key, _ in selector.select(max(0.0, min(deadline, look) - time.monotonic()))]
            if ended in ready:
                break
            for one in ready:
                if isinstance(one, _Stream) and not one.read():
                    selector.unregister(one)
            if any(stream.full for stream in streams):
                why = "output"
            elif time.monotonic() >= deadline:
                why = "seconds"
            elif time.monotonic() >= look:
                why = process.excess()
                look = time.monotonic() + _LOOK
    process.kill()
    for stream in streams:
        while stream.read():
            pass
    if why is None and any(stream.full for stream in streams):
        why = "output"
    return [stream.text() for stream in streams], why


class _Stream:
    """The output of a pipe, up to a bound."""

    def __init__(self, pipe: IO[bytes] | None, most: int) -> None:
        assert pipe is not None
        os.set_blocking(pipe.fileno(), False)
        self.fileno = pipe.fileno
        self._most = most
        self._data = bytearray()

    @property
    def full(self) -> bool:
        return len(self._data) > self._most

    def read(self) -> bool:
        """Read some of what is there. False: there is no more, or no more is wanted."""
        try:
            chunk = os.read(self.fileno(), min(_CHUNK, self._most + 1 - len(self._data)))
        except BlockingIOError:
            return False
        self._data += chunk
        return bool(chunk) and not self.full

    def text(self) -> str:
        return self._data[: self._most].decode("utf-8", "replace")


def _replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which no program can be given, by `?`."""
    return text.encode("utf-8", "replace").decode()
