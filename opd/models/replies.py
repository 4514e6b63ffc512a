"""What an assistant says behind a prompt, as the template writes it: for messages that nobody sampled."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from opd.errors import ModelError
from opd.formats import ToolCall
from opd.models.ends import Ends
from opd.models.habits import Tools, opens_thought
from opd.models.template import ChatTemplate
from opd.models.thoughts import behind, scaffold
from opd.types import Message


class EndsEarly(ModelError):
    """Raised for a message that has the end of a turn within it, where a model would have stopped."""


class Replies:
    """Renders replies with a template."""

    def __init__(self, template: ChatTemplate, ends: Ends) -> None:
        self._template = template
        self._ends = ends

    def ids(self, history: list[Message], message: Message, tools: Tools) -> list[int]:
        """The ids of an assistant's message that nobody sampled, as the template renders it at a conversation's end.

        They follow the prompt that `start` or `extend` gives, and end with the token that ends such a turn. Raises
        ModelError where the template renders the message otherwise than a reply to that prompt.
        """
        apart = self._template.taken_apart(message, tools)
        prompt = self._template.render(history, tools, generate=True)
        text = self._reply_text(history, apart, tools)
        ids = self._template.encoder.encode_pair(prompt, text)
        end = self._ends.call if apart.get("tool_calls") else self._ends.answer
        last = max((n for n, token in enumerate(ids) if token == end), default=None)
        ids = [*self._template.encoder.encode_pair(prompt, text.rstrip()), end] if last is None else ids[: last + 1]
        if any(token in self._ends.stops for token in ids[:-1]):
            raise EndsEarly(
                f"the chat template of {self._template.name!r} ends this message more than once, so that a model would "
                "have stopped before its end: make each of its tool calls a message of its own, apart from its text"
            )
        self._check_calls(message, apart, self._template.encoder.plain(text), tools)
        return ids

    def _check_calls(self, message: Message, apart: Message, text: str, tools: Tools) -> None:
        """Raise ModelError unless the calls of a message are read back from its text as they are."""
        read = self._template.read(text, tools)
        stored = [call["function"] for call in apart.get("tool_calls") or ()]
        if not stored:
            given = self._template.read(str(message.get("content") or ""), tools)
            if tools and given.calls and self._template.habits.calls is not None:
                raise ModelError(
                    "a tool call in the text of this message cannot be read, or stands before other text; give it as "
                    "tool_calls"
                )
            return
        content = str(apart.get("content") or "").strip()
        if content and content in text[read.end :] and content not in text[: read.end]:
            raise ModelError(
                f"the chat template of {self._template.name!r} writes the text of this message behind its tool calls, "
                "where a model would have stopped: make the text a message of its own, or take it out"
            )
        found = [call for call in read.calls if isinstance(call, ToolCall)]
        if len(found) != len(stored) or not all(map(_is_stored, found, stored)):
            raise ModelError(
                f"the chat template of {self._template.name!r} writes the tool calls of this message as "
                f"{' '.join(text.split())[:200]!r}, which are not read back as they are"
            )

    def unrendered(self, before: list[Message], message: Message, tools: Tools, keys: Sequence[str]) -> list[str]:
        """Those of a message's keys that change nothing in what the template renders. Raises ModelError."""

        def shown(given: Message) -> str:
            if given["role"] == "assistant":
                return self._reply_text(before, given, tools)
            # A system message shows once somebody has spoken.
            after: list[Message] = [{"role": "user", "content": "x"}] if given["role"] == "system" else []
            return self._template.render([*before, given, *after], tools, generate=False)

        whole = shown(message)
        return [key for key in keys if _or_none(shown, {k: v for k, v in message.items() if k != key}) == whole]

    def _reply_text(self, history: list[Message], said: Message, tools: Tools) -> str:
        """What the assistant says, as the template writes it behind the prompt. Raises ModelError.

        Some templates write what was before otherwise, once there is a reply (Mistral's drop the system message, which
        may tell the tools): then a reply to a bare question tells.
        """
        asked: list[Message] = [{"role": "user", "content": "x"}]
        shown = tools if self._template.habits.tools else None
        for before, offered in ((history, tools), (asked, tools), (asked, shown)):
            prompt = self._template.render(before, offered, generate=True)
            whole = self._template.render_strictly([*before, said], offered, generate=False)
            if (text := self._text_behind(prompt, whole, said)) is not None:
                return text
        last = self._template.encoder.plain(self._template.render(history, tools, generate=True))[-40:]
        why = (
            f"the prompt closes the thought, and the message holds one: it ends in {last!r}. Take the thought out of "
            "the message, or let the prompt leave room for it by rollout.chat_template_kwargs"
            if said.get("reasoning_content")
            else f"the prompt ends in {last!r}, which the message is not written behind. Mend the template"
        )
        raise ModelError(
            f"the chat template of {self._template.name!r} does not render this message as a reply to its prompt: {why}"
        )

    def _text_behind(self, prompt: str, whole: str, said: Message) -> str | None:
        """What a conversation says behind the prompt of its last message; None where it starts otherwise."""
        form = self._template.format
        opened, closed = next(
            (pair for pair in form.thought if opens_thought(prompt, replace(form, thought=(pair,)))), ("", "")
        )
        thought = str(said.get("reasoning_content") or "")
        rest = behind(whole, prompt)
        if rest is not None and not opened:
            return rest
        if rest is not None and rest.lstrip().startswith(opened.strip()):  # a thought that stands in the content
            return _without(rest, opened, prompt)
        if rest is not None and closed.strip() in rest:
            return rest
        rest = behind(whole, scaffold(form).sub("", prompt)) if rest is None else rest
        if rest is None:
            return None
        closes = next((marker for _, marker in form.thought if rest.lstrip().startswith(marker.strip())), "")
        if closes:  # the template writes no thought but for the marker that closes it
            return None if thought else rest.lstrip() if opened else _without(rest, closes, prompt)
        if opened and rest.lstrip().startswith(opened.strip()):
            return _without(rest, opened, prompt)
        if opened:  # a thought that the prompt opens is closed before the answer, if the template closes it or not
            return f"{self._template.encoder.guard(thought)}\n{closed}\n\n{rest.lstrip()}"
        return None if thought else rest


def _without(text: str, marker: str, prompt: str) -> str:
    """A text without the marker that it begins with, which the prompt has, and without line breaks that it has too."""
    rest = text.lstrip().removeprefix(marker.strip())
    return rest.lstrip("\n") if prompt.endswith("\n") else rest


def _or_none(shown: Callable[[Message], str], message: Message) -> str | None:
    """What a template makes of a message; None where it refuses it."""
    try:
        return shown(message)
    except ModelError:
        return None


def _is_stored(call: ToolCall, function: Message) -> bool:
    """True if a call that was read is the one that was stored.

    Where a format has no types, templates write `True`, `False` and `None` as Python does, and tools read them so.
    """
    given = function.get("arguments")
    given = json.loads(given) if isinstance(given, str) else given or {}
    if call.name != function["name"] or call.arguments.keys() != given.keys():
        return False
    return all(
        _as_text(call.arguments[key]) == _as_text(value)
        or (call.as_text and (value is None or isinstance(value, bool)) and call.arguments[key] == str(value))
        for key, value in given.items()
    )


def _as_text(value: Any) -> str:
    """An argument as a format without types would write it."""
    return value if isinstance(value, str) else json.dumps(value)
