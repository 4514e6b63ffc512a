"""Adapts environments written for TRL's `environment_factory`: `trl:my_package.my_module:MyEnvironment`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from opd.envs.adapters.common import resolve
from opd.envs.adapters.rows import Rows
from opd.envs.dataset_env import RESERVED
from opd.envs.text_env import Reply, Start
from opd.envs.tool_env import ToolEnv
from opd.errors import ConfigError
from opd.rewards import Rewards, Rubric
from opd.tool_calls import ToolFormat
from opd.types import Message

_NOT_TOOLS = ("reset", "get_reward")


class TrlEnv(ToolEnv):
    """Takes a class whose public methods are tools, whose `reset` takes a row, and which may have a `get_reward`.

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
        columns: the types of columns, `{age: int}` (see `opd/Dataset-v0`).
        max_turns: after this many turns the rollout is cut and scored as it stands, as by TRL's
            `max_tool_calling_iterations`; `env.max_turns` should be no smaller, for it cuts without a score.
        tool_format, starts_thinking: how the model writes calls (see `ToolEnv`).
        call_timeout: seconds that an async method may take.
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
        columns: Mapping[str, str] | None = None,
        max_turns: int | None = None,
        tool_format: ToolFormat = "auto",
        starts_thinking: bool = False,
        call_timeout: float = 30.0,
    ) -> None:
        self._theirs = _instance(name, config or {})
        super().__init__(
            tools=_public_methods(self._theirs),
            tool_format=tool_format,
            starts_thinking=starts_thinking,
            call_timeout=call_timeout,
            max_steps=max_turns,
        )
        self._rubric = None if rewards is None else Rubric(rewards)
        if self._rubric is None and not hasattr(self._theirs, "get_reward"):
            raise ConfigError(f"env.kwargs.rewards is missing: {name!r} has no get_reward, so nothing scores it")
        if data is None and (privileged_columns or columns):
            setting = "privileged_columns" if privileged_columns else "columns"
            raise ConfigError(f"env.kwargs.{setting} names columns, but there is no env.kwargs.data")
        self._rows: Rows | None = None
        if data is not None:
            self._rows = Rows(data, prompt_column, privileged_columns, held_out=held_out, columns=columns)
            self.metadata = {**self.metadata, "tasks": self._rows.counts}
        self.success_threshold = success_threshold
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
        scored = self._score()
        return replace(scored, messages=reply.messages, truncated=True, success=False, feedback=reply.feedback)

    def no_call(self, action: str) -> Reply:
        self._said[-1] = {"role": "assistant", "content": action}  # the answer is scored, not the thought before it
        return replace(self._score(), terminated=True)

    def close(self) -> None:
        if self._rubric is not None:
            self._rubric.close()
        super().close()

    def _score(self) -> Reply:
        """End the rollout with its reward and the parts of that."""
        parts: dict[str, float | None] = {}
        total = 0.0
        if hasattr(self._theirs, "get_reward"):
            total = parts["get_reward"] = float(self._await(self._theirs.get_reward()))
        if self._rubric is not None:
            columns = {key: value for key, value in self._row.items() if key not in RESERVED}
            score = self._rubric.score(self._prompt, self._said, {**columns, "environments": self._theirs})
            total += score.total
            parts |= score.parts
        return Reply(reward=total, success=total >= self.success_threshold - 1e-9, rewards=parts)

    def _await(self, value: Any) -> Any:
        """Return the value; run a coroutine to its result first, in the loop that runs async tools."""
        if not isinstance(value, Coroutine):
            return value
        [outcome] = self._background.run([lambda: value], time_limit=self.call_timeout)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def _instance(name: str, config: Mapping[str, Any]) -> Any:
    made = resolve(name, setting="name")(**config)
    if not callable(getattr(made, "reset", None)):
        raise ConfigError(f"env.id: {name!r} makes a {type(made).__name__} without a reset method, so TRL takes it not")
    return made


def _public_methods(made: Any) -> list[Callable[..., Any]]:
    """Return an environment's public methods. Like TRL this looks at the class, so that no property is evaluated."""
    names = [name for name, _ in inspect.getmembers(type(made), predicate=inspect.isfunction)]
    return [getattr(made, name) for name in names if not name.startswith("_") and name not in _NOT_TOOLS]
