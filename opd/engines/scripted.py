"""An engine that needs no model: it says the same at every turn. For a look at how episodes begin."""

from __future__ import annotations

from collections.abc import Sequence

from opd.engines.base import Completion, Request, Sampling, Weights, check_request
from opd.types import StopReason


class ScriptedEngine:
    """Answers every request with the same ids, which must end a turn; each is said to be certain (log-prob 0)."""

    policy_version = 0
    copies, revived = 1, 0

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = list(token_ids)
        self._waiting: list[Request] = []

    def begin(self, sampling: Sampling, stop_ids: frozenset[int]) -> None:
        """Do nothing: nothing is sampled."""

    def submit(self, request: Request) -> None:
        check_request(request)
        self._waiting.append(request)

    def step(self) -> list[Completion]:
        waiting, self._waiting = self._waiting, []
        return [
            Completion(
                session=request.session,
                token_ids=self._token_ids,
                logprobs=[0.0] * len(self._token_ids),
                stop_reason=StopReason.STOP,
                policy_version=self.policy_version,
            )
            for request in waiting
        ]

    def release(self, session: int) -> None:
        """Do nothing: nothing is kept."""

    def update_weights(self, weights: Weights, version: int) -> None:
        """Do nothing: there is no model."""

    def sleep(self) -> None:
        """Do nothing: no memory is held."""

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Do nothing: nothing is open."""
