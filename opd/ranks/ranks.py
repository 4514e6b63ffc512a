"""The processes of a run: the number of this one, and the exchange of small values between them.

A launcher (`deepspeed`, `torchrun`, SLURM) starts the same program once for each rank, and says in the
environment which rank each process is. DeepSpeed sends gradients and weights. The values here are small (sums of a
few numbers, finished episodes, errors) and travel between CPUs over gloo, without a short time limit: episodes of
different ranks take as long as they take.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any, TypeVar

from opd.errors import ConfigError, OpdError

T = TypeVar("T")


class SharedError(OpdError):
    """An error of one rank, raised on all of them; only the first rank prints it."""


_LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_"),
    *("CROSS_RANK", "CROSS_SIZE", "TORCHELASTIC_"),
)
"""Prefixes of the variables by which launchers tell a process its rank."""


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """Remove a launcher's variables, for a process that is no rank: it must not wait for others or answer for one."""
    return {name: value for name, value in environment.items() if not name.startswith(_LAUNCHERS)}


def started_ranks() -> int:
    """The number of processes that a launcher started for this run; 1 without a launcher.

    Raises ConfigError where WORLD_SIZE or RANK is no number.
    """
    told = {name: os.environ.get(name) or default for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"))}
    for name, value in told.items():
        if not is_number(value) or (name == "WORLD_SIZE" and int(value) < 1):
            raise ConfigError(f"{name} = {value[:40]!r} is no number of processes, as a launcher sets it. Unset it")
    return int(told["WORLD_SIZE"])


def is_number(told: str) -> bool:
    """True for what a launcher may set a variable to: a few digits."""
    return told.isascii() and told.isdecimal() and len(told) < 10


def local_device() -> int:
    """The index of this process's own GPU among those that it sees; without a GPU, its number on its machine.

    A process that sees a single GPU was given that one by its launcher (`srun --gpus-per-task=1`); else LOCAL_RANK
    says which, as torchrun and deepspeed set it; without a launcher it is the current one. Raises ConfigError where
    LOCAL_RANK is no number, or that of a GPU that this process does not see.
    """
    import torch

    told, gpus = os.environ.get("LOCAL_RANK"), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not told:
        return torch.cuda.current_device() if gpus else 0
    if not is_number(told):
        raise ConfigError(f"LOCAL_RANK = {told[:40]!r} is no number of a rank on its machine: 0, 1, 2 and so on")
    if gpus == 1:
        return 0
    if gpus and int(told) >= gpus:
        raise ConfigError(
            f"LOCAL_RANK = {told}, but this process sees {gpus} GPUs (CUDA_VISIBLE_DEVICES = "
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}). Start at most {gpus} ranks on this machine, show "
            "every rank all of its GPUs, or show each rank its own alone."
        )
    return int(told)


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the others. By default it is alone, and every exchange is with itself."""

    rank: int = 0
    world_size: int = 1
    group: Any = None
    """The gloo process group; None when alone."""

    @property
    def first(self) -> bool:
        """True for the rank that prints, tracks and writes for all."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Take every `world_size`-th item, from this rank's number on: by index, whatever the items cost."""
        return list(items[self.rank :: self.world_size])

    def deal(self, shares: Sequence[Sequence[T]]) -> list[T]:
        """Undo `share`: put the shares of all ranks, listed by rank, back in one order."""
        total = sum(map(len, shares))
        return [shares[i % self.world_size][i // self.world_size] for i in range(total)]

    def gather(self, value: T) -> list[T]:
        """Collect every rank's value, by rank; all ranks get the same list."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def to_first(self, value: T) -> list[T]:
        """Collect every rank's value on the first rank; the others get an empty list."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.world_size if self.first else None
        dist.gather_object(value, found, dst=0, group=self.group)
        return found or []

    def sum(self, values: list[float]) -> list[float]:
        """Sum each value over all ranks, in one order, so that all get the same bits."""
        return [fsum(column) for column in zip(*self.gather(values), strict=True)]

    def most(self, value: int) -> int:
        """The greatest value of any rank."""
        return max(self.gather(value))

    def any(self, value: bool) -> bool:
        """True if `value` is true on any rank."""
        return any(self.gather(value))

    def agree(self, work: Callable[[], T]) -> T:
        """Run `work`, which every rank runs; if one rank raises an OpdError, all raise it."""
        result, error = _attempt(work)
        errors = self.gather(error)
        failed = [rank for rank, text in enumerate(errors) if text is not None]
        if failed:
            if self.world_size == 1:
                assert isinstance(result, OpdError)
                raise result
            where = "" if failed[0] == 0 else f"rank {failed[0]}: "
            shared, own = SharedError(f"{where}{errors[failed[0]]}"), result if isinstance(result, OpdError) else None
            shared.exit_code = (own or shared).exit_code
            raise shared from own
        return result  # type: ignore[return-value]

    def from_first(self, work: Callable[[], T]) -> T:
        """Run `work` on the first rank alone and return its result on every rank."""
        mine = self.agree(work if self.first else lambda: None)
        return self.gather(mine)[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Wait until every rank has come to this point."""
        self.gather(None)


def _attempt(work: Callable[[], T]) -> tuple[T | OpdError, str | None]:
    try:
        return work(), None
    except OpdError as error:
        return error, str(error)
