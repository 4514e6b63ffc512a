"""The calls to one vLLM server, and the kinds of fault where it does not answer them.

Answers are read as a stranger's: bounded in size, checked in form, never padded and never cut.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import httpx
from safetensors.torch import save as to_safetensors

from opd.engines.weights import Named

CONNECT_SECONDS = 10.0
PROBE_SECONDS = 5.0
ANSWER_BYTES = 1 << 28
"""A longer answer is a fault; the log-probs of any sequence take less."""


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
OTHER_MODEL = "the server holds another model than the one that trains"
NO_RECEIVER = ("Weight transfer not configured", "Invalid init_info")
"""vLLM's messages where it was started without the receiver of `opd.engines.vllm_worker`, or with another one."""


def sizes(config: Any) -> dict[str, int]:
    """The sizes that a server's model must share with the one that trains, from a transformers configuration."""
    found = {name: getattr(config, name, None) for name in SIZES}
    return {name: value for name, value in found.items() if isinstance(value, int)}


class FaultKind(StrEnum):
    """The kinds of fault, told apart by what mends them."""

    LOST = "lost"
    """No connection, or one that broke: the server died, or is not up yet."""
    LATE = "late"
    """No answer within the time limit."""
    BUSY = "busy"
    """The server cannot answer now: status 429 or any 5xx."""
    REFUSED = "refused"
    """The server will never do this: any other status. Sending it again would not help."""
    BROKEN = "broken"
    """The answer does not fit the request: not JSON, other lengths, not a number."""
    STALE = "stale"
    """The server answered from other weights than it was given last."""


class ServerFault(Exception):
    """A failed request. It never leaves the engine, which retries it or raises EngineError."""

    def __init__(self, kind: FaultKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Server:
    """The calls to one server. Safe to use from several threads."""

    def __init__(self, url: str, *, key: str | None, timeout: float, connections: int) -> None:
        self.url = url.rstrip("/")
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
            # Below the 5 seconds after which the server hangs up on an idle connection.
            limits=httpx.Limits(max_connections=connections, keepalive_expiry=2.0),
            trust_env=False,  # a proxy must see neither the key nor the weights
        )

    def close(self) -> None:
        self._client.close()

    def healthy(self) -> bool:
        """True if the server answers at all."""
        try:
            return self._client.get("/health", timeout=PROBE_SECONDS).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def generate(self, name: str, token_ids: Sequence[int], settings: dict[str, Any]) -> dict[str, Any]:
        """Send one request of token ids; return its answer, whose form is checked as far as its first choice."""
        body = {"request_id": name, "token_ids": list(token_ids), "sampling_params": settings}
        answer = self._post("/inference/v1/generate", body)
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise ServerFault(FaultKind.BROKEN, f"{self.url} answered without a choice")
        return answer

    def abort(self, name: str) -> None:
        """Tell the server that nobody waits for a request any more."""
        self._post("/inference/v1/abort_requests", {"request_ids": [name]})

    def label(self) -> Any:
        """Ask for the name of the weights that the server holds, as `finish_update` gave it."""
        return self._call("GET", "/weight_info").get("weight_version")

    def start_update(self, model: dict[str, int]) -> None:
        """Stop sampling and open an update; one that broke off is closed first. `model`: the `sizes` of ours."""
        try:
            self._post("/init_weight_transfer_engine", {"init_info": {"sizes": model}})
        except ServerFault as fault:
            _, other, why = str(fault).partition(OTHER_MODEL)
            if other:
                wrong = f"{OTHER_MODEL}{why.partition(chr(39))[0]}"
            elif any(text in str(fault) for text in NO_RECEIVER):
                wrong = "the server was not started to take the weights of a run"
            else:
                raise
            detail = f"{self.url}: {wrong}. Start it with `opd serve` on the run's file"
            raise ServerFault(FaultKind.REFUSED, detail) from fault
        self._post("/pause?mode=abort", {})
        try:
            self._post("/start_weight_update", {})
        except ServerFault as fault:
            if fault.kind is not FaultKind.BUSY:
                raise
            self._post("/finish_weight_update", {})
            self._post("/start_weight_update", {})

    def send_chunk(self, safetensors: str) -> None:
        """Send some weights, as `encode_weights` makes them."""
        self._post("/update_weights", {"update_info": {"safetensors": safetensors}})

    def finish_update(self, label: str) -> None:
        """Close an update, forget cached prefixes of the old weights, sample again, and only then name the new ones."""
        self._post("/update_weights", {"update_info": {"last": True}})
        self._post("/finish_weight_update", {})
        if not self._post("/reset_prefix_cache", {}).get("success"):
            raise ServerFault(FaultKind.BUSY, f"{self.url} still holds cached prefixes of the old weights")
        self._post("/resume", {})
        self._post("/update_weight_version", {"new_version": label})

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._call("POST", path, json=body)

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            with self._client.stream(method, path, **options) as response:
                raw = self._read(response)
        except httpx.TimeoutException as error:
            kind = FaultKind.LOST if isinstance(error, httpx.ConnectTimeout) else FaultKind.LATE
            raise ServerFault(kind, f"{self.url}{path} did not answer in time: {error!r}") from error
        except httpx.TransportError as error:
            raise ServerFault(FaultKind.LOST, f"{self.url}{path} cannot be reached: {error!r}") from error
        if response.status_code != httpx.codes.OK:
            busy = response.status_code == httpx.codes.TOO_MANY_REQUESTS or response.is_server_error
            text = raw[:500].decode(errors="replace")
            raise ServerFault(
                FaultKind.BUSY if busy else FaultKind.REFUSED,
                f"{self.url}{path} answered with status {response.status_code}: {text}",
            )
        return self._parse(path, raw)

    def _read(self, response: httpx.Response) -> bytes:
        raw = bytearray()
        for piece in response.iter_bytes():
            raw += piece
            if len(raw) > ANSWER_BYTES:
                raise ServerFault(FaultKind.BROKEN, f"{self.url} answered with more than {ANSWER_BYTES} bytes")
        return bytes(raw)

    def _parse(self, path: str, raw: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(raw or b"{}")
        except (ValueError, RecursionError) as error:
            raise ServerFault(FaultKind.BROKEN, f"{self.url}{path} answered with what is not JSON: {error}") from error
        if not isinstance(answer, dict):
            raise ServerFault(FaultKind.BROKEN, f"{self.url}{path} answered with a {type(answer).__name__}")
        return answer


def encode_weights(chunk: Sequence[Named]) -> str:
    """Encode weights as a safetensors file in base64. Pickle would let a sender run code."""
    return base64.b64encode(to_safetensors({name: t.detach().cpu().contiguous() for name, t in chunk})).decode()


def read_ids(choice: dict[str, Any], *, vocabulary: int) -> tuple[list[int], list[float]]:
    """Read a choice's ids and their log-probs. Raises ServerFault unless each id has a number of its own."""
    ids = choice.get("token_ids")
    content = (choice.get("logprobs") or {}).get("content")
    if not isinstance(ids, list) or not isinstance(content, list) or len(ids) != len(content):
        raise ServerFault(FaultKind.BROKEN, f"an answer has {_size(ids)} ids but {_size(content)} log-probs")
    if not all(type(token) is int and 0 <= token < vocabulary for token in ids):
        raise ServerFault(FaultKind.BROKEN, f"an answer holds ids outside the vocabulary of {vocabulary}")
    if [entry.get("token_id") if isinstance(entry, dict) else None for entry in content] != ids:
        raise ServerFault(FaultKind.BROKEN, "an answer's log-probs belong to other ids")
    return ids, [read_logprob(entry.get("logprob")) for entry in content]


def read_logprob(value: Any) -> float:
    """Check that a value is a finite number, and return it as a float. Raises ServerFault."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ServerFault(FaultKind.BROKEN, f"an answer has {value!r} for a log-prob")
    return float(value)


def weight_labels(choice: dict[str, Any]) -> set[Any]:
    """The names of the weights that sampled a choice."""
    spans = choice.get("weight_versions")
    return {span.get("version") for span in spans} if isinstance(spans, list) else set()


def cached_tokens(answer: dict[str, Any]) -> int | None:
    """The number of a prompt's tokens that were found in the cache; None where the server does not tell."""
    found: Any = answer
    for name in ("usage", "prompt_tokens_details", "cached_tokens"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if type(found) is int and found >= 0 else None


def _size(value: Any) -> str:
    return str(len(value)) if isinstance(value, list) else "no"
