"""What one reply of a model is made of, once it is read: a thought, calls of tools, and the text around them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that could be read; a tool of that name may not exist."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    as_text: bool = False
    """True: every argument is the text that the model wrote, since the format has no types; the tool's schema has."""
    id: str | None = None
    """The id that the model gave the call, where its format has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MalformedCall:
    """A text that was meant as a call and could not be read; `error` says why, in words for the model."""

    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A reply, taken apart.

    `<think>Hm.</think>Let me look.<tool_call>{"name": "get"}</tool_call>` has the thought "Hm.", the content "Let me
    look.", one call, and ends where the text does.
    """

    thought: str | None = None
    """The thoughts without their markers, two line breaks between them; None without any, "" for an empty one."""
    content: str = ""
    """What stands outside of thoughts and calls, stripped."""
    calls: list[ToolCall | MalformedCall] = field(default_factory=list)
    """The calls in order."""
    end: int = 0
    """The position in the text right behind the last call's markup; 0 without a call."""


def join_thoughts(thoughts: list[str]) -> str | None:
    """Return several thoughts as one; None where there is none."""
    return "\n\n".join(filter(None, (thought.strip("\n") for thought in thoughts))) if thoughts else None
