"""Readers of what stands between the markers of a call. Each is data: which keys, which tags, which separators."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

from opd.formats.reply import MalformedCall, ToolCall
from opd.formats.source import CallError, Calls, Source
from opd.formats.values import PYTHON, Spelling, read_object, read_value
from opd.json_text import JsonError, read_json

NAME = r"[^\s<>\[\]{}|]{1,256}"
"""A tool's name where nothing quotes it."""


class Body(Protocol):
    """Reads the calls that begin at a position."""

    def read(self, source: Source, at: int, example: str) -> tuple[Calls, int]:
        """Return the calls and where they end. Raises CallError, in words that show the example."""
        ...


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The keys of a call that is a JSON object; of those that mean the same, one may stand."""

    name: tuple[str, ...] = ("name", "function")
    arguments: tuple[str, ...] = ("arguments", "parameters")
    id: str = "id"
    ignored: tuple[str, ...] = ("type",)

    def means_a_call(self, value: Any, names: frozenset[str]) -> bool:
        """True if a JSON value is meant as a call, and no answer that is JSON."""
        name = next((value[key] for key in self.name if key in value), None) if isinstance(value, dict) else None
        return isinstance(name, str) and (name in names or any(key in value for key in self.arguments))

    def call(self, value: Any, example: str) -> ToolCall | MalformedCall:
        """The call that a JSON value describes."""
        if not isinstance(value, dict):
            return MalformedCall(error=f"the tool call is not a JSON object; write {example}")
        name_key = next((key for key in self.name if key in value), self.name[0])
        name = value.get(name_key)
        if not isinstance(name, str) or not name:
            return MalformedCall(error=f'the tool call has no "{self.name[0]}"; write {example}')
        given = [key for key in self.arguments if key in value]
        if unknown := sorted(set(value) - {name_key, self.id, *self.ignored, *given}):
            return MalformedCall(error=f"the tool call has the unknown key {unknown[0][:80]!r}; write {example}")
        if len(given) == 2:
            both = " and ".join(f'"{key}"' for key in given)
            return MalformedCall(error=f"the tool call has both {both}; write {example}")
        arguments = _arguments(value[given[0]]) if given else {}
        if not isinstance(arguments, dict):
            return MalformedCall(error=f'"{given[0]}" must be a JSON object; write {example}')
        its_id = value.get(self.id)
        return ToolCall(name=name, arguments=arguments, id=its_id if isinstance(its_id, str) and its_id else None)


def _arguments(value: Any) -> Any:
    """Arguments as they are, or read from a JSON string, as OpenAI's interface has them."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        read, end = read_json(text, 0) if text.startswith("{") else (value, 0)
    except JsonError:
        return value
    return read if end == len(text) else value


def read_strictly(source: Source, at: int, example: str) -> tuple[Any, int]:
    """Read one JSON value. Raises CallError, in words for the model."""
    try:
        return read_json(source.text, at)
    except JsonError as error:
        raise CallError(f"the tool call is not valid JSON ({error}); write {example}") from None


@dataclass(frozen=True, kw_only=True)
class JsonObject:
    """One JSON object."""

    keys: Keys = Keys()

    def read(self, source: Source, at: int, example: str) -> tuple[Calls, int]:
        at = source.skip_space(at)
        if not source.text.startswith("{", at):
            raise CallError(f"the tool call is not a JSON object; write {example}")
        value, end = read_strictly(source, at, example)
        return [self.keys.call(value, example)], end


@dataclass(frozen=True, kw_only=True)
class JsonObjects:
    """JSON objects one after another, with semicolons between them."""

    keys: Keys = Keys()

    def read(self, source: Source, at: int, example: str) -> tuple[Calls, int]:
        calls, at = JsonObject(keys=self.keys).read(source, at, example)
        while source.holds(";", at):
            more, at = JsonObject(keys=self.keys).read(source, source.skip_space(at) + 1, example)
            calls += more
        return calls, at


@dataclass(frozen=True, kw_only=True)
class JsonList:
    """A JSON list of calls that is not empty."""

    keys: Keys = Keys()

    def read(self, source: Source, at: int, example: str) -> tuple[Calls, int]:
        at = source.skip_space(at)
        if not source.text.startswith("[", at):
            raise CallError(f"the tool calls are not a JSON list; write {example}")
        values, end = read_strictly(source, at, example)
        if not values:
            raise CallError(f"the list of tool calls is empty; write {example}")
        return [self.keys.call(value, example) for value in values], end


@dataclass(frozen=True, kw_only=True)
class NamedJson:
    """A name, and a JSON object with the arguments."""

    head: re.Pattern[str]
    """What stands before the object, with the groups `name` and, where there is one, `id`."""
    tail: re.Pattern[str] | None = None
    """What must stand after the object."""

    def read(self, source: Source, at: int, example: str) -> tuple[Calls, int]:
        head = self.head.match(source.text, at)
        if head is None:
            raise CallError(f"the tool call cannot be read; write {example}")
        if not source.text.startswith("{", head.end()):
            raise CallError(f"the arguments of {head['name'][:80]} are not a JSON object; write {example}")
        arguments, end = read_strictly(source, head.end(), example)
        tail = self.tail.match(source.text, end) if self.tail else None
        if self.tail and tail is None:
            raise CallError(f"there is more after the arguments; write {example}", end)
        call = ToolCall(name=head["name"], arguments=arguments, id=head.groupdict().get("id") or None)
        return [call], end if tail is None else tail.end()


@dataclass(frozen=True, kw_only=True)
class Tags:
    """A name, and each argument between tags, as raw text; the tool's schema says how the text is to be read.

    A value ends at the first closing tag that another argument or the end of the call follows: the tag alone may
    stand in it.
    """

    head: re.Pattern[str]
    """What stands before the arguments; group 1 is the name."""
    argument: re.Pattern[str]
    """What stands before a value; group 1 is its key."""
    value_end: re.Pattern[str]
    tail: re.Pattern[str]
    lines: bool = False
    """True: a value stands on lines of its own, and one line break at each of its ends is not part of it."""
    typed: bool = False
    """True: group 2 of `argument` is "true" before a text, else the value is JSON."""

    def read(self, source: Source, at: int, example: str) -> tuple[Calls, int]:
        wrong = f"the tool call cannot be read; write {example}"
        head = self.head.match(source.text, at)
        if head is None:
            raise CallError(wrong)
        at = head.end()
        arguments: dict[str, Any] = {}
        while argument := self.argument.match(source.text, at):
            at = argument.end()
            end = source.find(self.value_end, at)
            if end is None or argument[1] in arguments:
                raise CallError(wrong, at)
            value = source.text[at : end.start()]
            if self.lines:
                value = value.removeprefix("\n").removesuffix("\n")
            arguments[argument[1]] = _json(value, example) if self.typed and argument[2] != "true" else value
            at = end.end()
        tail = self.tail.match(source.text, at)
        if tail is None:
            raise CallError(wrong, at)
        return [ToolCall(name=head[1], arguments=arguments, as_text=not self.typed)], tail.end()


def _json(text: str, example: str) -> Any:
    """Read a JSON value of any kind. Raises CallError."""
    source = Source(f"[{text}]")
    values, end = read_strictly(source, 0, example)
    if end != len(source.text) or len(values) != 1:
        raise CallError(f"an argument is not one JSON value; write {example}")
    return values[0]


_PYTHON_CALL = re.compile(r"\s*+([A-Za-z_][\w.-]{0,255}+)\s*+\(")
_KEYWORD = re.compile(r"\s*+([^\W\d]\w{0,255}+)\s*+=(?!=)")


@dataclass(frozen=True, kw_only=True)
class PythonCalls:
    """Calls as Python writes them, with literals as keyword arguments: in a list, or a line each."""

    bracketed: bool = True

    def read(self, source: Source, at: int, example: str) -> tuple[Calls, int]:
        try:
            return self._read_list(source, at) if self.bracketed else self._read_lines(source, at)
        except CallError as error:
            raise CallError(f"the tool call cannot be read ({error}); write {example}", error.at) from None

    def _read_list(self, source: Source, at: int) -> tuple[Calls, int]:
        if not source.holds("[", at):
            raise CallError("there is no list of calls")
        calls: Calls = []
        at = source.skip_space(at) + 1
        while True:
            call, at = _read_python_call(source, at)
            calls.append(call)
            at = source.skip_space(at)
            if source.text.startswith("]", at):
                return calls, at + 1
            if not source.text.startswith(",", at):
                raise CallError("a comma or ] is missing after a call")
            at += 1

    def _read_lines(self, source: Source, at: int) -> tuple[Calls, int]:
        calls: Calls = []
        while not calls or _PYTHON_CALL.match(source.text, at):
            call, at = _read_python_call(source, at)
            calls.append(call)
        return calls, at


def _read_python_call(source: Source, at: int) -> tuple[ToolCall, int]:
    head = _PYTHON_CALL.match(source.text, at)
    if head is None:
        raise CallError("there is no call of a function")
    at = head.end()
    arguments: dict[str, Any] = {}
    while not source.holds(")", at):
        key = _KEYWORD.match(source.text, at)
        if key is None:
            raise CallError("every argument needs its name, as in key=value")
        if key[1] in arguments:
            raise CallError(f"the argument {key[1][:80]!r} stands twice")
        arguments[key[1]], at = read_value(source, key.end(), PYTHON)
        at = source.skip_space(at)
        if source.text.startswith(",", at):
            at += 1
        elif not source.text.startswith(")", at):
            raise CallError("a comma or ) is missing after a value, which may be a literal alone")
    return ToolCall(name=head[1], arguments=arguments), source.skip_space(at) + 1


_BRACED = re.compile(r"\s*+call:\s*+([^\s{}<>]{1,256}?)\s*+\{")


@dataclass(frozen=True, kw_only=True)
class Braced:
    """Gemma's `call:name{key:value}`."""

    spelling: Spelling

    def read(self, source: Source, at: int, example: str) -> tuple[Calls, int]:
        head = _BRACED.match(source.text, at)
        if head is None:
            raise CallError(f"the tool call cannot be read; write {example}")
        try:
            arguments, end = read_object(source, head.end(), self.spelling)
        except CallError as error:
            raise CallError(f"the tool call cannot be read ({error}); write {example}") from None
        return [ToolCall(name=head[1], arguments=arguments)], end
