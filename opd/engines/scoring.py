"""Log-probs of given sequences from vLLM: a teacher that is asked, not held in memory.

A teacher behind vLLM gives the log-prob of the ids as they stand and its own top k, both at temperature 1: vLLM
computes a prompt's log-probs before any sampling setting. It does not give log-probs at ids of the caller's choice,
entropies or hidden states; a setting that needs them is refused by name. vLLM reads no cached prefix for such a
request, since a cached position has no logits, so that privileged contexts with a common beginning share nothing; hits
in the cache are counted all the same (`metrics`).
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain
from typing import Any

from opd.engines.vllm_http import FaultKind, Server, ServerFault, cached_tokens, read_logprob, weight_labels
from opd.errors import ConfigError, DataError, EngineError

OFFERED = ("sampled", "top_k")
SCORE_VALUES = 1 << 18
"""The most log-probs in flight at once (every id of a sequence has 1 + top_k), unless a single sequence has more."""
PROBE_EVERY = 0.5
PAUSE = 0.5
FLOOR = -9999.0
"""vLLM's servers send it in place of minus infinity; read as a number it would poison a mean."""


@dataclass(frozen=True, slots=True)
class Scores:
    """A teacher's scores at the N rows of one sequence, with K ids at each."""

    logprobs: list[float]
    """[N] nats: the log-prob of the id that follows each row."""
    top_ids: list[list[int]]
    """[N, K], the likeliest first; [N, 0] where no top k was asked for."""
    top_logprobs: list[list[float]]
    """[N, K] nats."""


def check_offered(form: str, *, temperature: float) -> None:
    """Raise ConfigError for a form of scores, or a temperature, that a teacher behind vLLM cannot answer."""
    if form not in OFFERED:
        raise ConfigError(f"a teacher served by vLLM cannot answer {form!r}. It answers: {', '.join(OFFERED)}.")
    if temperature != 1:
        raise ConfigError(
            f"a teacher served by vLLM answers at temperature 1, not {temperature:g}: vLLM ignores the sampling "
            "temperature in a prompt's log-probs. Use temperature 1 on both sides, or a local teacher."
        )


class VllmScorer:
    """Asks one or several servers with the same weights; at most `in_flight` sequences and `SCORE_VALUES` at once.

    The servers' weights must stay what they were at the first answer: teachers are never mixed.
    """

    def __init__(
        self, servers: Sequence[Server], *, vocabulary: int, retries: int, restart_timeout: float, in_flight: int = 8
    ) -> None:
        self._servers = list(servers)
        self._vocabulary = vocabulary
        self._retries = retries
        self._restart_timeout = restart_timeout
        self._in_flight = in_flight
        self._label: set[Any] | None = None
        self._lock = threading.Lock()
        self._seen: Counter[str] = Counter()

    def close(self) -> None:
        for server in self._servers:
            server.close()

    def metrics(self) -> dict[str, float]:
        """`prefix_hits`: the share of the scored ids since the last call that were found in the servers' caches.

        Empty where the servers do not tell. vLLM 0.32 finds none.
        """
        with self._lock:
            seen, self._seen = self._seen, Counter()
        return {"prefix_hits": seen["cached"] / seen["ids"]} if seen["ids"] else {}

    def score(
        self, sequences: Sequence[list[int]], rows: Sequence[list[int]], *, top_k: int | None = None
    ) -> list[Scores]:
        """Score each sequence at its rows, in order. Raises EngineError when a budget is spent."""
        check_rows(sequences, rows)
        waiting = deque(enumerate(zip(sequences, rows, strict=True)))
        asked: dict[Future[Scores], int] = {}
        found: dict[int, Scores] = {}
        with ThreadPoolExecutor(self._in_flight, thread_name_prefix="score") as threads:
            try:
                while waiting or asked:
                    held = sum(values(sequences[number], top_k) for number in asked.values())
                    while waiting and fits(held, values(waiting[0][1][0], top_k)):
                        number, (ids, own) = waiting.popleft()
                        asked[threads.submit(self._score_one, number, ids, own, top_k or 0)] = number
                        held += values(ids, top_k)
                    done, _ = wait(asked, return_when=FIRST_COMPLETED)
                    found |= {asked.pop(future): future.result() for future in done}
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        return [found[number] for number in range(len(sequences))]

    def _score_one(self, number: int, ids: list[int], rows: list[int], top_k: int) -> Scores:
        for attempt in range(self._retries + 1):
            server = self._servers[(number + attempt) % len(self._servers)]
            try:
                return self._ask(server, f"score-{number}", ids, rows, top_k)
            except ServerFault as fault:
                if fault.kind is FaultKind.REFUSED or attempt == self._retries:
                    raise EngineError(f"scoring failed {attempt + 1} times, at last with {fault}") from fault
                if fault.kind is FaultKind.LOST:
                    self._wait_for_any()
                else:
                    time.sleep(PAUSE * 2**attempt)
        raise AssertionError("unreachable")

    def _ask(self, server: Server, name: str, ids: list[int], rows: list[int], top_k: int) -> Scores:
        answer = server.generate(name, ids, scoring_settings(top_k))
        weights = weight_labels(answer["choices"][0])
        self._label = self._label or weights
        if weights != self._label:
            raise EngineError(f"{server.url} scored with the weights {weights}, others with {self._label}")
        cached = cached_tokens(answer)
        if cached is not None:
            with self._lock:
                self._seen.update(ids=len(ids), cached=cached)
        entries = answer.get("prompt_logprobs")
        if not isinstance(entries, list) or len(entries) != len(ids):
            size = len(entries) if isinstance(entries, list) else "no"
            raise ServerFault(FaultKind.BROKEN, f"{server.url} sent {size} positions for {len(ids)} ids")
        return scores_at([self._read_position(entries[row + 1]) for row in rows], [ids[row + 1] for row in rows], top_k)

    def _read_position(self, entry: Any) -> dict[int, tuple[float, int]]:
        if not isinstance(entry, dict):
            raise ServerFault(FaultKind.BROKEN, "a position came without log-probs")
        found = {}
        for token, scored in entry.items():
            if not (token.isdecimal() and int(token) < self._vocabulary and isinstance(scored, dict)):
                raise ServerFault(FaultKind.BROKEN, f"a position holds {token!r}, which is no id of {self._vocabulary}")
            found[int(token)] = read_logprob(scored.get("logprob")), _rank(scored.get("rank"))
        return found

    def _wait_for_any(self) -> None:
        deadline = time.monotonic() + self._restart_timeout
        while not any(server.healthy() for server in self._servers):
            if time.monotonic() > deadline:
                urls = ", ".join(server.url for server in self._servers)
                raise EngineError(f"none of the teacher's servers came back in {self._restart_timeout:g} s: {urls}")
            time.sleep(PROBE_EVERY)


def scoring_settings(top_k: int) -> dict[str, Any]:
    """The sampling settings of a request that is only scored; vLLM always samples one id."""
    return {"temperature": 1.0, "max_tokens": 1, "prompt_logprobs": top_k, "detokenize": False}


def values(ids: Sequence[int], top_k: int | None) -> int:
    """The number of log-probs that come back for a sequence: vLLM sends those of every id, whatever the rows."""
    return len(ids) * (1 + (top_k or 0))


def fits(held: int, more: int) -> bool:
    """True if a sequence of `more` values may be sent while `held` are in flight."""
    return not held or held + more <= SCORE_VALUES


def check_rows(sequences: Sequence[list[int]], rows: Sequence[list[int]]) -> None:
    """Raise DataError unless every row of every sequence has an id after it."""
    for ids, own in zip(sequences, rows, strict=True):
        if any(not 0 <= row < len(ids) - 1 for row in own):
            raise DataError(f"a sequence of {len(ids)} ids cannot be scored at rows {own}: each needs an id after it")


def scores_at(positions: Sequence[Mapping[int, tuple[float, int]]], targets: Sequence[int], top_k: int) -> Scores:
    """Make scores from (log-prob, rank) by id at each position. Raises ServerFault where one is missing."""
    logprobs, top_ids, top_logprobs = [], [], []
    for scored, target in zip(positions, targets, strict=True):
        ranked = sorted((rank, token) for token, (_, rank) in scored.items() if rank <= top_k)
        if target not in scored or len(ranked) < top_k:
            raise ServerFault(FaultKind.BROKEN, f"a position has {len(ranked)} of {top_k} ids, or lacks {target}")
        top = [token for _, token in ranked[:top_k]]
        logprobs.append(scored[target][0])
        top_ids.append(top)
        top_logprobs.append([scored[token][0] for token in top])
    if any(value <= FLOOR or value > 1e-3 for value in (*logprobs, *chain.from_iterable(top_logprobs))):
        raise ServerFault(FaultKind.BROKEN, "a log-prob is not one")
    return Scores(logprobs, top_ids, top_logprobs)


def _rank(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ServerFault(FaultKind.BROKEN, f"a log-prob has the rank {value!r}")
    return value
