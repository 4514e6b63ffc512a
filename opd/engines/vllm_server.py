"""vLLM servers behind the engine's interface: one or many replicas, here or on other nodes.

A conversation stays with one replica, whose cache holds its prefix; conversations that begin alike start on the same
one while it is not much busier than the others. Each request waits in a thread of its own, so that a new turn is sent
as soon as it is submitted. A fault is retried within budgets (`rollout.vllm.retries`, `restart_timeout`) or raised as
EngineError. `opd.engines.vllm_replicas` gives servers the weights and brings back those that died.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from opd.engines.base import Completion, Request, Sampling, Weights, check_request
from opd.engines.config import VllmConfig
from opd.engines.vllm import completion, sampling_settings
from opd.engines.vllm_http import FaultKind, ServerFault, cached_tokens, read_ids, weight_labels
from opd.engines.vllm_replicas import Replica, Replicas, Sharing, pause_seconds
from opd.errors import EngineError

logger = logging.getLogger(__name__)

FAIR_LEAD = 4
"""How many more conversations than the least busy one a replica may have and still get those that begin alike."""


def _end_nothing() -> None:
    """End nothing: the servers are somebody else's."""


@dataclass(slots=True, eq=False)
class _Flight:
    """A request on its way."""

    request: Request
    name: str
    replica: Replica
    future: Future[Completion] | None = None
    dropped: threading.Event = field(default_factory=threading.Event)


class _Homes:
    """Chooses a conversation's replica: its own while that is up, else that of its like, else the least busy."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas
        self._by_session: dict[int, Replica] = {}
        self._by_beginning: dict[int, Replica] = {}

    def begin_round(self) -> None:
        """Forget where conversations of the last round began."""
        self._by_beginning.clear()

    def find(self, request: Request) -> Replica:
        """The replica to which this request goes; the conversation lives there from now on."""
        old = self._by_session.get(request.session)
        if old is not None and old.label:
            return old
        home = self._choose(hash(tuple(request.prompt_ids)))
        if old is not None:
            old.sessions -= 1
        home.sessions += 1
        self._by_session[request.session] = home
        return home

    def leave(self, session: int) -> None:
        home = self._by_session.pop(session, None)
        if home is not None:
            home.sessions -= 1

    def _choose(self, beginning: int) -> Replica:
        least = min(self._replicas, key=lambda replica: (not replica.label, replica.sessions))
        like = self._by_beginning.get(beginning)
        if like is not None and like.label and like.sessions <= least.sessions + FAIR_LEAD:
            return like
        self._by_beginning[beginning] = least
        return least


class _Tally:
    """Counts, from any thread, what the metrics of an engine tell."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        """Counts the tokens of prompts, and those of them in the cache."""

    def add_fault(self, kind: FaultKind) -> None:
        with self._lock:
            self._faults[kind] += 1

    def add_prompt(self, tokens: int, cached: int) -> None:
        with self._lock:
            self._tokens.update(prompt=tokens, cached=cached)

    def take(self) -> dict[str, float]:
        """The metrics since the last call: `VllmServerEngine.metrics`."""
        with self._lock:
            faults, self._faults = self._faults, Counter()
            tokens, self._tokens = self._tokens, Counter()
        hits = {"prefix_hits": tokens["cached"] / tokens["prompt"]} if tokens["prompt"] else {}
        return hits | {f"fault_{kind}": float(count) for kind, count in faults.items()}


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
        on_close: Callable[[], None] = _end_nothing,
    ) -> None:
        self.policy_version = 0
        self.copies = len(replicas)
        self._retries = config.retries
        self._vocabulary = model["vocab_size"]
        self._replicas = Replicas(replicas, config, model=model, sharing=sharing)
        self._homes = _Homes(self._replicas.all)
        self._on_close = on_close
        self._threads = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="vllm")
        self._flights: dict[int, _Flight] = {}
        self._tally = _Tally()
        self._sent = 0

    @property
    def revived(self) -> int:
        return self._replicas.revived

    def begin(self, sampling: Sampling, stop_ids: frozenset[int]) -> None:
        self._check_idle("begin")
        if not self._replicas.label:
            raise RuntimeError("begin() before the servers were given weights")
        self._sampling = sampling
        self._stop_ids = stop_ids
        self._homes.begin_round()

    def submit(self, request: Request) -> None:
        check_request(request)
        if request.session in self._flights:
            raise RuntimeError(f"session {request.session} already has a request in flight")
        self._sent += 1
        name = f"{self._replicas.run}-{self._sent}"
        flight = _Flight(request=request, name=name, replica=self._homes.find(request))
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
        """Forget a conversation and abort what it has in flight."""
        flight = self._flights.pop(session, None)
        self._homes.leave(session)
        if flight is None or flight.future is None:
            return
        flight.dropped.set()
        if not flight.future.cancel() and not flight.future.done():
            try:
                flight.replica.server.abort(flight.name)
            except ServerFault as fault:
                logger.info("a request could not be aborted: %s", fault)

    def _fly(self, flight: _Flight) -> Completion:
        """Send a request until it is answered or its budget is spent; runs on a thread of its own."""
        for attempt in range(self._retries + 1):
            self._land_on_ready(flight)
            epoch = flight.replica.epoch
            try:
                return self._ask(flight)
            except ServerFault as fault:
                self._tally.add_fault(fault.kind)
                last = attempt == self._retries or flight.dropped.is_set()
                if fault.kind is FaultKind.REFUSED or last:
                    raise EngineError(
                        f"a request failed {attempt + 1} times, at last with {fault} (kind: {fault.kind}; "
                        f"rollout.vllm.retries = {self._retries})"
                    ) from fault
                if fault.kind in (FaultKind.LOST, FaultKind.STALE):
                    self._replicas.lose(flight.replica, epoch, fault)
                else:
                    flight.dropped.wait(pause_seconds(attempt))
        raise AssertionError("unreachable")

    def _land_on_ready(self, flight: _Flight) -> None:
        """Leave a replica that is lost for another, or wait until it is back."""
        if flight.replica.label != self._replicas.label:
            ready = self._replicas.ready()
            if ready:
                flight.replica = min(ready, key=lambda replica: replica.sessions)
            else:
                self._replicas.bring_back(flight.replica)

    def _ask(self, flight: _Flight) -> Completion:
        server, request = flight.replica.server, flight.request
        settings = sampling_settings(request, self._sampling, self._stop_ids)
        answer = server.generate(flight.name, request.prompt_ids, settings)
        [choice] = answer["choices"]
        label = self._replicas.label
        if weight_labels(choice) != {label}:
            raise ServerFault(FaultKind.STALE, f"{server.url} sampled from {weight_labels(choice)}, not {label}")
        ids, logprobs = read_ids(choice, vocabulary=self._vocabulary)
        try:
            done = completion(request, ids, logprobs, choice.get("finish_reason"), self._stop_ids, self.policy_version)
        except EngineError as error:
            raise ServerFault(FaultKind.BROKEN, f"{server.url}: {error}") from error
        cached = cached_tokens(answer)
        if cached is not None:
            self._tally.add_prompt(len(request.prompt_ids), cached)
        return done

    def update_weights(self, weights: Weights, version: int) -> None:
        """Give the servers the weights (`opd.engines.vllm_replicas.Replicas.update`)."""
        self._check_idle("update_weights")
        self.policy_version = version
        self._replicas.update(weights, version)

    def sleep(self) -> None:
        """Do nothing: the servers' memory is their own."""

    def metrics(self) -> dict[str, float]:
        """`prefix_hits`: the share of the prompts' tokens that were found in the caches; `fault_<kind>`: how many
        requests failed and were sent again, by what was wrong.
        """
        return self._tally.take()

    def close(self) -> None:
        for flight in self._flights.values():
            flight.dropped.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._replicas.close()
        self._on_close()

    def _check_idle(self, call: str) -> None:
        if self._flights:
            raise RuntimeError(f"{call}() while requests are in flight")
