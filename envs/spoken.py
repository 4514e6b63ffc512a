"""Writes what a model said as a message, in the shape in which TRL's `GRPOTrainer` hands it to reward functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd.envs.tools import Tool
from opd.formats import read_reply
from opd.tool_calls import ToolCall, ToolFormat
from opd.types import Message


def spoken(action: str, tools: Mapping[str, Tool], *, tool_format: ToolFormat, starts_thinking: bool) -> Message:
    """Return an assistant's message of a model's text: `content`, and where there are such `reasoning_content` and
    `tool_calls`, whose arguments have the types of the tool's schema.

    A text with a call that cannot be read stays as it is, for nobody knows what of it is which.
    """
    read = read_reply(action, tool_format, starts_thinking=starts_thinking, names=tools)
    calls = [call for call in read.calls if isinstance(call, ToolCall)]
    if len(calls) < len(read.calls):
        return {"role": "assistant", "content": action}
    message: Message = {"role": "assistant", "content": read.content}
    if read.thought:
        message["reasoning_content"] = read.thought
    if calls:
        message["tool_calls"] = [_call(call, tools.get(call.name)) for call in calls]
    return message


def _call(call: ToolCall, tool: Tool | None) -> dict[str, Any]:
    arguments = tool.typed(call.arguments) if call.as_text and tool is not None else call.arguments
    return {"type": "function", "function": {"name": call.name, "arguments": arguments}}
