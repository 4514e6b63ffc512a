"""What stands between two completions, and whether the template has rewritten what stood before."""

from __future__ import annotations

from typing import Any, Literal

from opd.models.ends import Ends
from opd.models.habits import ID, Tools
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
        close = ""
        marked: Message = {"role": "assistant", "content": mark}
        if results and habits.calls is not None and habits.tool_role:
            calls = [
                {"id": call_id, "function": {"name": name, "arguments": {"opd": mark}}}
                for name, call_id in self._called(said, new[:results], tools)
            ]
            marked = {"role": "assistant", "content": "", "tool_calls": calls if habits.calls.several else calls[-1:]}
            close = habits.calls.close.replace(ID, str(calls[-1]["id"]))
        text = self._template.render([*before, marked, *new], tools, generate=True, **template_kwargs)
        if mark not in text:
            self._template.check_renders(mark)
        return text.rpartition(mark)[2].removeprefix(close)

    def _called(self, said: Message, results: list[Message], tools: Tools) -> list[tuple[str, str]]:
        """The tool that each of these results is of, and the id of its call, as far as anybody says."""
        calls = self._template.taken_apart(said, tools).get("tool_calls") or ()
        known = [(str(call["function"]["name"]), call.get("id")) for call in calls]
        known += [("tool", None)] * len(results)
        return [
            (str(result.get("name") or name), str(result.get("tool_call_id") or call_id or f"call{n:05d}"))
            for n, (result, (name, call_id)) in enumerate(zip(results, known, strict=False), start=1)
        ]

    def rewrites(self, history: list[Message], new: list[Message], tools: Tools, *, thoughts: bool) -> bool:
        """True if the next prompt, as the template renders it, no longer starts with what the student has seen.

        White space that the template trims from a completion's ends, or adds there, is not a rewrite; nor is a call
        that it writes with other white space. Nor are thoughts that it drops, unless `thoughts` count.
        """
        reply = self._template.read(str(history[-1]["content"]), tools)
        seen = self._template.render(history[:-1], tools, generate=True)
        now = self._template.render([*history, *new], tools, generate=True)
        if not thoughts:
            rest = behind(self._thoughts.sub("", now), self._thoughts.sub("", seen))
        else:
            rest = now[len(seen) :] if now.startswith(seen) else None
            if reply.thought:  # dropped, where the conversation is the same without it
                bare = {**self._template.taken_apart(history[-1], tools), "content": reply.content}
                bare = {key: value for key, value in bare.items() if key != "reasoning_content"}
                if now == self._template.render([*history[:-1], bare, *new], tools, generate=True):
                    return True
        return rest is None or reply.content.strip() not in self._template.encoder.plain(rest)

    def _generation_prompt(self, prompt: str) -> str:
        """What the template puts where the assistant is to speak, without a thought that it opens or closes there."""
        without = self._template.render([{"role": "user", "content": "x"}], None, generate=False)
        added = prompt[len(without) :] if prompt.startswith(without) else ""
        return whole_thoughts(self._template.format, "").sub("", added)
