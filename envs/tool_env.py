"""Environments whose actions are tool calls. The tools are Python functions; their errors are observations.

Running the calls of an action is in `opd.envs.tool_runs`, the tools themselves are in `opd.envs.tools`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import numpy as np

from opd.background import Background
from opd.envs.spoken import spoken
from opd.envs.text_env import Reply, Start, TextEnv
from opd.envs.tool_runs import CallRunner, running_call
from opd.envs.tools import Tool, ToolError, marked_tools, tool
from opd.errors import ConfigError, EnvError
from opd.formats import read_reply
from opd.tool_calls import FORMS, TOOL_FORMATS, MalformedCall, ToolFormat
from opd.types import Message

__all__ = ["ToolEnv", "ToolError", "tool"]


class ToolEnv(TextEnv):
    """A multi-turn environment of tools.

    A subclass defines `start`, and its tools as methods marked with `@tool`; functions may be passed too. What a
    tool remembers of an episode stands in the environment's attributes, which `start` sets anew.

    Each call of an action becomes a message of role `tool`. Calls run in order; `async` tools that stand next to each
    other run at the same time. A tool that ends the episode calls `self.finish(...)` and returns; the calls after
    it (after its neighbours, where it is async) are not run. A call that is malformed, names no tool, has wrong
    arguments, takes too long, or raises is answered with a short error text, which is also the turn's feedback; an
    exception other than `ToolError` is also logged, since it may be a bug in the tool.

    Args:
        tools: functions to offer beside the marked methods.
        tool_format: how the model writes calls, a name of `opd.tool_calls.TOOL_FORMATS`. With auto a trainer says
            which it is (`read_calls_as`); where nobody does, the first markup that is found decides.
        starts_thinking: the model's template opens a thought before the model speaks, so that a text without
            `</think>` is all thought and calls nothing.
        call_timeout: seconds that a call of an async tool may take. A plain function has only the limit of the
            whole step (`rollout.step_timeout`), since Python cannot stop it.
        max_result_chars: a longer result is cut, with a notice.
        max_calls: calls of one action beyond this many are not run, and a last message says so.
        max_steps: see `TextEnv`.
    """

    def __init__(
        self,
        tools: Sequence[Callable[..., Any]] = (),
        *,
        tool_format: ToolFormat = "auto",
        starts_thinking: bool = False,
        call_timeout: float = 30.0,
        max_result_chars: int = 4096,
        max_calls: int = 16,
        max_steps: int | None = None,
    ) -> None:
        super().__init__(max_steps=max_steps)
        _check_format(tool_format)
        for name, value in (
            ("call_timeout", call_timeout),
            ("max_result_chars", max_result_chars),
            ("max_calls", max_calls),
        ):
            if not value > 0:
                raise ConfigError(f"{name} = {value!r} must be more than 0")
        self.tool_format: ToolFormat = tool_format
        self.starts_thinking = starts_thinking
        self._given = (tool_format, starts_thinking)
        self.call_timeout = call_timeout
        self.max_result_chars = max_result_chars
        self.max_calls = max_calls
        self._background = Background()
        self._tools: dict[str, Tool] = {}
        for made in map(Tool, [*marked_tools(self), *tools]):
            if made.name in self._tools:
                raise ConfigError(f"{type(self).__name__} has two tools named {made.name!r}; rename one")
            self._tools[made.name] = made

    @abstractmethod
    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        """Begin a task of `split`, drawn with `rng` alone (see `TextEnv.start`)."""

    def no_call(self, action: str) -> Reply:
        """Reply to an action that calls no tool; by default the turn is used up and the model reminded.

        `action` is what the model says: its text without thoughts and without the markup of its format.
        A subclass that says so in another way returns `Reply(unreadable=True, ...)` too, for the logs; one that takes
        the text for the answer does not.
        """
        set_here, _ = self._given  # what the template has told the model need not be told again
        form = "" if set_here == "auto" else f", in the form {FORMS[set_here]}"
        text = f"Call a tool{form}. The tools are: {', '.join(self._tools)}."
        return Reply(messages=[{"role": "user", "content": text}], unreadable=True, feedback=text)

    def spoken(self, action: str) -> Message:
        """Return an action as the message that TRL hands to reward functions (`opd.envs.spoken`)."""
        return spoken(action, self._tools, tool_format=self.tool_format, starts_thinking=self.starts_thinking)

    def read_calls_as(self, tool_format: ToolFormat, *, starts_thinking: bool) -> None:
        """Say how the model that plays writes its replies; for the trainer, before the first episode.

        A `tool_format` that the environment was made with stays. The model starts in a thought if either says so.
        Raises ConfigError for an unknown format.
        """
        _check_format(tool_format)
        own_format, own_thinking = self._given
        self.tool_format = tool_format if own_format == "auto" else own_format
        self.starts_thinking = own_thinking or starts_thinking

    def finish(
        self,
        reward: float,
        *,
        success: bool,
        feedback: str | None = None,
        rewards: Mapping[str, float | None] | None = None,
    ) -> None:
        """End the episode after the running tool returns; for use inside a tool.

        `rewards` names the parts that the reward is made of, for the logs. Raises EnvError outside a tool, and in
        one that was given up.
        """
        run = running_call()
        if run is None:
            raise EnvError(f"{type(self).__name__}.finish was called outside a running tool; call it inside one")
        run.ending = Reply(
            reward=reward, terminated=True, success=success, feedback=feedback, rewards=dict(rewards or {})
        )

    def tool_schemas(self) -> list[dict[str, Any]]:
        return [made.schema() for made in self._tools.values()]

    def close(self) -> None:
        """Stop whatever async tools left running."""
        self._background.close()
        super().close()

    def respond(self, action: str) -> Reply:
        read = read_reply(action, self.tool_format, starts_thinking=self.starts_thinking, names=self._tools)
        calls = read.calls
        if not calls:
            return self.no_call(read.content)
        unreadable = all(isinstance(call, MalformedCall) for call in calls)
        if len(calls) > self.max_calls:
            calls[self.max_calls :] = [MalformedCall(error=f"only {self.max_calls} calls are run in one turn")]
        runner = CallRunner(
            background=self._background, call_timeout=self.call_timeout, max_result_chars=self.max_result_chars
        )
        runs = runner.run(calls, self._tools)
        reply = next((run.ending for run in runs if run.ending is not None), Reply())
        errors = "\n".join(run.text for run in runs if run.failed)
        feedback = errors or None if reply.feedback is None else reply.feedback
        return replace(reply, messages=[run.message() for run in runs], unreadable=unreadable, feedback=feedback)


def _check_format(name: str) -> None:
    """Raise ConfigError for a format that there is none of."""
    if name not in TOOL_FORMATS:
        near = get_close_matches(str(name), TOOL_FORMATS, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ConfigError(f"tool_format = {name!r} is unknown. Allowed: {', '.join(TOOL_FORMATS)}.{hint}")
