"""The processes of a run: which of them this one is, and what they tell each other.

A launcher (`deepspeed`, `torchrun`, SLURM) starts the same program once for each rank, and says in the
environment who is who. Gradients and weights travel as DeepSpeed sends them; what is here is small (sums of a
few numbers, finished episodes, errors) and travels between CPUs over gloo, where waiting for a slow rank has
no short time limit: episodes of different ranks take as long as they take.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from math import fsum
from typing import Any, TypeVar

from opd.errors import ConfigError, OpdError

T = TypeVar("T")

_PATIENCE = timedelta(days=30)
"""How long a rank waits for the others' news. One that died is noticed by `opd.ranks.watch`, at once, not by waiting."""


class SharedError(OpdError):
    """What went wrong on one rank, raised on all of them; whoever prints errors prints it on the first alone."""


_LAUNCHERS = (
    *("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_"),
    *("CROSS_RANK", "CROSS_SIZE", "TORCHELASTIC_"),
)
"""How the variables begin by which launchers tell a process who it is."""


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that is none of the ranks: it must not wait for them, or answer for one."""
    return {name: value for name, value in environment.items() if not name.startswith(_LAUNCHERS)}


def started_ranks() -> int:
    """How many processes a launcher started for this run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


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
    if not told.isdecimal():
        raise ConfigError(f"LOCAL_RANK = {told!r} is no number of a rank on its machine: 0, 1, 2 and so on")
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
        """Whether this is the rank that prints, tracks and writes for all."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every `world_size`-th item from this rank's number on: by index, whatever they cost."""
        return list(items[self.rank :: self.world_size])

    def deal(self, shares: Sequence[Sequence[T]]) -> list[T]:
        """The reverse of `share`: the shares of all ranks, by rank, back in one order."""
        total = sum(map(len, shares))
        return [shares[i % self.world_size][i // self.world_size] for i in range(total)]

    def gather(self, value: T) -> list[T]:
        """What every rank brings, by rank; the same list on all of them."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def to_first(self, value: T) -> list[T]:
        """On the first rank what every rank brings; on the others nothing."""
        if self.group is None:
            return [value]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.world_size if self.first else None
        dist.gather_object(value, found, dst=0, group=self.group)
        return found or []

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks, in one order, so that all get the same bits."""
        return [fsum(column) for column in zip(*self.gather(values), strict=True)]

    def most(self, value: int) -> int:
        """The greatest value of any rank."""
        return max(self.gather(value))

    def any(self, value: bool) -> bool:
        """Whether it holds on any rank."""
        return any(self.gather(value))

    def agree(self, work: Callable[[], T]) -> T:
        """Do `work`, here and on every other rank; if it fails on one with an OpdError, it fails on all."""
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
        """What the first rank's `work` returns, on every rank; the others do nothing meanwhile."""
        mine = self.agree(work if self.first else lambda: None)
        return self.gather(mine)[0]  # type: ignore[return-value]

    def wait(self) -> None:
        """Until every rank has come to this point."""
        self.gather(None)


def _attempt(work: Callable[[], T]) -> tuple[T | OpdError, str | None]:
    try:
        return work(), None
    except OpdError as error:
        return error, str(error)


_joined: list[Ranks] = []


def join() -> Ranks:
    """Meet the other processes of the launch, once; later calls return the same.

    Without a launcher the group has one member, which DeepSpeed needs all the same. Raises ConfigError where
    DeepSpeed is not installed.
    """
    if not _joined:
        _joined.append(_meet())
    return _joined[0]


def _meet() -> Ranks:
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"several processes, or backend = deepspeed, need DeepSpeed ({error}): pip install 'opd[deepspeed]'"
        ) from error
    import logging
    import warnings

    import torch
    import torch.distributed as dist

    from opd.ranks import extensions
    from opd.ranks.watch import watch

    # DeepSpeed calls torch's collectives by names that torch is about to retire: that is no news for a user.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if "DS_LOG_LEVEL" not in os.environ:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    launched = "RANK" in os.environ  # else there is no launcher, not even of one process
    if not launched:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(local_device())}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    if not os.environ.get("LOCAL_RANK"):
        raise ConfigError(
            f"RANK = {os.environ['RANK']}, but no LOCAL_RANK says which of its machine's ranks this is. Set it where "
            "the ranks are started: LOCAL_RANK=$SLURM_LOCALID under srun (examples/slurm.sh)."
        )
    device, first = local_device(), not launched or int(os.environ["LOCAL_RANK"]) == 0
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device)  # DeepSpeed takes the GPU of this number
    extensions.prepare(first=first)
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    ranks = Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), group=group)
    if ranks.world_size > 1:
        watch(ranks)
    return ranks
