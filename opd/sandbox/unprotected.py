"""Mode "limits": a program with bounds in a temporary folder, and nothing between it and this machine."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from contextlib import suppress

from opd.errors import SandboxError
from opd.sandbox.process import Job, KilledWhy, Process, command, environment, sealed_file

WARNING = (
    'sandbox: "limits" is no sandbox. A program runs as you: it can read and write your files, see the memory and '
    "environment of your other processes and send them signals, use the network, and leave processes behind that "
    "outlive its time. Bounded are its time and output, and the memory, CPU time and file size of each of its "
    'processes, but not their number. Use it for programs that you trust, and "bwrap" for others.'
)


class Unprotected(Process):
    """One program with the kernel's limits, in a temporary folder. Raises SandboxError when it cannot start."""

    def __init__(self, job: Job, readable: Sequence[str]) -> None:
        super().__init__()
        self._job = job
        self._readable = readable
        self._base = tempfile.mkdtemp(prefix="opd-")
        self.held.callback(shutil.rmtree, self._base, ignore_errors=True)
        self._home, self._scratch = (os.path.join(self._base, name) for name in ("folder", "tmp"))
        for path in (self._home, self._scratch):
            os.mkdir(path, 0o700)
        self.folder, self.scratch = (
            os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (self._home, self._scratch)
        )
        for folder in (self.folder, self.scratch):
            self.held.callback(os.close, folder)

    def start(self) -> None:
        limits = self._job.limits.of_process(processes=None)
        argv = command(self._job, channel=-1, user=None, home=self._home, scratch=self._scratch, kernel_limits=limits)
        with sealed_file(self._job.stdin) as stdin:
            try:
                self.spawn(
                    argv,
                    stdin=stdin,
                    env=environment(self._home, self._scratch, self._readable),
                    start_new_session=True,
                )
            except OSError as error:
                raise SandboxError(f"a program could not be started: {error}") from error

    def excess(self) -> KilledWhy | None:
        return None

    def kill(self) -> None:
        """End the program's process group; a process that left it stays."""
        if self.popen.returncode is None:  # until it is waited for, its number is nobody else's
            with suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()
