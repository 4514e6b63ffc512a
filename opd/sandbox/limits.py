"""The bounds on what an untrusted program may use of the machine."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from opd.errors import ConfigError

_MB = 1 << 20
_OPEN_FILES = 128  # per process; socket and pipe buffers are the kernel's memory, which only this bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """Bounds of one run. Raises ConfigError for a bound that is not a number above 0."""

    seconds: float = 10.0
    """Wall time, after which every process of the run is killed."""
    cpu_seconds: int = 10
    """CPU time of each process."""
    memory_mb: int = 512
    """Address space of each process, and resident memory of all processes together."""
    processes: int = 32
    """Processes and threads that are alive at one time."""
    output_kb: int = 256
    """Size of stdout, and of stderr; a program that writes more is killed."""
    folder_mb: int = 64
    """Size of the working folder, of any file, and of /tmp. It is memory, beside `memory_mb`."""
    files: int = 2000
    """Files and folders in the working folder, and in /tmp."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            wanted = (int, float) if field.name == "seconds" else int
            if not isinstance(value, wanted) or isinstance(value, bool) or not 0 < value < 1 << 40:
                kind = "number" if field.name == "seconds" else "whole number"
                raise ConfigError(f"limits.{field.name} = {value!r} must be a {kind} above 0")

    @classmethod
    def of(cls, value: SandboxLimits | Mapping[str, Any] | None) -> SandboxLimits:
        """Make limits from a mapping, as YAML holds it. Raises ConfigError for an unknown name."""
        if isinstance(value, SandboxLimits):
            return value
        known = [field.name for field in fields(cls)]
        for name in value or {}:
            if name not in known:
                near = get_close_matches(str(name), known, n=1)
                hint = f' Did you mean "{near[0]}"?' if near else ""
                raise ConfigError(f"limits: there is no {name!r}. Allowed: {', '.join(known)}.{hint}")
        return cls(**(value or {}))

    @property
    def folder_bytes(self) -> int:
        return self.folder_mb * _MB

    @property
    def memory_bytes(self) -> int:
        return self.memory_mb * _MB

    @property
    def output_bytes(self) -> int:
        return self.output_kb << 10

    def of_process(self, *, processes: int | None) -> dict[int, tuple[int, int]]:
        """The kernel's limits for each process, `RLIMIT_*: (soft, hard)`, within the limits of this process.

        `processes` is left out where the kernel would count other people's too.
        """
        wanted = {
            resource.RLIMIT_AS: (self.memory_bytes,) * 2,
            # A signal that names the reason comes a second before the one that cannot be caught.
            resource.RLIMIT_CPU: (self.cpu_seconds, self.cpu_seconds + 1),
            resource.RLIMIT_FSIZE: (self.folder_bytes,) * 2,
            resource.RLIMIT_NOFILE: (_OPEN_FILES,) * 2,
            resource.RLIMIT_CORE: (0, 0),
            resource.RLIMIT_MSGQUEUE: (0, 0),
        }
        if processes is not None:
            wanted[resource.RLIMIT_NPROC] = (processes, processes)
        return {limit: (_lowered(limit, soft), _lowered(limit, hard)) for limit, (soft, hard) in wanted.items()}


def _lowered(limit: int, value: int) -> int:
    """Lower a limit to what this process may set for others: never above its own hard limit."""
    hardest = resource.getrlimit(limit)[1]
    return value if hardest == resource.RLIM_INFINITY else min(value, hardest)
