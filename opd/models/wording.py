"""Messages as a template wants them: guarded, results tied to their calls, and what it does not know in plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from opd.formats import Format
from opd.models.encoding import Encoder
from opd.models.habits import Habits, Tools
from opd.models.said import Said
from opd.types import Message

_OWN_IDS = {False: re.compile(r"[A-Za-z0-9]{9}"), True: re.compile(r"functions\.[\w.-]+:\d+")}
"""Ids of calls that templates take: Mistral's nine characters, or Kimi's. Others are numbered anew."""


@dataclass
class _Open:
    """A call that waits for its result."""

    call: Message
    given: str | None
    """The id that it had in the conversation."""
    answered: bool = False


class Wording:
    """Words conversations for a template of these habits."""

    def __init__(self, habits: Habits, form: Format, encoder: Encoder) -> None:
        self.habits = habits
        self.format = form
        self.encoder = encoder
        self.said = Said(habits, form, encoder)

    def of(self, messages: Sequence[Message], tools: Tools) -> Iterator[list[Message]]:
        """The messages as the template wants them; then, where it refuses them, in other words: the user's messages
        joined, results as the user's messages, and calls in the text. A call without a result, or the reverse, is no
        conversation to some templates, and neither are two messages of the user in a row.
        """
        ready = self._ready(messages, tools)
        first = self._in_plain_text(ready, tools, as_user=not self.habits.tool_role)
        yield first
        yield _joined(first)
        if any(message["role"] == "tool" for message in ready):
            yield _joined(self._in_plain_text(ready, tools, as_user=True))
        if any(message.get("tool_calls") for message in ready):
            in_text = [self.said.in_text(message) for message in ready]
            yield _joined(self._in_plain_text(in_text, tools, as_user=True))

    def _ready(self, messages: Sequence[Message], tools: Tools) -> list[Message]:
        """Guard the messages, take the assistant's apart, and tie results to their calls, in the order of the calls."""
        names = [str(tool["function"].get("name")) for tool in tools or ()]
        ready: list[Message] = []
        calls: list[_Open] = []
        results: list[tuple[int, Message]] = []
        number = 0
        for message in messages:
            if message["role"] == "tool":
                results.append(self._answer(message, calls))
                continue
            ready += [result for _, result in sorted(results, key=lambda found: found[0])]
            results = []
            if message["role"] == "assistant":
                said = self.said.taken_apart(message, names)
                calls = [_Open(dict(call), call.get("id")) for call in said.get("tool_calls") or ()]
                for opened in calls:
                    opened.call["id"] = self._id_of(opened.call, number)
                    number += 1
                ready.append(self.said.put({**said, "tool_calls": [opened.call for opened in calls]}))
            else:
                ready.append(self.encoder.guard_message({**message, "content": message.get("content") or ""}))
        ready += [result for _, result in sorted(results, key=lambda found: found[0])]
        return _one_at_a_time(ready) if self.habits.calls and not self.habits.calls.several else ready

    def _id_of(self, call: Message, number: int) -> str:
        in_ids = self.habits.calls is not None and self.habits.calls.names_in_ids
        given = str(call.get("id"))
        if _OWN_IDS[in_ids].fullmatch(given):
            return given
        return f"functions.{call['function']['name']}:{number}" if in_ids else f"call{number + 1:05d}"

    def _answer(self, message: Message, calls: list[_Open]) -> tuple[int, Message]:
        """A tool's message, tied to the call that it answers, and the place of that call.

        Its id says which, else its name, else it is the first of those left.
        """
        left = [opened for opened in calls if not opened.answered]
        by_id = [o for o in left if o.given is not None and o.given == message.get("tool_call_id")]
        by_name = [o for o in left if o.call["function"]["name"] == message.get("name")]
        tied: Message = {**message, "content": message.get("content") or ""}
        place = len(calls)
        if opened := next(iter(by_id or by_name or left or calls[-1:]), None):
            opened.answered = True
            place = calls.index(opened)
            tied = {"name": opened.call["function"]["name"], **tied, "tool_call_id": opened.call["id"]}
        return place, self.encoder.guard_message(tied)

    def _in_plain_text(self, messages: list[Message], tools: Tools, *, as_user: bool) -> list[Message]:
        """Move what the template does not know into what it knows."""
        plain = _one_system(list(messages), late=self.habits.late_system)
        if tools and not self.habits.tools:
            listing = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
            text = f"You may call these tools, in the form {self.format.example}:\n{self.encoder.guard(listing)}"
            if plain and plain[0]["role"] == "system":
                plain[0] = {**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}
            else:
                plain.insert(0, {"role": "system", "content": text})
        if not self.habits.system and plain and plain[0]["role"] == "system":
            system = plain.pop(0)["content"]
            if plain and plain[0]["role"] == "user":
                plain[0] = {**plain[0], "content": f"{system}\n\n{plain[0]['content']}"}
            else:
                plain.insert(0, {"role": "user", "content": system})
        return _results_as_user(plain) if as_user else plain


def _one_system(messages: list[Message], *, late: bool) -> list[Message]:
    """Join the system messages at the beginning; later ones become the user's where the template drops them."""
    first = 0
    while first < len(messages) and messages[first]["role"] == "system":
        first += 1
    head = messages[:first]
    if first > 1:
        head = [{**head[0], "content": "\n\n".join(str(m["content"]) for m in head)}]
    rest = messages[first:]
    if late or not any(message["role"] == "system" for message in rest):
        return [*head, *rest]
    return [*head, *_joined([{**m, "role": "user"} if m["role"] == "system" else m for m in rest])]


def _joined(messages: list[Message]) -> list[Message]:
    """Join the user's messages that stand next to each other: strict templates want alternating roles."""
    made: list[Message] = []
    for message in messages:
        if made and message["role"] == made[-1]["role"] == "user":
            made[-1] = {**made[-1], "content": f"{made[-1]['content']}\n\n{message['content']}"}
        else:
            made.append(message)
    return made


def _results_as_user(messages: list[Message]) -> list[Message]:
    """Turn tool results into user messages, those of one turn into one: strict templates want alternating roles."""
    plain: list[Message] = []
    after_result = False
    for message in messages:
        if message["role"] == "tool" and after_result:
            plain[-1] = {"role": "user", "content": f"{plain[-1]['content']}\n{message['content']}"}
        elif message["role"] == "tool":
            kept = {key: value for key, value in message.items() if key not in ("name", "tool_call_id")}
            plain.append({**kept, "role": "user"})
        else:
            plain.append(message)
        after_result = message["role"] == "tool"
    return plain


def _one_at_a_time(messages: list[Message]) -> list[Message]:
    """Give each call a message of its own, its result behind it, for templates that render one call of a message."""
    made: list[Message] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            made.append(message)
            continue
        results = []
        while at < len(messages) and messages[at]["role"] == "tool":
            results.append(messages[at])
            at += 1
        for n, call in enumerate(calls):
            first = message if n == 0 else {key: v for key, v in message.items() if key in ("role", "content")}
            made.append({**first, **({"content": ""} if n else {}), "tool_calls": [call]})
            made += [r for r in results if r.get("tool_call_id") == call["id"]]
        made += [r for r in results if r.get("tool_call_id") not in [call["id"] for call in calls]]
    return made
