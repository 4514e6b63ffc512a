"""vLLM servers behind the engine's interface: one or many replicas, here or on other nodes.

A conversation stays with one replica, whose cache holds its prefix; conversations that begin alike start on the same
one while it is not much busier than the others. Each request waits in a thread of its own, so that a new turn is sent
as soon as it is submitted. A fault is retried within budgets (`rollout.vllm.retries`, `restart_timeout`) or raised as
EngineError; a replica that died is given the weights again before it samples.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial

from opd.engines.base import Completion, Request, Sampling, Weights
from opd.engines.config import VllmConfig
from opd.engines.vllm import completion, sampling_settings
from opd.engines.vllm_http import FaultKind, Server, ServerFault, cached_tokens, encoded, labels, sampled
from opd.engines.weights import in_chunks
from opd.errors import EngineError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 26
PROBE_EVERY = 0.5
MOST_STARTS = 2
"""How often a server of ours is started again while one waits for it."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
FAIR_LEAD = 4
"""How many more conversations than the least busy one a replica may have and still get those that begin alike."""


def _nothing() -> None:
    """The servers are not ours to end."""


def _not_ours() -> bool:
    """A server that somebody else starts."""
    return False


@dataclass(slots=True, eq=False)
class Replica:
    """A server and what is known of it."""

    server: Server
    restart: Callable[[], bool] = _not_ours
    """Starts it again if it is ours and has died; returns at once, with whether it did."""
    last_words: Callable[[], str] = str
    """What its log ends with, if it is ours."""
    label: str = ""
    """Which weights it holds; empty while it may hold anything."""
    epoch: int = 0
    """Counts how often it was found or made ready: a fault from before says nothing about now."""
    sessions: int = 0
    trouble: str = ""
    """The last fault."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held by whoever brings it back."""


@dataclass(slots=True, eq=False)
class _Flight:
    """A request on its way."""

    request: Request
    name: str
    replica: Replica
    future: Future[Completion] | None = None
    dropped: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Sharing:
    """Several ranks over the same servers: one of them sends the weights for all."""

    run: str
    """What the weights of this run are called, the same on all ranks."""
    sends: bool
    """Whether this rank gives its servers the weights; the others of a server only take part in gathering them."""
    wait: Callable[[], object]
    """Until every rank has come so far."""


class VllmServerEngine:
    """Samples from servers that are up or will be within `rollout.vllm.restart_timeout`.

    `model` holds the sizes of the model that trains (`opd.engines.vllm_http.sizes`), its vocabulary among them.
    `sharing` is given where there are fewer servers than ranks.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        config: VllmConfig,
        *,
        model: dict[str, int],
        concurrency: int,
        sharing: Sharing | None = None,
        on_close: Callable[[], None] = _nothing,
    ) -> None:
        self.policy_version = 0
        self._sharing = sharing
        self._config = config
        self._model = model
        self._replicas = list(replicas)
        self._on_close = on_close
        self._run = uuid.uuid4().hex[:12]  # another run's version 3 is not ours
        self._label = ""
        self._weights: Weights | None = None
        self._threads = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="vllm")
        self._flights: dict[int, _Flight] = {}
        self._homes: dict[int, Replica] = {}
        self._beginnings: dict[int, Replica] = {}
        self._faults: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._seen: Counter[str] = Counter()
        """Tokens of prompts, and of these in the cache."""
        self._sent = 0

    # -- rollouts --------------------------------------------------------------------------------------

    def begin(self, sampling: Sampling, stop_ids: frozenset[int]) -> None:
        self._check_idle("begin")
        if self._weights is None:
            raise RuntimeError("begin() before the servers were given weights")
        self._sampling = sampling
        self._stop_ids = stop_ids
        self._beginnings.clear()

    def submit(self, request: Request) -> None:
        if not request.prompt_ids or request.max_tokens < 1:
            raise ValueError(f"a request needs a prompt and room for a token, got {request}")
        if request.session in self._flights:
            raise RuntimeError(f"session {request.session} already has a request in flight")
        self._sent += 1
        flight = _Flight(request=request, name=f"{self._run}-{self._sent}", replica=self._home(request))
        self._flights[request.session] = flight
        flight.future = self._threads.submit(self._fly, flight)

    def step(self) -> list[Completion]:
        """The completions that have arrived, after a moment's wait for one."""
        flying = [flight.future for flight in self._flights.values() if flight.future is not None]
        if not flying:
            return []
        done, _ = wait(flying, timeout=0.1, return_when=FIRST_COMPLETED)
        arrived = [future.result() for future in done]
        for each in arrived:
            del self._flights[each.session]
        return arrived

    def release(self, session: int) -> None:
        """Forget a conversation; what it has in flight is aborted."""
        flight = self._flights.pop(session, None)
        home = self._homes.pop(session, None)
        if home is not None:
            home.sessions -= 1
        if flight is None or flight.future is None:
            return
        flight.dropped.set()
        if not flight.future.cancel() and not flight.future.done():
            try:
                flight.replica.server.abort(flight.name)
            except ServerFault as fault:
                logger.info("a request could not be aborted: %s", fault)

    def _home(self, request: Request) -> Replica:
        """The replica of a conversation: its own while that is up, else that of its like, else the least busy."""
        old = self._homes.get(request.session)
        if old is not None and old.label:
            return old
        home = self._new_home(hash(tuple(request.prompt_ids)))
        if old is not None:
            old.sessions -= 1
        home.sessions += 1
        self._homes[request.session] = home
        return home

    def _new_home(self, beginning: int) -> Replica:
        least = min(self._replicas, key=lambda replica: (not replica.label, replica.sessions))
        like = self._beginnings.get(beginning)
        if like is not None and like.label and like.sessions <= least.sessions + FAIR_LEAD:
            return like
        self._beginnings[beginning] = least
        return least

    def _fly(self, flight: _Flight) -> Completion:
        """On a thread: send a request until it is answered or its budget is spent."""
        for attempt in range(self._config.retries + 1):
            self._land_on_ready(flight)
            epoch = flight.replica.epoch
            try:
                return self._ask(flight)
            except ServerFault as fault:
                with self._counting:
                    self._faults[fault.kind] += 1
                last = attempt == self._config.retries or flight.dropped.is_set()
                if fault.kind is FaultKind.REFUSED or last:
                    raise EngineError(
                        f"a request failed {attempt + 1} times, at last with {fault} (kind: {fault.kind}; "
                        f"rollout.vllm.retries = {self._config.retries})"
                    ) from fault
                if fault.kind in (FaultKind.LOST, FaultKind.STALE):
                    self._lose(flight.replica, epoch, fault)
                else:
                    flight.dropped.wait(_pause(attempt))
        raise AssertionError("unreachable")

    def _land_on_ready(self, flight: _Flight) -> None:
        """Leave a replica that is lost for another, or wait until it is back."""
        if flight.replica.label != self._label:
            ready = [replica for replica in self._replicas if replica.label == self._label]
            if ready:
                flight.replica = min(ready, key=lambda replica: replica.sessions)
            else:
                self._bring_back(flight.replica)

    def _ask(self, flight: _Flight) -> Completion:
        server, request = flight.replica.server, flight.request
        settings = sampling_settings(request, self._sampling, self._stop_ids)
        answer = server.generate(flight.name, request.prompt_ids, settings)
        [choice] = answer["choices"]
        if labels(choice) != {self._label}:
            raise ServerFault(FaultKind.STALE, f"{server.url} sampled from {labels(choice)}, not {self._label}")
        ids, logprobs = sampled(choice, vocabulary=self._model["vocab_size"])
        try:
            done = completion(request, ids, logprobs, choice.get("finish_reason"), self._stop_ids, self.policy_version)
        except EngineError as error:
            raise ServerFault(FaultKind.BROKEN, f"{server.url}: {error}") from error
        cached = cached_tokens(answer)
        if cached is not None:
            with self._counting:
                self._seen.update(prompt=len(request.prompt_ids), cached=cached)
        return done

    # -- weights ---------------------------------------------------------------------------------------

    def update_weights(self, weights: Weights, version: int) -> None:
        """Give every replica that is up the weights; one that is down joins at a later update.

        The first update waits for all of them, a later one until there is one. Raises EngineError when that takes
        longer than `rollout.vllm.restart_timeout`, or when a server refuses the weights.
        """
        self._check_idle("update_weights")
        first = self._weights is None
        self._weights = weights
        self._label = f"{self._sharing.run if self._sharing else self._run}-{version}"
        self.policy_version = version
        for replica in self._replicas:
            replica.label = ""
        if self._sharing is None or self._sharing.sends:
            deadline = time.monotonic() + self._config.restart_timeout
            up = self._wait_for(self._replicas, len(self._replicas) if first else 1, deadline)
            self._push(up)
            if not any(replica.label for replica in self._replicas):
                self._bring_back(up[0])
        elif weights.collective:
            for _ in weights:
                pass  # gathered here as well, for the rank that sends them
        if self._sharing is not None:
            self._sharing.wait()
            for replica in self._replicas:
                self._bring_back(replica)

    def _push(self, replicas: Sequence[Replica]) -> None:
        """One pass over the weights to several replicas; one that fails on the way is left without a label."""
        assert self._weights is not None
        left = [r for r in replicas if _tried(r, partial(r.server.start_update, self._model))]
        for chunk in in_chunks(self._weights, CHUNK_BYTES):
            text = encoded(chunk)
            left = [replica for replica in left if _tried(replica, partial(replica.server.send_chunk, text))]
        for replica in left:
            if _tried(replica, partial(replica.server.finish_update, self._label)):
                replica.label = self._label
                replica.epoch += 1

    def _lose(self, replica: Replica, epoch: int, fault: ServerFault) -> None:
        """No more requests for a replica that is gone, or samples from other weights, until it is brought back."""
        with replica.lock:
            if replica.epoch == epoch:
                replica.label, replica.trouble = "", str(fault)
                logger.warning("%s: %s", fault.kind, fault)

    def _bring_back(self, replica: Replica) -> None:
        """Wait until a replica is up and holds the weights; threads that need the same one wait for each other.

        Raises EngineError after `rollout.vllm.restart_timeout` seconds, or `retries` + 1 updates that failed.
        """
        assert self._weights is not None
        deadline = time.monotonic() + self._config.restart_timeout
        pushed = 0
        with replica.lock:
            while replica.label != self._label:
                if time.monotonic() > deadline or pushed > self._config.retries:
                    raise EngineError(
                        f"{replica.server.url} did not take the weights in {pushed} attempts: {replica.trouble} "
                        f"(rollout.vllm.retries = {self._config.retries})"
                    )
                if pushed:
                    time.sleep(_pause(pushed - 1))
                self._wait_for([replica], 1, deadline)
                if self._holds_ours(replica):  # a broken connection is not a dead server
                    replica.label = self._label
                    replica.epoch += 1
                elif self._weights.collective or self._sharing is not None:
                    whose = "sharded ones" if self._weights.collective else "those of a server that ranks share"
                    raise EngineError(
                        f"{replica.server.url} lost its weights ({replica.trouble}), and {whose} cannot be sent "
                        "again in the middle of a step. Go on with --resume."
                    )
                else:
                    self._push([replica])
                    pushed += 1

    def _holds_ours(self, replica: Replica) -> bool:
        try:
            return bool(replica.server.label() == self._label)
        except ServerFault:
            return False

    def _wait_for(self, replicas: Sequence[Replica], count: int, deadline: float) -> list[Replica]:
        """Those that are up, once there are `count` of them. Raises EngineError for one that never gets so far."""
        starts: Counter[Replica] = Counter()
        while True:
            for replica in replicas:
                starts[replica] += replica.restart()
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

    # -- the rest --------------------------------------------------------------------------------------

    def sleep(self) -> None:
        """The servers' memory is their own."""

    def metrics(self) -> dict[str, float]:
        """`prefix_hits`: the share of the prompts' tokens that were found in the caches; `fault_<kind>`: how many
        requests failed and were sent again, by what was wrong.
        """
        with self._counting:
            faults, self._faults = self._faults, Counter()
            seen, self._seen = self._seen, Counter()
        hits = {"prefix_hits": seen["cached"] / seen["prompt"]} if seen["prompt"] else {}
        return hits | {f"fault_{kind}": float(count) for kind, count in faults.items()}

    def close(self) -> None:
        for flight in self._flights.values():
            flight.dropped.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for replica in self._replicas:
            replica.server.close()
        self._on_close()

    def _check_idle(self, call: str) -> None:
        if self._flights:
            raise RuntimeError(f"{call}() while requests are in flight")


def _pause(attempt: int) -> float:
    return float(min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE))


def _tried(replica: Replica, call: Callable[[], None]) -> bool:
    """Whether a call of an update went well. Raises EngineError when it never will."""
    try:
        call()
    except ServerFault as fault:
        if fault.kind is FaultKind.REFUSED:
            raise EngineError(f"the weights cannot be sent to {replica.server.url} (rollout.vllm): {fault}") from fault
        replica.trouble = str(fault)
        logger.warning("an update of the weights failed: %s", fault)
        return False
    return True
