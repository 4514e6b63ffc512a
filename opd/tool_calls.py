"""Reading tool calls out of a model's text, and writing them. Nothing here runs a call, and no text makes it raise.

How each family of models writes its calls stands in `opd.formats`, a file a family; this is the part of it that
environments need. `auto` reads whichever of the formats is there: the first markup that is found decides for the whole
text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from opd.formats import FORMATS, MalformedCall, ToolCall, read_reply, write_call
from opd.formats.hermes import CLOSE, OPEN

__all__ = [
    "CLOSE",
    "FORMS",
    "OPEN",
    "TOOL_FORMATS",
    "MalformedCall",
    "ToolCall",
    "ToolFormat",
    "format_call",
    "parse_tool_calls",
    "valid_tool_calls",
]

ToolFormat = str
"""A name of `TOOL_FORMATS`."""
TOOL_FORMATS: tuple[str, ...] = ("auto", *FORMATS)
FORMS: dict[str, str] = {name: form.example for name, form in FORMATS.items()}
"""An example of a call in each format, for error texts and prompts."""


def parse_tool_calls(
    text: str, tool_format: ToolFormat = "auto", *, starts_thinking: bool = False, names: Collection[str] = ()
) -> list[ToolCall | MalformedCall]:
    """Read every call in the text, in order; empty when the text does not try to call anything.

    `starts_thinking` means that the model's template has opened a thought already, so that a text without
    `</think>` is nothing but thought. `names` are the tools on offer, by which a call without markup and arguments is
    told from an answer. Takes time proportional to the text's length.
    """
    return read_reply(text, tool_format, starts_thinking=starts_thinking, names=names).calls


def format_call(name: str, arguments: dict[str, Any], tool_format: ToolFormat = "hermes") -> str:
    """Write a call as a model would, in hermes where the format is auto. Raises ValueError (see `write_call`)."""
    return write_call(name, arguments, tool_format)


def valid_tool_calls(completions: Sequence[str | list[dict[str, Any]]], **kwargs: Any) -> list[float]:
    """Reward 1 for a completion that calls at least one tool and whose every call can be read, else 0.

    In messages the calls that could be read stand in `tool_calls`, and the markup of others in the content.
    """
    return [float(_all_valid(completion)) for completion in completions]


def _all_valid(completion: str | list[dict[str, Any]]) -> bool:
    messages = [{"content": completion}] if isinstance(completion, str) else completion
    spoken = [message for message in messages if message.get("role", "assistant") == "assistant"]
    calls = [call for message in spoken for call in parse_tool_calls(str(message.get("content") or ""))]
    read = sum(len(message.get("tool_calls") or ()) for message in spoken)
    return len(calls) + read > 0 and all(isinstance(call, ToolCall) for call in calls)
