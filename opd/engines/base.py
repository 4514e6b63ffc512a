"""What a rollout engine must do. The scheduler (`opd.rollout`) drives any of them the same way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from opd.types import StopReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw tokens. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 are off."""

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
    """What was sampled: at least one id, each with its log-prob under the distribution it was drawn from."""

    session: int
    token_ids: list[int]
    logprobs: list[float]
    stop_reason: StopReason
    policy_version: int


class RolloutEngine(Protocol):
    """Requests go in at any time; completions come out in the order in which they finish."""

    policy_version: int
    """Counts weight updates; every completion carries the version that sampled it."""

    def begin(self, sampling: Sampling, stop_ids: frozenset[int]) -> None:
        """Start a round of rollouts with these settings; nothing may be in flight."""

    def submit(self, request: Request) -> None:
        """Queue a request; sampling goes on in `step`."""

    def step(self) -> list[Completion]:
        """Do a bounded piece of work; the completions that it finished, perhaps none."""

    def release(self, session: int) -> None:
        """Forget a conversation and whatever was cached for it."""

    def weights_changed(self) -> None:
        """The policy has new weights: cached prefixes are stale."""


def generate(engine: RolloutEngine, requests: Sequence[Request]) -> Iterator[Completion]:
    """Sample all requests; yields completions in the order in which they finish."""
    for request in requests:
        engine.submit(request)
    missing = len(requests)
    while missing:
        for completion in engine.step():
            missing -= 1
            yield completion
