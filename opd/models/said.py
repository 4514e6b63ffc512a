"""What an assistant said, as a template wants it: its thought and its calls as keys, where the template knows these."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from opd.errors import ModelError
from opd.formats import Format, Reply, ToolCall, read_reply, write_call
from opd.formats.form import ENDS
from opd.models.encoding import Encoder
from opd.models.habits import Habits
from opd.models.kept import KeptByText
from opd.types import Message

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")


class Said:
    """Takes an assistant's messages apart, and puts them as a template of these habits wants them, guarded."""

    def __init__(self, habits: Habits, form: Format, encoder: Encoder) -> None:
        self.habits = habits
        self.format = form
        self.encoder = encoder
        self._read = KeptByText(self._read_anew)

    def taken_apart(self, message: Message, names: Collection[str] = ()) -> Message:
        """An assistant's message with its thought and its calls as keys of their own, where the template renders these.

        A thought is one that the text begins with; calls are those that it ends with, where tools of these names are on
        offer. All else stays as it stands, as do a message with such keys and one whose calls cannot be read.
        """
        if message.get("tool_calls") or any(message.get(key) for key in THOUGHT_KEYS):
            return message
        text = self._without_end(str(message.get("content") or ""))
        reply = self.read(text, names)
        calls = [call for call in reply.calls if isinstance(call, ToolCall)] if names else []
        if len(calls) < len(reply.calls) or (calls and text[reply.end :].strip()):
            calls = []
        thought, rest = (reply.thought, reply.content) if self._is_wrapped(text) else self._after_thought(text)
        as_it_stands = self.habits.calls is None if calls else self.habits.thought_key == "content"
        if (calls or thought) and as_it_stands:
            return {**message, "content": text}
        apart: Message = {**message, "content": reply.content if calls else rest}
        if thought:
            apart["reasoning_content"] = thought
        if calls:
            apart["tool_calls"] = [
                {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        return apart

    def read(self, text: str, names: Collection[str] = ()) -> Reply:
        """Take a reply of the assistant apart; `names` are the tools on offer."""
        return self._read(text, tuple(names))

    def _read_anew(self, text: str, names: tuple[str, ...]) -> Reply:
        starts_thinking = self.habits.opens and self._closes_a_thought(text) is not None
        return read_reply(text, self.format.name, starts_thinking=starts_thinking, names=names)

    def _after_thought(self, text: str) -> tuple[str | None, str]:
        """Split a text behind the thought that it begins with, or that the prompt has opened; None without one."""
        bare = text.lstrip()
        for opened, closed in self.format.thought:
            if bare.startswith(opened.strip()) and (at := bare.find(closed.strip())) >= 0:
                thought = bare[len(opened.strip()) : at].strip("\n")
                return thought, bare[at + len(closed.strip()) :].lstrip("\n")
        if self.habits.opens and (found := self._closes_a_thought(text)):
            at, closed = found
            return text[:at].strip("\n"), text[at + len(closed) :].lstrip("\n")
        return None, text

    def _closes_a_thought(self, text: str) -> tuple[int, str] | None:
        """Find where a text closes a thought that it has not opened, and the marker."""
        for opened, closed in self.format.thought:
            at = text.find(closed.strip())
            if at >= 0 and opened.strip() not in text[:at]:
                return at, closed.strip()
        return None

    def _is_wrapped(self, text: str) -> bool:
        """True if the text has the markup that its format puts around every part of a reply."""
        return self.format.whole is not None and any(marker in text for marker in self.format.markers)

    def _without_end(self, text: str) -> str:
        """Cut the token that ends a turn, if the text has it."""
        bare = text.rstrip()
        end = next((end for end in ENDS if bare.endswith(end) and end in self.encoder.controls), None)
        return text if end is None else bare.removesuffix(end)

    def put(self, message: Message) -> Message:
        """An assistant's message, guarded, with the keys that the template knows."""
        said = {key: value for key, value in message.items() if key not in (*THOUGHT_KEYS, "tool_calls")}
        text = self._unwrapped(str(said.pop("content", None) or ""))
        thought = next((str(message[key]) for key in THOUGHT_KEYS if message.get(key)), "")
        calls = message.get("tool_calls") or ()
        habit = self.habits.calls
        content = self._guard_own(text) if self._keeps_markup else self.encoder.guard(text)
        if thought and self.habits.thought_key == "content":
            opened, closed = self.format.thought[0]
            content = f"{opened}\n{self.encoder.guard(thought)}\n{closed}\n\n{content}"
        spoken: Message = {**self.encoder.guard_message(said), "content": content}
        if thought and self.habits.thought_key not in ("content", None):
            spoken[str(self.habits.thought_key)] = self.encoder.guard(thought)
        if calls and habit is None:
            return self.in_text({**spoken, "tool_calls": [self._call(call, as_text=False) for call in calls]})
        if calls and habit is not None:
            spoken["content"] = content or habit.empty
            spoken["tool_calls"] = [self._call(call, as_text=habit.as_text) for call in calls]
        return spoken

    def in_text(self, message: Message) -> Message:
        """A message whose calls, if it has any, stand in its text."""
        calls = message.get("tool_calls") or ()
        functions = [call["function"] for call in calls]
        written = [write_call(f["name"], _as_dict(f["arguments"]), self.format.name) for f in functions]
        if not calls:
            return message
        said = ("; " if self.format.bare else "\n").join(written)
        said = f"{message['content']}\n{said}" if message.get("content") else said
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        return {**kept, "content": said}

    def _unwrapped(self, text: str) -> str:
        """An answer without the markers that its format puts around it, and that the template writes itself."""
        for marker in self.format.wrappers:
            text = text.removeprefix(marker).removesuffix(marker)
        return text

    @property
    def _keeps_markup(self) -> bool:
        """True if the markup of thoughts or calls has no way into the template but in the text."""
        return self.habits.calls is None or self.habits.thought_key in ("content", None)

    def _guard_own(self, text: str) -> str:
        """Guard what an assistant said, but for the markup of its own format."""
        markers = [m for m in self.format.markers if m.strip()]
        if not markers:
            return self.encoder.guard(text)
        parts = re.split(f"({'|'.join(map(re.escape, sorted(markers, key=len, reverse=True)))})", text)
        return "".join(part if n % 2 else self.encoder.guard(part) for n, part in enumerate(parts))

    def _call(self, call: Message, *, as_text: bool) -> Message:
        arguments = self.encoder.guard_all(_as_dict(call["function"].get("arguments")))
        given = json.dumps(arguments, ensure_ascii=False) if as_text else arguments
        function = {"name": self.encoder.guard(str(call["function"]["name"])), "arguments": given}
        return {"type": "function", "id": self.encoder.guard(str(call["id"])), "function": function}


def _as_dict(arguments: Any) -> Any:
    """Arguments of a call, which may be given as JSON text."""
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        raise ModelError(f"the arguments of a tool call are no JSON: {arguments[:80]!r}") from None
