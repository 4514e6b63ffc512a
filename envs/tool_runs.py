"""Running the tool calls of one action: in order, async neighbours together, each within a time limit."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import groupby
from traceback import format_exception_only
from typing import Any

from opd.background import Background
from opd.envs.text_env import Reply
from opd.envs.tools import Tool, ToolError, to_text
from opd.tool_calls import MalformedCall, ToolCall
from opd.types import Message

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class CallRun:
    """One call of an action, and what became of it."""

    call: ToolCall | MalformedCall
    tool: Tool | None
    """None where there is none of that name."""
    text: str = ""
    """The result, or the error text."""
    failed: bool = False
    ending: Reply | None = None
    """The reply with which the call ended the episode."""
    settled: bool = False
    """True once the call has returned or was given up: nothing that it does later counts."""

    def message(self) -> Message:
        """Return the result as a message; some templates ask for the name that was called, and for the call's id."""
        message: Message = {"role": "tool", "content": self.text}
        if isinstance(self.call, ToolCall):
            message["name"] = self.call.name
            if self.call.id is not None:
                message["tool_call_id"] = self.call.id
        return message


_RUNNING: ContextVar[CallRun | None] = ContextVar("opd_running_call", default=None)


def running_call() -> CallRun | None:
    """The call that the caller runs for, on whatever thread or task; None outside one, and in one that was given up."""
    run = _RUNNING.get()
    return None if run is None or run.settled else run


@dataclass(frozen=True, slots=True, kw_only=True)
class CallRunner:
    """Runs calls, and turns what they return or raise into texts for the model."""

    background: Background
    call_timeout: float
    """Seconds that an async call may take."""
    max_result_chars: int
    """A longer text is cut, with a notice."""

    def run(self, calls: Sequence[ToolCall | MalformedCall], tools: Mapping[str, Tool]) -> list[CallRun]:
        """Run the calls up to the one that ends the episode; return those that were run."""
        done: list[CallRun] = []
        runs = [CallRun(call=call, tool=tools.get(getattr(call, "name", ""))) for call in calls]
        for is_async, neighbours in groupby(runs, key=lambda run: run.tool is not None and run.tool.is_async):
            for batch in [list(neighbours)] if is_async else [[run] for run in neighbours]:
                outcomes = self._call_together(batch, tools) if is_async else self._call_one(batch[0], tools)
                for run, outcome in zip(batch, outcomes, strict=True):
                    self._settle(run, outcome)
                done += batch
                if any(run.ending is not None for run in batch):
                    return done
        return done

    def _call_one(self, run: CallRun, tools: Mapping[str, Tool]) -> list[str | BaseException]:
        token = _RUNNING.set(run)
        try:
            made, arguments = _check_call(run, tools)
            result = made.function(**arguments)
            if inspect.isawaitable(result):  # an async function behind a plain decorator
                return self.background.run([partial(_await_text, result)], time_limit=self.call_timeout)
            return [to_text(result)]
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a tool that calls exit() must not end the run
            return [error]
        finally:
            _RUNNING.reset(token)

    def _call_together(self, batch: Sequence[CallRun], tools: Mapping[str, Tool]) -> list[str | BaseException]:
        return self.background.run([partial(_call_async, run, tools) for run in batch], time_limit=self.call_timeout)

    def _settle(self, run: CallRun, outcome: str | BaseException) -> None:
        """Write the call's result or error into its run."""
        run.settled = True
        if isinstance(outcome, str):
            run.text = self._fit(outcome)
            return
        run.failed = True
        if isinstance(outcome, ToolError):
            run.text = self._fit(f"Error: {outcome}")
            return
        name = run.tool.name if run.tool is not None else "the call"
        logger.warning("tool %s raised", name, exc_info=outcome)
        run.text = self._fit(f"Error: {name} failed: {format_exception_only(outcome)[-1].strip()}")
        if isinstance(outcome, TimeoutError):
            run.ending = None  # whether it came to finish() before the limit is a matter of luck

    def _fit(self, text: str) -> str:
        """Cut the text to the limit, with a notice."""
        if len(text) <= self.max_result_chars:
            return text
        return f"{text[: self.max_result_chars]}\n[cut: {self.max_result_chars} of {len(text)} characters shown]"


async def _call_async(run: CallRun, tools: Mapping[str, Tool]) -> str:
    _RUNNING.set(run)  # in a context of its own: this is a task
    made, arguments = _check_call(run, tools)
    return to_text(await made.function(**arguments))


def _check_call(run: CallRun, tools: Mapping[str, Tool]) -> tuple[Tool, dict[str, Any]]:
    """The tool of a call and its checked arguments. Raises ToolError for a call that cannot be run."""
    if isinstance(run.call, MalformedCall):
        raise ToolError(run.call.error)
    if run.tool is None:
        near = get_close_matches(run.call.name[:80], tools, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ToolError(f"there is no tool {run.call.name[:80]!r}. The tools are: {', '.join(tools)}.{hint}")
    return run.tool, run.tool.checked(run.call.arguments, as_text=run.call.as_text)


async def _await_text(result: Any) -> str:
    return to_text(await result)
