"""What stands between two completions, and whether the template has rewritten what stood before."""

from __future__ import annotations

import re
from typing import Any, Literal

from opd.errors import ModelError
from opd.models.ends import Ends
from opd.models.habits import ID, Tools
from opd.models.said import THOUGHT_KEYS
from opd.models.template import ChatTemplate
from opd.models.thoughts import behind, whole_thoughts
from opd.types import Message

OnRewrite = Literal["auto", "fork", "append"]


class Glue:
    """Renders what a template puts behind what the assistant said, up to where it speaks next."""

    def __init__(self, template: ChatTemplate, ends: Ends) -> None:
        self._template = template
        self._ends = ends
        prompt = template.render([{"role": "user", "content": "x"}], None, generate=True)
        self._thoughts = whole_thoughts(template.format, self._generation_prompt(prompt))

    def ids(
        self,
        before: list[Message],
        said: Message,
        new: list[Message],
        tools: Tools,
        last_id: int | None,
        **template_kwargs: Any,
    ) -> list[int]:
        """The ids that follow what the assistant said, up to where it speaks next."""
        text = self._text_after(before, said, new, tools, **template_kwargs)
        return self._ends.after(self._template.encoder.encode_next(text), last_id)

    def _text_after(
        self, before: list[Message], said: Message, new: list[Message], tools: Tools, **template_kwargs: Any
    ) -> str:
        """The text behind the assistant's message, whose own words are not rendered: a mark stands in their place.

        Results of tools need calls before them, in most templates.
        """
        mark = self._template.encoder.mark()
        habits = self._template.habits
        results = next((n for n, message in enumerate(new) if message["role"] != "tool"), len(new))
        marked: Message = {"role": "assistant", "content": mark}
        calls: list[Message] = []
        if results and habits.calls is not None and habits.tool_role:
            calls = self._called(said, new[:results], tools)
            calls = calls if habits.calls.several else [_answered(calls, new[0])]
            for call in calls:
                call["function"]["arguments"] = {"opd": mark}
            marked = {"role": "assistant", "content": "", "tool_calls": calls}
        text = self._template.render([*before, marked, *new], tools, generate=True, **template_kwargs)
        if mark not in text:
            self._template.check_renders(mark)
        rest = text.rpartition(mark)[2]
        if calls and habits.calls is not None:
            closes = sorted({habits.calls.answered, habits.calls.close}, key=len, reverse=True)
            close = "|".join(r"[\w.:-]*".join(map(re.escape, close.split(ID))) for close in closes)
            rest = re.sub(rf"\A(?:{close})", "", rest)
        return rest

    def _called(self, said: Message, results: list[Message], tools: Tools) -> list[Message]:
        """The calls that an assistant made, as far as anybody says; there are at least as many as results."""
        calls = self._template.taken_apart(said, tools).get("tool_calls") or ()
        made = [{"id": c.get("id"), "function": {"name": str(c["function"]["name"])}} for c in calls]
        made += [
            {"id": result.get("tool_call_id"), "function": {"name": str(result.get("name") or "tool")}}
            for result in results[len(made) :]
        ]
        return made

    def rewrites(self, history: list[Message], new: list[Message], tools: Tools, *, thoughts: bool) -> bool:
        """True if the next prompt, as the template renders it, no longer starts with what the student has seen.

        White space that the template trims from a completion's ends, or adds there, is not a rewrite; nor is a call
        that it writes with other white space. Nor are thoughts that it drops, unless `thoughts` count.
        """
        said = self._template.taken_apart(history[-1], tools)
        reply = self._template.read(str(said.get("content") or ""), tools)
        thought = next((str(said[key]) for key in THOUGHT_KEYS if said.get(key)), reply.thought)
        seen = self._template.render(history[:-1], tools, generate=True)
        try:
            now = self._template.render_strictly([*history, *new], tools, generate=True)
        except ModelError:  # a call that cannot be read and its answer, say: then nothing tells of a rewrite
            if not thoughts:
                return False
            now = self._template.render([*history, *new], tools, generate=True)
        if not thoughts:
            rest = behind(self._thoughts.sub("", now), self._thoughts.sub("", seen))
        else:
            rest = now[len(seen) :] if now.startswith(seen) else None
            if thought:  # dropped, where the conversation is the same without it
                bare = {key: value for key, value in said.items() if key not in THOUGHT_KEYS}
                bare["content"] = reply.content
                if now == self._template.render([*history[:-1], bare, *new], tools, generate=True):
                    return True
        return rest is None or reply.content.strip() not in self._template.encoder.plain(rest)

    def _generation_prompt(self, prompt: str) -> str:
        """What the template puts where the assistant is to speak, without a thought that it opens or closes there."""
        without = self._template.render([{"role": "user", "content": "x"}], None, generate=False)
        added = prompt[len(without) :] if prompt.startswith(without) else ""
        return whole_thoughts(self._template.format, "").sub("", added)


def _answered(calls: list[Message], result: Message) -> Message:
    """The one of these calls that a result is of."""
    by_id = [call for call in calls if call["id"] is not None and call["id"] == result.get("tool_call_id")]
    by_name = [call for call in calls if call["function"]["name"] == result.get("name")]
    return next(iter(by_id or by_name or calls))
