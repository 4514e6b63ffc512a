"""What a launcher says of the processes that it started, checked before anything waits for them; and their roll call.

torch is imported when the roll is called.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from opd.errors import ConfigError, OpdError
from opd.ranks.ranks import started_ranks

T = TypeVar("T")

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The variables by which a launcher tells a process its place."""
JOIN_SECONDS = 600.0
"""The most seconds for which a rank waits for the others to come."""
_LATER = 20.0
"""Seconds that a launcher has to end the other ranks of a machine once the first has failed."""
_LINE_SECONDS = 10.0
"""Seconds between two lines that say who is still to come."""


def check_launcher() -> None:
    """Raise ConfigError where the variables of a launcher are there in part, or contradict each other."""
    count = started_ranks()
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        said = ", ".join(f"{name} = {os.environ[name]}" for name in NEEDED if os.environ.get(name))
        local = " Under srun: LOCAL_RANK=$SLURM_LOCALID (examples/slurm.sh)." if missing == ["LOCAL_RANK"] else ""
        raise ConfigError(
            f"{said}, but no {', '.join(missing)}: a launcher sets all of them, for each process that it starts. Start "
            f"the ranks by one (torchrun --nproc_per_node {max(2, count)} -m opd.launch.train FILE), or unset "
            f"{' and '.join(name for name in ('RANK', 'WORLD_SIZE') if os.environ.get(name))} for one process.{local}"
        )
    if int(os.environ["RANK"]) >= count:
        raise ConfigError(
            f"RANK = {os.environ['RANK']}, but WORLD_SIZE = {count}: ranks are numbered from 0 to {count - 1}"
        )
    port = os.environ["MASTER_PORT"]
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(f"MASTER_PORT = {port!r} is no port: 1 to 65535, the same for all ranks")


def before_joining(work: Callable[[], T]) -> T:
    """Run `work`, which every rank runs before they have met; the first rank of each machine raises its errors at once.

    The others have the same ones, and raise them later: by then a launcher has ended them, unless there is none.
    """
    try:
        return work()
    except OpdError:
        if os.environ.get("LOCAL_RANK") not in (None, "", "0"):
            time.sleep(_LATER)
        raise


def call_roll(seconds: float | None = None) -> Any:
    """Wait until every rank has come to MASTER_ADDR; return what must be held until torch has joined them there.

    Raises ConfigError naming the ranks that did not come within `seconds` (`JOIN_SECONDS`), or the place where nobody
    answers.
    """
    from torch.distributed import DistError, TCPStore

    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    waiting = _Waiting(f"{host}:{port} (MASTER_ADDR, MASTER_PORT)", JOIN_SECONDS if seconds is None else seconds)
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not serves and not _answers(host, port):
        waiting.on("rank 0" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" else "the launcher")
    try:  # torch opens another store at this port of this process: both are the same one
        store = TCPStore(
            host,
            port,
            is_master=serves,
            wait_for_workers=False,
            multi_tenant=True,
            timeout=timedelta(seconds=max(1.0, waiting.left)),
        )
    except DistError as error:
        raise ConfigError(
            f"the ranks cannot meet at {waiting.place}: {str(error).splitlines()[0]}. Choose another MASTER_PORT, the "
            "same for all of them"
        ) from error
    key = f"opd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{{}}"
    store.set(key.format(rank), "here")
    while missing := [n for n in range(count) if not store.check([key.format(n)])]:
        waiting.on(f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}")
    return store


class _Waiting:
    """Waits a moment at a time, says now and then for whom, and gives up in the end."""

    def __init__(self, place: str, seconds: float) -> None:
        self.place = place
        self.seconds = seconds
        self._until = time.monotonic() + seconds
        self._said = time.monotonic()

    @property
    def left(self) -> float:
        return self._until - time.monotonic()

    def on(self, whom: str) -> None:
        """Wait a moment for them. Raises ConfigError, naming them, once the time is up."""
        if self.left <= 0:
            raise ConfigError(
                f"{whom} of the {os.environ['WORLD_SIZE']} that WORLD_SIZE names did not come to {self.place} within "
                f"{self.seconds:.0f} s. Start all of them at about the same time (a launcher does), and see that "
                "their machines reach that address"
            )
        if time.monotonic() - self._said >= _LINE_SECONDS:
            self._said = time.monotonic()
            print(f"note: waiting for {whom} at {self.place}, {self.left:.0f} s more", file=sys.stderr, flush=True)
        time.sleep(min(0.1, self.left))


def _answers(host: str, port: int) -> bool:
    """True: somebody listens there. False: nobody does, or it cannot be reached (yet)."""
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except OSError:
        return False
