"""Environments whose actions are tool calls. The tools are Python functions; their errors are observations."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from traceback import format_exception_only
from typing import Any

import numpy as np

from opd.envs.text_env import Reply, Start, TextEnv
from opd.envs.tool_calls import MalformedCall, ToolCall, parse_tool_calls
from opd.envs.tools import Tool, ToolError, marked_tools, tool
from opd.errors import ConfigError
from opd.types import Message

__all__ = ["ToolEnv", "ToolError", "tool"]

logger = logging.getLogger(__name__)


class ToolEnv(TextEnv):
    """A multi-turn environment of tools.

    A subclass defines `start`, and its tools as methods marked with `@tool`; functions may be passed too. The
    calls of one action run in order, and each becomes a message of role `tool`. A tool that ends the episode
    calls `self.finish(...)` and returns; the calls after it are not run. A call that is malformed, names no
    tool, has wrong arguments, or raises is answered with a short error text, which is also that turn's
    feedback; an exception other than `ToolError` is logged besides, since it may be a bug in the tool.

    Args:
        tools: functions to offer beside the marked methods.
        max_result_chars: a longer result is cut, with a notice.
        max_calls: calls of one action beyond this many are not run, and a last message says so.
        max_steps: see `TextEnv`.
    """

    def __init__(
        self,
        tools: Sequence[Callable[..., Any]] = (),
        *,
        max_result_chars: int = 4096,
        max_calls: int = 16,
        max_steps: int | None = None,
    ) -> None:
        super().__init__(max_steps=max_steps)
        self.max_result_chars = max_result_chars
        self.max_calls = max_calls
        self._ending: Reply | None = None
        self._tools: dict[str, Tool] = {}
        for made in map(Tool, [*marked_tools(self), *tools]):
            if made.name in self._tools:
                raise ConfigError(f"{type(self).__name__} has two tools named {made.name!r}; rename one")
            self._tools[made.name] = made

    @abstractmethod
    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        """Begin a task of `split`, drawn with `rng` alone (see `TextEnv.start`)."""

    def no_call(self, action: str) -> Reply:
        """Reply to an action that calls no tool; by default the turn is used up and the model reminded."""
        text = f"Call a tool. The tools are: {', '.join(self._tools)}."
        return Reply(messages=[{"role": "user", "content": text}], feedback=text)

    def finish(self, reward: float, *, success: bool, feedback: str | None = None) -> None:
        """End the episode after the running tool returns; for use inside a tool."""
        self._ending = Reply(reward=reward, terminated=True, success=success, feedback=feedback)

    def tool_schemas(self) -> list[dict[str, Any]]:
        return [made.schema() for made in self._tools.values()]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self._ending = None
        return super().reset(seed=seed, options=options)

    def respond(self, action: str) -> Reply:
        calls = parse_tool_calls(action)
        if not calls:
            return self.no_call(action)
        messages: list[Message] = []
        errors: list[str] = []
        if len(calls) > self.max_calls:
            calls[self.max_calls :] = [MalformedCall(error=f"only {self.max_calls} calls are run in one turn")]
        for call in calls:
            message, failed = self._run(call)
            messages.append(message)
            errors += [message["content"]] if failed else []
            if self._ending is not None:
                break
        reply = self._ending or Reply()
        feedback = "\n".join(errors) or None if reply.feedback is None else reply.feedback
        return replace(reply, messages=messages, feedback=feedback)

    def _run(self, call: ToolCall | MalformedCall) -> tuple[Message, bool]:
        """The message that answers a call, and whether the call failed."""
        if isinstance(call, MalformedCall):
            return {"role": "tool", "content": self._fit(f"Error: {call.error}")}, True
        try:
            result, failed = self._tool(call.name)(call.arguments), False
        except ToolError as error:
            result, failed = f"Error: {error}", True
        except (Exception, SystemExit) as error:  # a tool that calls exit() must not end the run
            logger.warning("tool %s raised", call.name, exc_info=True)
            result, failed = f"Error: {call.name} failed: {format_exception_only(error)[-1].strip()}", True
        name = {"name": call.name} if call.name in self._tools else {}
        return {"role": "tool", **name, "content": self._fit(result)}, failed

    def _tool(self, name: str) -> Tool:
        if name in self._tools:
            return self._tools[name]
        near = get_close_matches(name[:80], self._tools, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ToolError(f"there is no tool {name[:80]!r}. The tools are: {', '.join(self._tools)}.{hint}")

    def _fit(self, text: str) -> str:
        """The text, cut to the limit with a notice."""
        if len(text) <= self.max_result_chars:
            return text
        return f"{text[: self.max_result_chars]}\n[cut: {self.max_result_chars} of {len(text)} characters shown]"
