"""Adapts environments written for TRL's `environment_factory`: `trl:my_package.my_module:MyEnvironment`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from opd.envs.adapters.common import resolve
from opd.envs.adapters.rows import Rows
from opd.envs.dataset_env import RESERVED
from opd.envs.scoring import Member, Scorer
from opd.envs.text_env import Reply, Start
from opd.envs.tool_env import ToolEnv
from opd.envs.tools import Tool
from opd.errors import ConfigError, EnvError
from opd.rewards import Rewards, Rubric
from opd.tool_calls import ToolFormat
from opd.types import ONLY_TEXT, Message, medium_in

_NOT_TOOLS = ("reset", "get_reward")


class TrlEnv(ToolEnv):
    """Takes a class whose public methods are tools, whose `reset` takes a row, and which may have a `get_reward`.

    As in TRL, what `reset` returns is appended to the row's last message, a rollout ends at the first turn without
    a call, and it is scored once, at its end. `get_reward` and the reward functions add up; who cannot tell returns
    None. Methods may be async. Under a trainer a function is called once for the whole group, when its last episode
    has ended, as TRL's gets whole batches; with `group: false` it sees one episode. Completions are messages, with
    `tool_calls`, since TRL takes no environments for prompts of plain text.

    Args:
        name: the import path `package.module:Class` of the class, or of a function that makes an instance.
        config: arguments of the class.
        data: rows, if there are any: a file, one for each split, or a data set (see `opd/Dataset-v0`). Without
            rows the environment draws its own tasks; then its `reset` gets a `seed` if it takes one.
        rewards: reward functions in TRL's signature, which get the columns, `environments`, `completion_ids` and what
            the trainer passes besides.
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
        self._make = partial(_instance, name, dict(config or {}))
        self._theirs, self._lent = self._make(), False
        super().__init__(
            tools=_public_methods(self._theirs),
            tool_format=tool_format,
            starts_thinking=starts_thinking,
            call_timeout=call_timeout,
            max_steps=max_turns,
        )
        self._rubric = None if rewards is None else Rubric(rewards, group=True)
        self._scorer = Scorer(self._rubric, success_threshold)
        if self._rubric is None and not hasattr(self._theirs, "get_reward"):
            raise ConfigError(f"env.kwargs.rewards is missing: {name!r} has no get_reward, so nothing scores it")
        if data is None and (privileged_columns or columns):
            setting = "privileged_columns" if privileged_columns else "columns"
            raise ConfigError(f"env.kwargs.{setting} names columns, but there is no env.kwargs.data")
        self._rows: Rows | None = None
        if data is not None:
            self._rows = Rows(data, prompt_column, privileged_columns, held_out=held_out, columns=columns)
            self.metadata = {**self.metadata, "tasks": self._rows.counts}
        self._begin({}, [])

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        self._row = {} if self._rows is None else self._rows.pick(rng, split, index)
        if self._lent:  # the functions that compare its group will look at it as it stands
            self._theirs, self._lent = self._make(), False
            self._tools = {made.name: made for made in map(Tool, _public_methods(self._theirs))}
        messages = [{"role": "user", "content": ""}] if self._rows is None else self._rows.prompt(self._row)
        given = dict(self._row)
        if self._rows is None and "seed" in inspect.signature(self._theirs.reset).parameters:
            given["seed"] = int(rng.integers(2**31))
        told = self._await(self._theirs.reset(**given))
        if told is not None:
            messages[-1] = {**messages[-1], "content": messages[-1]["content"] + _text(told)}
        self._begin(self._row, messages)
        return Start(prompt=messages, privileged={} if self._rows is None else self._rows.privileged(self._row))

    def _begin(self, row: Mapping[str, Any], prompt: list[Message]) -> None:
        """Begin to take down an episode."""
        self._row, self._prompt = row, prompt
        self._said: list[Message] = []

    def respond(self, action: str) -> Reply:
        self._said.append(self.spoken(action))
        reply = super().respond(action)
        self._said += reply.messages
        if reply.terminated or self._steps + 1 != self.max_steps:
            return reply
        return replace(
            self._score(), messages=reply.messages, terminated=False, truncated=True, success=False,
            feedback=reply.feedback)  # fmt: skip

    def no_call(self, action: str) -> Reply:
        return self._score()

    def score_group(self, members: Sequence[Member], ids: Sequence[Sequence[int]]) -> list[Reply]:
        return self._scorer.group(members, ids, self.trainer)

    def close(self) -> None:
        if self._rubric is not None:
            self._rubric.close()
        super().close()

    def _score(self) -> Reply:
        """End the rollout with its reward and the parts of that; `get_reward` abstains with None."""
        own = hasattr(self._theirs, "get_reward")
        given = self._await(self._theirs.get_reward()) if own else None
        member = Member(
            prompt=self._prompt,
            completion=list(self._said),
            columns={key: value for key, value in self._row.items() if key not in RESERVED},
            environment=self._theirs,
            given=0.0 if given is None else float(given),
            given_parts={"get_reward": None if given is None else float(given)} if own else {},
        )
        reply = self._scorer.reply(member, self.trainer)
        self._lent = reply.member is not None
        return reply

    def _await(self, value: Any) -> Any:
        """Return the value; run a coroutine to its result first, in the loop that runs async tools."""
        if not isinstance(value, Coroutine):
            return value
        [outcome] = self._background.run([lambda: value], time_limit=self.call_timeout)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


def _text(told: Any) -> str:
    """Return what `reset` tells as text: a list of parts is read as TRL reads it. Raises EnvError for an image."""
    if not isinstance(told, list):
        return str(told)
    if medium := medium_in(told):
        raise EnvError(f"reset returned {medium!r}: {ONLY_TEXT}")
    return "".join(str(part["text"] if isinstance(part, Mapping) and "text" in part else part) for part in told)


def _instance(name: str, config: Mapping[str, Any]) -> Any:
    made = resolve(name, setting="name")(**config)
    if not callable(getattr(made, "reset", None)):
        raise ConfigError(f"env.id: {name!r} makes a {type(made).__name__} without a reset method, so TRL takes it not")
    return made


def _public_methods(made: Any) -> list[Callable[..., Any]]:
    """Return an environment's public methods. Like TRL this looks at the class, so that no property is evaluated."""
    names = [name for name, _ in inspect.getmembers(type(made), predicate=inspect.isfunction)]
    return [getattr(made, name) for name in names if not name.startswith("_") and name not in _NOT_TOOLS]
