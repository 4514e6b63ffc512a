"""Holds the places where an environment lives: in this process, stepped by a worker's thread, or in one of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from opd.episodes import answers
from opd.episodes.answers import Answer
from opd.grading import Trainer
from opd.types import Task


class Host(Protocol):
    """Hosts one environment. `Local` does so in this process, `opd.episodes.processes.Remote` in another."""

    def reset(self, goal: Task, trainer: Trainer | None = None) -> Answer:
        """Begin an episode. The first reset makes the environment. Raises what `opd.episodes.faults` explains."""

    def step(self, action: str) -> Answer:
        """Hand a completion's text over."""

    def score_group(self, members: Sequence[Any], ids: Sequence[Sequence[int]]) -> list[Answer]:
        """Score a group by what the last answers of its episodes handed out, and the tokens of their completions."""

    def close(self) -> None:
        """Close the environment."""

    def kill(self) -> None:
        """End an environment that broke or does not answer, as far as that can be done."""


class Local:
    """Hosts an environment in this process. Nothing can stop one that hangs; its thread is given up."""

    def __init__(self, make_env: Callable[[], Any]) -> None:
        self._make_env = make_env
        self._env: Any = None

    def reset(self, goal: Task, trainer: Trainer | None = None) -> Answer:
        if self._env is None:
            self._env = self._make_env()
        return answers.reset(self._env, goal, trainer)

    def score_group(self, members: Sequence[Any], ids: Sequence[Sequence[int]]) -> list[Answer]:
        if self._env is None:
            self._env = self._make_env()
        return answers.score_group(self._env, members, ids)

    def step(self, action: str) -> Answer:
        return answers.step(self._env, action)

    def close(self) -> None:
        if self._env is not None:
            self._env.close()

    def kill(self) -> None:
        """Do nothing: `opd.episodes.answers` has closed an environment that broke."""
