"""Reading tool calls out of a model's text, and writing them. Nothing here runs a call, and no text makes it raise.

The formats that are read, by name:

    hermes   any number of `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` with free text around them
             (Hermes, Qwen 2.5 and 3, and the plain format of templates that know no tools); within the same tags
             also `<function=NAME><parameter=KEY>text</parameter></function>` (Qwen3-Coder, Qwen 3.5)
    llama    `{"name": ..., "parameters": {...}}` as the whole text or after `<|python_tag|>`; several with `;`
    mistral  `[TOOL_CALLS]` before a JSON list of calls, or before each `NAME{...}` (`NAME[ARGS]{...}`)
    json     one such JSON object, or a list of them, as the whole text
    auto     whichever of these is there; the first markup that is found decides for the whole text

A thought is never read: neither `<think>...</think>`, nor the text before a `</think>` whose `<think>` the template
wrote. A call that cannot be read is answered, never guessed. JSON is read strictly, and the JSON itself says where a
call ends, so that a `</tool_call>` inside a string ends nothing.

transformers' `parse_response` does this for the templates it knows, for well-formed text. A malformed call makes
it raise (and trl's wrapper then takes all calls of the turn for plain text), so that nobody can tell the model what
was wrong; a `</tool_call>` in a string breaks it; of a key that stands twice the last wins; calls in a thought that
the template opened are run. Hence these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, get_args

from opd.json_text import JsonError, read_json

ToolFormat = Literal["auto", "hermes", "llama", "mistral", "json"]
TOOL_FORMATS: tuple[str, ...] = get_args(ToolFormat)

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FORMS = {
    "hermes": f'{OPEN}{{"name": "...", "arguments": {{...}}}}{CLOSE}',
    "llama": '{"name": "...", "parameters": {...}}',
    "mistral": "[TOOL_CALLS]name{...}",
    "json": '{"name": "...", "arguments": {...}}',
}
"""An example of a call in each format, for error texts and prompts."""

_OPENERS = {OPEN: "hermes", "<|python_tag|>": "llama", "[TOOL_CALLS]": "mistral"}
_MARKED = tuple(_OPENERS.values())
_BARE = ("auto", "llama", "json")
"""Formats in which the whole answer may be JSON."""
_ENDS = ("<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "</s>")
"""Tokens after which a model stops; one that is no stop token of the run stands at the end of the text."""

_SPACE = re.compile(r"\s*+")
_CALL_END = re.compile(rf"\s*+{CLOSE}")
_THINK_OPEN = re.compile(r"\s*+<think>")
_BARE_START = re.compile(r"\s*+(?=\{|\[\s*+\{)")
_CLOSE_MARK = re.compile(CLOSE)
_THINK_END = re.compile("</think>")
_MISTRAL_NAME = re.compile(
    r"\s*+([^\s\[\]{}]{1,256})\s*+(?:\[CALL_ID\][^\s\[\]{}]{0,256}+)?\s*+(?:\[ARGS\])?\s*+(?=\{)"
)
_FUNCTION = re.compile(r"<function=([^\s<>=]{1,256})\s*+>")
_PARAMETER = re.compile(r"\s*+<parameter=([^\s<>=]{1,256})\s*+>")
_VALUE_END = re.compile(r"</parameter>(?=\s*+<(?:parameter=|/function>))")
_FUNCTION_END = re.compile(rf"\s*+</function>\s*+{CLOSE}")
_FUNCTION_FORM = f"{OPEN}<function=name><parameter=key>value</parameter></function>{CLOSE}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that could be read; a tool of that name may not exist."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    as_text: bool = False
    """True: every argument is the text that the model wrote, since the format has no types; the tool's schema has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MalformedCall:
    """A text that was meant as a call and could not be read; `error` says why, in words for the model."""

    error: str


def parse_tool_calls(
    text: str, tool_format: ToolFormat = "auto", *, starts_thinking: bool = False
) -> list[ToolCall | MalformedCall]:
    """Read every call in the text, in order; empty when the text does not try to call anything.

    `starts_thinking` means that the model's template has opened a thought already, so that a text without
    `</think>` is nothing but thought. Takes time proportional to the text's length.
    """
    return _Parser(text, tool_format).parse(starts_thinking=starts_thinking)


def format_call(name: str, arguments: dict[str, Any], tool_format: ToolFormat = "hermes") -> str:
    """Write a call as a model would, in hermes where the format is auto. Raises ValueError for nan and inf."""
    if tool_format == "mistral":
        return f"[TOOL_CALLS]{name}{_dumps(arguments)}"
    call = _dumps({"name": name, "parameters" if tool_format == "llama" else "arguments": arguments})
    return call if tool_format in ("llama", "json") else f"{OPEN}{call}{CLOSE}"


def valid_tool_calls(completions: Sequence[str | list[dict[str, Any]]], **kwargs: Any) -> list[float]:
    """Reward 1 for a completion that calls at least one tool and whose every call can be read, else 0."""
    return [float(_all_valid(c if isinstance(c, str) else str(c[-1]["content"]))) for c in completions]


def _all_valid(text: str) -> bool:
    calls = parse_tool_calls(text)
    return bool(calls) and all(isinstance(call, ToolCall) for call in calls)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


class _Parser:
    """Reads one text. Its methods take the position to read from, append to `calls`, and return where to go on."""

    def __init__(self, text: str, tool_format: ToolFormat) -> None:
        self.text = _without_end(text)
        self.format = tool_format
        self.calls: list[ToolCall | MalformedCall] = []
        self._find = _Searches(self.text).find

    def parse(self, *, starts_thinking: bool) -> list[ToolCall | MalformedCall]:
        answer = self._after_thought(0) if starts_thinking else 0
        while answer is not None:
            self.calls.clear()  # what was read so far turned out to be a thought
            answer = self._read_answer(answer)
        return self.calls

    def _read_answer(self, start: int) -> int | None:
        """Read up to the end, or up to a `</think>` without a `<think>`: then where the answer begins anew."""
        at: int | None = start
        while at is not None and (thought := _THINK_OPEN.match(self.text, at)):
            at = self._after_thought(thought.end())
        if at is None:
            return None
        formats = _MARKED if self.format == "auto" else (self.format,)
        if self.format in _BARE and (bare := _BARE_START.match(self.text, at)):
            at, formats = self._read_bare(bare.end()), ()
        while mark := _marks(formats).search(self.text, at):
            if mark[0] == "</think>":
                return mark.end()
            if mark[0] == "<think>":
                after = self._after_thought(mark.end())
                if after is None:
                    return None
                at = after
            else:
                found = _OPENERS[mark[0]]
                at, formats = self._readers[found](self, mark.end()), (found,)
        return None

    def _after_thought(self, at: int) -> int | None:
        end = self._find(_THINK_END, at)
        return None if end is None else end.end()

    def _read_tagged(self, start: int) -> int:
        """Read what follows an opening tag of hermes."""
        close = self._find(_CLOSE_MARK, start)
        if close is None:
            return self._refuse(f"the tool call is not closed by {CLOSE}", start, "hermes")
        body = _skip_space(self.text, start)
        if self.text.startswith("<function=", body):
            return self._read_function(body)
        try:
            call, end = _read_object(self.text, body, "hermes")
        except JsonError as error:
            return self._refuse(str(error), start, "hermes")
        if closed := _CALL_END.match(self.text, end):
            self.calls.append(call)
            return closed.end()
        if self.text.startswith(OPEN, _skip_space(self.text, end)):
            self.calls.append(MalformedCall(error=f"the tool call is not closed by {CLOSE}"))
            return end
        return self._refuse(_no_json("there is more after the object", "hermes"), end, "hermes")

    def _read_function(self, start: int) -> int:
        """Read hermes in the form of Qwen3-Coder, whose values are raw text.

        A value ends at the first `</parameter>` that another parameter or the end of the function follows.
        """
        name = _FUNCTION.match(self.text, start)
        if name is None:
            return self._refuse(f"the tool call cannot be read; write {_FUNCTION_FORM}", start, "hermes")
        at = name.end()
        arguments: dict[str, str] = {}
        while parameter := _PARAMETER.match(self.text, at):
            at = parameter.end()
            end = self._find(_VALUE_END, at)
            if end is None or parameter[1] in arguments:
                break
            arguments[parameter[1]] = self.text[at : end.start()].removeprefix("\n").removesuffix("\n")
            at = end.end()
        closed = _FUNCTION_END.match(self.text, at)
        if closed is None:
            return self._refuse(f"the tool call cannot be read; write {_FUNCTION_FORM}", at, "hermes")
        self.calls.append(ToolCall(name=name[1], arguments=arguments, as_text=True))
        return closed.end()

    def _read_llama(self, start: int) -> int:
        return self._read_rest(_read_objects, start, "llama")

    def _read_bare(self, start: int) -> int:
        form = "llama" if self.format == "llama" else "json"
        return self._read_rest(_read_list if self.text[start] == "[" else _read_objects, start, form)

    def _read_mistral(self, start: int) -> int:
        body = _skip_space(self.text, start)
        return self._read_rest(_read_list if self.text.startswith("[", body) else _read_named, body, "mistral")

    _readers: ClassVar[dict[str, Callable[[_Parser, int], int]]] = {
        "hermes": _read_tagged,
        "llama": _read_llama,
        "mistral": _read_mistral,
    }

    def _read_rest(self, read: _ReadCalls, start: int, form: str) -> int:
        """Take the calls that `read` finds, if nothing but the next call or a thought follows them."""
        try:
            calls, end = read(self.text, start, form)
        except JsonError as error:
            return self._refuse(str(error), start, form)
        after = _skip_space(self.text, end)
        follows = ("[TOOL_CALLS]",) if form == "mistral" else ()
        if after < len(self.text) and not self.text.startswith((*follows, "<think>", "</think>"), after):
            return self._refuse(_no_json("there is more after the call", form), end, form)
        self.calls += calls
        return after

    def _refuse(self, error: str, at: int, form: str) -> int:
        """Note a call that cannot be read and go on behind it, or at the end of the thought that it is part of.

        Only tags tell where that is; without them it is the end of the text.
        """
        self.calls.append(MalformedCall(error=error))
        ends = [thought.start()] if (thought := self._find(_THINK_END, at)) else [len(self.text)]
        if form == "hermes" and (close := self._find(_CLOSE_MARK, at)):
            ends.append(close.end())
        return min(ends)


class _Searches:
    """Remembers what was found in one text: many searches together pass over it once."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._found: dict[re.Pattern[str], tuple[int, re.Match[str] | None]] = {}

    def find(self, pattern: re.Pattern[str], at: int) -> re.Match[str] | None:
        """The same as `pattern.search(text, at)`."""
        since, found = self._found.get(pattern, (len(self._text) + 1, None))
        if not since <= at or (found is not None and found.start() < at):
            found = pattern.search(self._text, at)
            self._found[pattern] = (at, found)
        return found


_Calls = list[ToolCall | MalformedCall]
_ReadCalls = Callable[[str, int, str], tuple[_Calls, int]]
"""From a text, a position and a format to the calls there and where they end. Raises JsonError, in words for the model,
where one of them cannot be read."""


def _read_objects(text: str, start: int, form: str) -> tuple[_Calls, int]:
    """Read JSON objects one after another, with semicolons between them."""
    calls: _Calls = []
    at = start
    while True:
        call, at = _read_object(text, _skip_space(text, at), form)
        calls.append(call)
        at = _skip_space(text, at)
        if not text.startswith(";", at):
            return calls, at
        at += 1


def _read_list(text: str, start: int, form: str) -> tuple[_Calls, int]:
    """Read a JSON list of calls that is not empty."""
    values, end = _read_value(text, start, form)
    if not values:
        raise JsonError(f"the list of tool calls is empty; write {FORMS[form]}")
    return [_call(value, form) for value in values], end


def _read_named(text: str, start: int, form: str) -> tuple[_Calls, int]:
    """Read one call of mistral's form `NAME{...}`."""
    name = _MISTRAL_NAME.match(text, start)
    if name is None:
        raise JsonError(f"the tool call cannot be read; write {FORMS[form]}")
    arguments, end = _read_value(text, name.end(), form)
    return [ToolCall(name=name[1], arguments=arguments)], end


def _read_object(text: str, start: int, form: str) -> tuple[ToolCall | MalformedCall, int]:
    """Read one JSON object as a call; return it and where it ends. Raises JsonError."""
    if not text.startswith("{", start):
        raise JsonError(f"the tool call is not a JSON object; write {FORMS[form]}")
    value, end = _read_value(text, start, form)
    return _call(value, form), end


def _read_value(text: str, start: int, form: str) -> tuple[Any, int]:
    """Read one JSON value; return it and where it ends. Raises JsonError, in words for the model."""
    try:
        return read_json(text, start)
    except JsonError as error:
        raise JsonError(_no_json(str(error), form)) from None


def _skip_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return at if space is None else space.end()


@cache
def _marks(formats: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern of the tags that open a call in one of these formats, and of those of a thought."""
    openers = [opener for opener, name in _OPENERS.items() if name in formats]
    return re.compile("|".join(map(re.escape, (*openers, "<think>", "</think>"))))


def _call(value: Any, form: str) -> ToolCall | MalformedCall:
    """The call that a JSON value describes."""
    if not isinstance(value, dict):
        return MalformedCall(error=f"the tool call is not a JSON object; write {FORMS[form]}")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        return MalformedCall(error=f'the tool call has no "name"; write {FORMS[form]}')
    given = [key for key in ("arguments", "parameters") if key in value]
    if unknown := sorted(set(value) - {"name", "id", "type", *given}):
        return MalformedCall(error=f"the tool call has the unknown key {unknown[0][:80]!r}; write {FORMS[form]}")
    if len(given) == 2:
        return MalformedCall(error=f'the tool call has both "arguments" and "parameters"; write {FORMS[form]}')
    arguments = value[given[0]] if given else {}
    if not isinstance(arguments, dict):
        return MalformedCall(error=f'"{given[0]}" must be a JSON object; write {FORMS[form]}')
    return ToolCall(name=name, arguments=arguments)


def _no_json(reason: str, form: str) -> str:
    return f"the tool call is not valid JSON ({reason}); write {FORMS[form]}"


def _without_end(text: str) -> str:
    """Cut the token that ended the text, and white space around it."""
    text = text.rstrip()
    for token in _ENDS:
        if text.endswith(token):
            return text.removesuffix(token)
    return text
