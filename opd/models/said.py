"""What an assistant said, as a template wants it: its thought and its calls as keys, where the template knows these."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from opd.errors import ModelError
from opd.formats import Format, Reply, ToolCall, read_reply, write_call
from opd.models.encoding import Encoder
from opd.models.habits import Habits
from opd.types import Message

THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")


class Said:
    """Takes an assistant's messages apart, and puts them as a template of these habits wants them, guarded."""

    def __init__(self, habits: Habits, form: Format, encoder: Encoder) -> None:
        self.habits = habits
        self.format = form
        self.encoder = encoder

    def taken_apart(self, message: Message, names: Iterable[str] = ()) -> Message:
        """An assistant's message with its thought and its calls as keys of their own, where the template renders these.

        A message that already has such keys, and one whose calls cannot be read, come back as they are.
        """
        if message.get("tool_calls") or any(message.get(key) for key in THOUGHT_KEYS):
            return message
        reply = self.read(str(message.get("content") or ""), names)
        calls = [call for call in reply.calls if isinstance(call, ToolCall)]
        if len(calls) < len(reply.calls):
            return message
        as_it_stands = self.habits.calls is None if calls else self.habits.thought_key == "content"
        if (calls or reply.thought) and as_it_stands:
            return message
        apart: Message = {**message, "content": reply.content}
        if reply.thought:
            apart["reasoning_content"] = reply.thought
        if calls:
            apart["tool_calls"] = [
                {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        return apart

    def read(self, text: str, names: Iterable[str] = ()) -> Reply:
        """Take a reply of the assistant apart; `names` are the tools on offer."""
        return read_reply(text, self.format.name, starts_thinking=self._begins_in_a_thought(text), names=tuple(names))

    def _begins_in_a_thought(self, text: str) -> bool:
        """True if the text closes a thought that the prompt before it has opened."""
        for opened, closed in self.format.thought:
            at = text.find(closed.strip())
            if at >= 0 and opened.strip() not in text[:at]:
                return True
        return False

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
        said = "\n".join([*([message["content"]] if message.get("content") else []), *written])
        kept = {key: value for key, value in message.items() if key != "tool_calls"}
        return {**kept, "content": said} if calls else message

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
        return {"type": "function", "id": call["id"], "function": function}


def _as_dict(arguments: Any) -> Any:
    """Arguments of a call, which may be given as JSON text."""
    if not isinstance(arguments, str):
        return arguments or {}
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        raise ModelError(f"the arguments of a tool call are no JSON: {arguments[:80]!r}") from None
