"""The servers of one engine: which of them hold the current weights, and how one that was lost is brought back.

Which requests go to which replica is in `opd.engines.vllm_server`, the calls to one server in `opd.engines.vllm_http`.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from opd.engines.base import Weights
from opd.engines.config import VllmConfig
from opd.engines.vllm_http import FaultKind, Server, ServerFault, encode_weights
from opd.engines.weights import in_chunks
from opd.errors import EngineError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 26
PROBE_EVERY = 0.5
"""Seconds between two looks at a server that is not up yet."""
MOST_STARTS = 2
"""The number of times that a server of ours is started again while one waits for it."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
"""Seconds."""


def _not_ours() -> bool:
    """Restart nothing: somebody else starts this server."""
    return False


@dataclass(slots=True, eq=False)
class Replica:
    """A server and what is known of it."""

    server: Server
    restart: Callable[[], bool] = _not_ours
    """Starts the server again if it is ours and has died; returns at once. True: it was started."""
    last_words: Callable[[], str] = str
    """The end of the server's log, if it is ours."""
    label: str = ""
    """The name of the weights that it holds; empty while it may hold anything."""
    epoch: int = 0
    """Counts how often it was found or made ready: a fault from before says nothing about now."""
    sessions: int = 0
    trouble: str = ""
    """The last fault."""
    new: bool = True
    """True: it has not held the run's weights since it started, or since it was lost."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by the thread that brings it back."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """Several ranks over the same servers: one of them sends the weights for all."""

    run: str
    """The name of this run's weights, the same on all ranks."""
    sends: bool
    """True: this rank gives its servers the weights. False: it only takes part in gathering them."""
    wait: Callable[[], object]
    """Returns once every rank has called it."""


class Replicas:
    """Gives servers the weights, and gives them again to one that lost them.

    `model` holds the sizes of the model that trains (`opd.engines.vllm_http.sizes`). `update` is called while no
    request is on its way; `lose` and `bring_back` come from any thread.
    """

    def __init__(
        self, replicas: Sequence[Replica], config: VllmConfig, *, model: dict[str, int], sharing: Sharing | None
    ) -> None:
        self.all = list(replicas)
        self.run = uuid.uuid4().hex[:12]  # another run's version 3 is not ours
        self.label = ""
        """The name of the weights that every replica should hold; empty before the first update."""
        self.revived = 0
        """How often a new replica was found to hold the run's weights."""
        self._config = config
        self._model = model
        self._sharing = sharing
        self._weights: Weights | None = None

    def update(self, weights: Weights, version: int) -> None:
        """Give every replica that is up the weights; one that is down joins at a later update.

        The first update waits for all of them, a later one until there is one. Raises EngineError when that takes
        longer than `rollout.vllm.restart_timeout`, or when a server refuses the weights.
        """
        first = self._weights is None
        self._weights = weights
        self.label = f"{self._sharing.run if self._sharing else self.run}-{version}"
        for replica in self.all:
            replica.label = ""
        if self._sharing is None or self._sharing.sends:
            deadline = time.monotonic() + self._config.restart_timeout
            up = self._wait_for(self.all, len(self.all) if first else 1, deadline)
            self._push(up)
            if not self.ready():
                self.bring_back(up[0])
        elif weights.collective:
            for _ in weights:
                pass  # gathered here as well, for the rank that sends them
        if self._sharing is not None:
            self._sharing.wait()
            for replica in self.all:
                self.bring_back(replica)

    def ready(self) -> list[Replica]:
        """The replicas that hold the current weights."""
        return [replica for replica in self.all if replica.label == self.label]

    def lose(self, replica: Replica, epoch: int, fault: ServerFault) -> None:
        """Send a replica that is gone, or samples from other weights, no more requests until it is brought back."""
        with replica.lock:
            if replica.epoch == epoch:
                replica.label, replica.trouble, replica.new = "", str(fault), True
                logger.warning("%s: %s", fault.kind, fault)

    def bring_back(self, replica: Replica) -> None:
        """Wait until a replica is up and holds the weights; threads that need the same one wait for each other.

        Raises EngineError after `rollout.vllm.restart_timeout` seconds, or `retries` + 1 updates that failed.
        """
        assert self._weights is not None
        deadline = time.monotonic() + self._config.restart_timeout
        pushed = 0
        with replica.lock:
            while replica.label != self.label:
                if time.monotonic() > deadline or pushed > self._config.retries:
                    raise EngineError(
                        f"{replica.server.url} did not take the weights in {pushed} attempts: {replica.trouble} "
                        f"(rollout.vllm.retries = {self._config.retries})"
                    )
                if pushed:
                    time.sleep(pause_seconds(pushed - 1))
                self._wait_for([replica], 1, deadline)
                if self._holds_ours(replica):  # a broken connection is not a dead server
                    self._mark_ready(replica)
                elif self._weights.collective or self._sharing is not None:
                    whose = "sharded ones" if self._weights.collective else "those of a server that ranks share"
                    raise EngineError(
                        f"{replica.server.url} lost its weights ({replica.trouble}), and {whose} cannot be sent "
                        "again in the middle of a step. Go on with --resume."
                    )
                else:
                    self._push([replica])
                    pushed += 1

    def close(self) -> None:
        """Close the connections; the servers themselves stay."""
        for replica in self.all:
            replica.server.close()

    def _push(self, replicas: Sequence[Replica]) -> None:
        """Send several replicas the weights in one pass; one that fails on the way is left without a label."""
        assert self._weights is not None
        left = [r for r in replicas if _try_update(r, partial(r.server.start_update, self._model))]
        for chunk in in_chunks(self._weights, CHUNK_BYTES):
            text = encode_weights(chunk)
            left = [replica for replica in left if _try_update(replica, partial(replica.server.send_chunk, text))]
        for replica in left:
            if _try_update(replica, partial(replica.server.finish_update, self.label)):
                self._mark_ready(replica)

    def _mark_ready(self, replica: Replica) -> None:
        replica.label = self.label
        replica.epoch += 1
        self.revived += replica.new
        replica.new = False

    def _holds_ours(self, replica: Replica) -> bool:
        try:
            return bool(replica.server.label() == self.label)
        except ServerFault:
            return False

    def _wait_for(self, replicas: Sequence[Replica], count: int, deadline: float) -> list[Replica]:
        """Wait until `count` of these are up; return those that are. Raises EngineError at the deadline."""
        starts: Counter[Replica] = Counter()
        while True:
            for replica in replicas:
                restarted = replica.restart()
                replica.new |= restarted
                starts[replica] += restarted
                if starts[replica] > MOST_STARTS:
                    raise EngineError(
                        f"a server of this run (its settings: rollout.vllm) ended {starts[replica]} times before it "
                        f"was up. {replica.last_words()}"
                    )
            up = [replica for replica in replicas if replica.server.healthy()]
            if len(up) >= count:
                return up
            if time.monotonic() > deadline:
                down = [replica for replica in replicas if replica not in up]
                urls = ", ".join(replica.server.url for replica in down)
                words = " ".join(filter(None, (replica.last_words() for replica in down)))
                raise EngineError(
                    f"{urls} did not come up within rollout.vllm.restart_timeout = "
                    f"{self._config.restart_timeout:g} seconds. {words or 'Start it with `opd serve`.'} "
                    "Go on with --resume."
                )
            time.sleep(PROBE_EVERY)


def pause_seconds(attempt: int) -> float:
    """Seconds to wait after attempt 0, 1, 2, …: twice as long each time, up to `LONGEST_PAUSE`."""
    return float(min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE))


def _try_update(replica: Replica, call: Callable[[], None]) -> bool:
    """True: this call of an update succeeded. False: it failed for now. Raises EngineError when it never will."""
    try:
        call()
    except ServerFault as fault:
        if fault.kind is FaultKind.REFUSED:
            raise EngineError(f"the weights cannot be sent to {replica.server.url} (rollout.vllm): {fault}") from fault
        replica.trouble = str(fault)
        logger.warning("an update of the weights failed: %s", fault)
        return False
    return True
