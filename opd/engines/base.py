"""The interface of a rollout engine. The scheduler (`opd.episodes.scheduler`) drives all of them the same way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from opd.types import StopReason

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The settings of sampling. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 are off."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion to sample. `session` names the conversation, whose prefix may be cached."""

    session: int
    prompt_ids: list[int]
    """The whole sequence so far, not only what is new."""
    seed: int
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The sampled ids, at least one, each with its log-prob under the distribution that it was drawn from."""

    session: int
    token_ids: list[int]
    logprobs: list[float]
    stop_reason: StopReason
    policy_version: int


class Weights(Protocol):
    """A model's weights under the names of its checkpoint, as they are now; each `iter` is a fresh pass."""

    collective: bool
    """True: all ranks must iterate together, so that an engine cannot read them again on its own."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class RolloutEngine(Protocol):
    """Requests go in at any time; completions come out in the order in which they finish."""

    policy_version: int
    """The version of the weights it samples from; every completion carries the one that sampled it."""

    @property
    def copies(self) -> int:
        """How many copies of the weights it samples from; as many conversations that begin differently reach all."""

    @property
    def revived(self) -> int:
        """How often a copy was given the weights after it had started, first or anew; 0 where none starts alone."""

    def begin(self, sampling: Sampling, stop_ids: frozenset[int]) -> None:
        """Start a round of rollouts with these settings; nothing may be in flight."""

    def submit(self, request: Request) -> None:
        """Queue a request; sampling goes on in `step`."""

    def step(self) -> list[Completion]:
        """Do a bounded piece of work; return the completions that it finished, perhaps none."""

    def release(self, session: int) -> None:
        """Forget a conversation and whatever was cached for it."""

    def update_weights(self, weights: Weights, version: int) -> None:
        """Sample from these weights from now on, and call them `version`; cached prefixes are forgotten.

        Nothing may be in flight. An engine may keep `weights`: one that lost its copy reads them again, unless
        they are collective. One that samples with the trainer's own model never reads them.
        """

    def sleep(self) -> None:
        """Give memory back to training until the next `update_weights` or `begin`."""

    def metrics(self) -> dict[str, float]:
        """Numbers about the work since the last call, such as cache hits and retries."""

    def close(self) -> None:
        """Free everything."""


def check_request(request: Request) -> None:
    """Raise ValueError unless a request has a prompt and room for a token."""
    if not request.prompt_ids or request.max_tokens < 1:
        raise ValueError(f"a request needs a prompt and room for a token, got {request}")


def generate(engine: RolloutEngine, requests: Sequence[Request]) -> Iterator[Completion]:
    """Sample all requests; yield completions in the order in which they finish."""
    for request in requests:
        engine.submit(request)
    missing = len(requests)
    while missing:
        for completion in engine.step():
            missing -= 1
            yield completion
