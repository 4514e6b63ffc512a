"""Harmony, of gpt-oss: messages with a channel each, and calls as messages to `functions.NAME`.

    <|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.get
    <|constrain|>json<|message|>{"key": "a"}<|call|>

(in one line). A message on the channel `analysis` is a thought, one on `final` the answer, and one on `commentary`
without a recipient belongs to the answer too. The prompt ends in `<|start|>assistant`, so that the first message
begins within its header.
"""

from __future__ import annotations

import re
from typing import Any

from opd.formats.bodies import read_strictly
from opd.formats.form import Format, dumps
from opd.formats.reply import MalformedCall, Reply, ToolCall, join_thoughts
from opd.formats.source import CallError, Source

START, CHANNEL, MESSAGE, CALL = "<|start|>", "<|channel|>", "<|message|>", "<|call|>"
EXAMPLE = f"{CHANNEL}commentary to=functions.name <|constrain|>json{MESSAGE}{{...}}{CALL}"
_TO = re.compile(r"(?:^|\s)to=([^\s<]{1,256})")
_ON = re.compile(r"<\|channel\|>\s*+(\w{1,64})")
_HEADER_END = re.compile(r"<\|(?:message|start|end|call|return)\|>")
_END = re.compile(r"<\|(?:end|call|return)\|>|(?=<\|start\|>)")
_HEADERLESS_END = re.compile(rf"{_END.pattern}|(?=<\|channel\|>)")
_FIRST = re.compile(
    r"\s*+(?:<\|start\|>assistant|(?:assistant\s*+)?(?:<\|channel\|>|to=functions\.[^<]{1,256}<\|"
    r"|to=[^\s<]{1,256}\s*+<\|channel))"
)
"""How a reply begins: within the header of its first message, or with the next one."""
_LAST = ("<|endoftext|>", "<|im_end|>", "</s>")


def _read(text: str, starts_thinking: bool) -> Reply:
    return _Messages(text).read(starts_thinking=starts_thinking)


def _write(name: str, arguments: dict[str, Any]) -> str:
    return f"{CHANNEL}commentary to=functions.{name} <|constrain|>json{MESSAGE}{dumps(arguments)}{CALL}"


class _Messages:
    """Reads the messages of one text."""

    def __init__(self, text: str) -> None:
        text = text.rstrip()
        for token in _LAST:
            text = text.removesuffix(token)
        self.source = Source(text)
        self.text = text
        self.calls: list[ToolCall | MalformedCall] = []
        self.thoughts: list[str] = []
        self.content: list[str] = []
        self.end = 0

    def read(self, *, starts_thinking: bool) -> Reply:
        at = 0
        if starts_thinking:
            at = self._read_body("analysis", 0, _END)
        elif not _FIRST.match(self.text):
            at = self._read_body("final", 0, _HEADERLESS_END)
        while at < len(self.text):
            at = self._read_message(at)
        content = "\n\n".join(filter(None, (content.strip() for content in self.content)))
        return Reply(thought=join_thoughts(self.thoughts), content=content, calls=self.calls, end=self.end)

    def _read_message(self, at: int) -> int:
        """Read one message whose header begins at `at`; return where the next begins."""
        start = at + len(START) if self.text.startswith(START, at) else at
        end = self.source.find(_HEADER_END, start)
        header = self.text[start : end.start() if end else None]
        to, channel = _TO.search(header), _ON.search(header)
        if end is None or end[0] != MESSAGE:
            if to:
                self._refuse(f"the tool call has no {MESSAGE} before its arguments; write {EXAMPLE}", start)
            elif not channel and end is not None and start == at:
                self.content.append(header)  # what stands between two messages
            return len(self.text) if end is None else end.start() if end[0] == START else end.end()
        if to:
            return self._read_call(to[1], end.end())
        return self._read_body(channel[1] if channel else "final", end.end(), _END)

    def _read_body(self, channel: str, at: int, ending: re.Pattern[str]) -> int:
        """Note a thought or a piece of the answer; return where the next message begins."""
        end = self.source.find(ending, at)
        body = self.text[at : end.start() if end else None]
        (self.thoughts if channel == "analysis" else self.content).append(body)
        return end.end() if end else len(self.text)

    def _read_call(self, recipient: str, at: int) -> int:
        name = recipient.removeprefix("functions.")
        if name == recipient or not name:
            return self._refuse(f"there is no recipient {recipient[:80]!r}; write {EXAMPLE}", at)
        start = self.source.skip_space(at)
        if not self.text.startswith("{", start):
            return self._refuse(f"the arguments of {name[:80]} are not a JSON object; write {EXAMPLE}", at)
        try:
            arguments, end = read_strictly(self.source, start, EXAMPLE)
        except CallError as error:
            return self._refuse(str(error), at)
        after = self.source.skip_space(end)
        closed = _END.match(self.text, after)
        if closed is None and after < len(self.text):
            return self._refuse(
                f"the tool call is not valid JSON (there is more after the object); write {EXAMPLE}", end
            )
        self.calls.append(ToolCall(name=name, arguments=arguments))
        self.end = closed.end() if closed else end
        return closed.end() if closed else after

    def _refuse(self, error: str, at: int) -> int:
        """Note a call that cannot be read and go on at the end of its message."""
        self.calls.append(MalformedCall(error=error))
        end = self.source.find(_END, at)
        self.end = end.end() if end else len(self.text)
        return self.end


FORMAT = Format(
    name="harmony",
    example=EXAMPLE,
    write=_write,
    thought=((f"{CHANNEL}analysis{MESSAGE}", "<|end|>"),),
    inner=(START, CHANNEL, MESSAGE, "<|constrain|>", CALL, "<|end|>", "<|return|>"),
    stop=CALL,
    whole=_read,
    begins=_FIRST,
)
