"""Reading tool calls out of a model's text. Nothing here runs them, and no text makes it raise.

Two forms are read: the one of Hermes and Qwen, any number of `<tool_call>{"name": ..., "arguments": {...}}
</tool_call>` with free text around them, and one such JSON object as the whole text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FORM = f'{OPEN}{{"name": "...", "arguments": {{...}}}}{CLOSE}'
"""What a call looks like, for error texts and prompts."""

_BLOCK = re.compile(rf"{OPEN}((?:(?!{OPEN}).)*?)({CLOSE}|(?={OPEN})|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that could be read; whether such a tool exists is for others to say."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MalformedCall:
    """What was meant as a call and could not be read, and why, in words for the model."""

    error: str


def parse_tool_calls(text: str) -> list[ToolCall | MalformedCall]:
    """Every call in the text, in order; empty when the text does not try to call anything."""
    if OPEN in text:
        return [_parse_block(body, closed=end == CLOSE) for body, end in _BLOCK.findall(text)]
    if text.lstrip().startswith("{"):
        return [_parse_call(text)]
    return []


def _parse_block(body: str, *, closed: bool) -> ToolCall | MalformedCall:
    if not closed:
        return MalformedCall(error=f"the tool call is not closed by {CLOSE}")
    return _parse_call(body)


def _parse_call(body: str) -> ToolCall | MalformedCall:
    try:
        call = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        return MalformedCall(error="the tool call is nested too deeply")
    except ValueError as error:  # JSONDecodeError, and an integer of more digits than Python converts
        return MalformedCall(error=f"the tool call is not valid JSON ({error}); write {FORM}")
    if not isinstance(call, dict):
        return MalformedCall(error=f"the tool call must be a JSON object; write {FORM}")
    name, arguments = call.get("name"), call.get("arguments", {})
    if not isinstance(name, str) or not name:
        return MalformedCall(error=f'the tool call has no "name"; write {FORM}')
    if not isinstance(arguments, dict):
        return MalformedCall(error=f'"arguments" must be a JSON object; write {FORM}')
    return ToolCall(name=name, arguments=arguments)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
