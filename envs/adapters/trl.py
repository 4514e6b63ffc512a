"""Environments written for TRL's `environment_factory`: `trl:my_package.my_module:MyEnvironment`."""

from __future__ import annotations

import asyncio
import inspect
import weakref
from collections.abc import Callable, Coroutine, Mapping
from functools import wraps
from typing import Any

import numpy as np

from opd.envs.adapters.common import resolve
from opd.envs.adapters.rows import Rows
from opd.envs.dataset_env import RESERVED
from opd.envs.text_env import Reply, Start
from opd.envs.tool_env import ToolEnv
from opd.errors import ConfigError
from opd.rewards import Rewards, Rubric
from opd.types import Message

_NOT_TOOLS = ("reset", "get_reward")


class TrlEnv(ToolEnv):
    """A class whose public methods are tools, whose `reset` takes a row, and which may have a `get_reward`.

    As in TRL, what `reset` returns is appended to the row's last message, a rollout ends at the first turn without
    a call, and it is scored once, at its end. `get_reward` and the reward functions add up. Methods may be async.

    Args:
        name: the import path `package.module:Class` of the class, or of a function that makes an instance.
        config: arguments of the class.
        data: rows, if there are any: a file, one for each split, or a data set (see `opd/Dataset-v0`). Without
            rows the environment draws its own tasks; then its `reset` gets a `seed` if it takes one.
        rewards: reward functions in TRL's signature, which get the columns and `environments` besides.
        prompt_column: the column of the prompt, text or messages.
        privileged_columns: which columns the teacher may see, under which names.
        success_threshold: a reward of at least this is a success.
        held_out: the share of prompts held out for eval, where no eval split is given.
        max_turns: after this many turns the rollout is cut and scored as it stands, as by TRL's
            `max_tool_calling_iterations`; `env.max_turns` should be no smaller, for it cuts without a score.
    """

    def __init__(
        self,
        name: str,
        *,
        config: Mapping[str, Any] | None = None,
        data: str | Mapping[str, str] | None = None,
        rewards: Rewards | None = None,
        prompt_column: str = "prompt",
        privileged_columns: Mapping[str, str] | None = None,
        success_threshold: float = 1.0,
        held_out: float = 0.1,
        max_turns: int | None = None,
    ) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._theirs = _instance(name, config or {})
        super().__init__(tools=[self._sync(method) for method in _tools(self._theirs)], max_steps=max_turns)
        self._rubric = None if rewards is None else Rubric(rewards)
        if self._rubric is None and not hasattr(self._theirs, "get_reward"):
            raise ConfigError(f"env.kwargs.rewards is missing: {name!r} has no get_reward, so nothing scores it")
        if data is None and privileged_columns:
            raise ConfigError("env.kwargs.privileged_columns names columns, but there is no env.kwargs.data")
        self._rows = (
            None
            if data is None
            else Rows(data, prompt_column=prompt_column, privileged_columns=privileged_columns, held_out=held_out)
        )
        self.success_threshold = success_threshold
        if self._rows is not None:
            self.metadata = {**self.metadata, "tasks": self._rows.counts}
        self._row: Mapping[str, Any] = {}
        self._prompt: list[Message] = []
        self._said: list[Message] = []

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        self._row = {} if self._rows is None else self._rows.pick(rng, split, index)
        messages = [{"role": "user", "content": ""}] if self._rows is None else self._rows.prompt(self._row)
        given = dict(self._row)
        if self._rows is None and "seed" in inspect.signature(self._theirs.reset).parameters:
            given["seed"] = int(rng.integers(2**31))
        told = self._await(self._theirs.reset(**given))
        if told is not None:
            messages[-1] = {**messages[-1], "content": messages[-1]["content"] + str(told)}
        self._prompt, self._said = messages, []
        return Start(prompt=messages, privileged={} if self._rows is None else self._rows.privileged(self._row))

    def respond(self, action: str) -> Reply:
        self._said.append({"role": "assistant", "content": action})
        reply = super().respond(action)
        self._said += reply.messages
        if reply.terminated or self._steps + 1 != self.max_steps:
            return reply
        reward = self._score()
        return Reply(messages=reply.messages, reward=reward, truncated=True, feedback=reply.feedback)

    def no_call(self, action: str) -> Reply:
        reward = self._score()
        return Reply(reward=reward, terminated=True, success=reward >= self.success_threshold - 1e-9)

    def close(self) -> None:
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    def _score(self) -> float:
        own = self._await(self._theirs.get_reward()) if hasattr(self._theirs, "get_reward") else 0.0
        if self._rubric is None:
            return float(own)
        columns = {key: value for key, value in self._row.items() if key not in RESERVED}
        columns["environments"] = self._theirs
        return float(own) + self._rubric.score(self._prompt, self._said, columns).total

    def _sync(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, or one that waits for its coroutine in this environment's own event loop."""
        if not inspect.iscoroutinefunction(method):
            return method

        @wraps(method)
        def run(**arguments: Any) -> Any:
            return self._await(method(**arguments))

        return run

    def _await(self, value: Any) -> Any:
        if not isinstance(value, Coroutine):
            return value
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            weakref.finalize(self, self._loop.close)  # if nobody calls close
        return self._loop.run_until_complete(value)


def _instance(name: str, config: Mapping[str, Any]) -> Any:
    made = resolve(name, setting="name")(**config)
    if not callable(getattr(made, "reset", None)):
        raise ConfigError(f"env.id: {name!r} makes a {type(made).__name__} without a reset method, so TRL takes it not")
    return made


def _tools(made: Any) -> list[Callable[..., Any]]:
    """The public methods of an environment, as TRL picks them: of its class, so that no property is evaluated."""
    names = [name for name, _ in inspect.getmembers(type(made), predicate=inspect.isfunction)]
    return [getattr(made, name) for name in names if not name.startswith("_") and name not in _NOT_TOOLS]
