"""Finds out by trial what a chat template does: which roles it knows, how it writes thoughts and calls, what it opens.

A template is a program, and a model's name says nothing of it: each answer here is read off what it renders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from opd.formats import FORMATS, Format, ToolCall, read_reply, write_call
from opd.types import Message

Tools = list[dict[str, Any]] | None
Apply = Callable[..., str]
"""`apply(messages, tools=None, generate=False)`: what the template makes of these. Raises one of ERRORS."""
ERRORS = (Exception,)
"""What a template, a program of strangers, raises where it refuses: anything."""

VALUE = "opdValue"
_NAME, _KEY, _RESULT, _THOUGHT, _ANSWER = "opd_probe", "opd_key", "opdResult", "opdThought", "opdAnswer"
_USER: Message = {"role": "user", "content": "opdQuestion"}
_SAID: Message = {"role": "assistant", "content": "opdAnswer"}
PROBE = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Probes.",
        "parameters": {
            "type": "object",
            "properties": {_KEY: {"type": "string", "description": "A key."}},
            "required": [_KEY],
        },
    },
}
_JSON_ASKED_FOR = '{"name": function name, "parameters":'
"""What the templates of Llama tell a model that is offered tools."""
ID = "opdcall01"
"""An id of nine characters, as Mistral's templates ask for; the last of them is a number."""
_THOUGHTS = {pair for form in FORMATS.values() for pair in form.thought}
_SCAFFOLD = re.compile(
    "|".join(rf"{re.escape(o.strip())}\s*(?:{re.escape(c.strip())}\s*)?\Z" for o, c in sorted(_THOUGHTS)) or r"(?!)"
)
"""A thought at a prompt's end: empty, or just opened."""
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallHabit:
    """How a template renders the `tool_calls` of a message."""

    form: str
    """The format that reads what it writes, by name."""
    as_text: bool
    """It wants the arguments as JSON text."""
    empty: str | None
    """What it wants for content where there is none."""
    several: bool
    """It renders more than one call of a message."""
    written: str
    """The probe as it was rendered, for a person's eyes."""
    close: str
    """What stands between a last text argument and the end of the call, whose id is ID there."""
    answered: str
    """The same, where the call's result follows: some templates write the id only then."""
    names_in_ids: bool
    """It wants ids of the form `functions.NAME:0`, as Kimi's do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What a template does."""

    system: bool
    tool_role: bool
    tools: bool
    """It shows the tools that are offered."""
    calls: CallHabit | None
    """None: it does not render calls, or in a form that no format reads (`unread`)."""
    unread: str | None
    """A call as it was rendered, where no format reads it."""
    form: str
    """The format of replies: that of the calls, else the one whose markup the template or the tokenizer names."""
    thought_key: str | None
    """The key of a message whose text it renders as a thought; "content": it keeps a thought that stands there."""
    opens: bool
    """Its prompts open a thought, which the model goes on with."""
    late_system: bool
    """It shows a system message that stands later in a conversation."""
    dated: bool
    """It writes the date of the day."""


def read_habits(apply: Apply, known: frozenset[str], source: str, *, form: str | None = None) -> Habits:
    """Try a template. `known` are the tokenizer's control strings, `source` is the template's text.

    `form` is the format that a person has set; None finds it.
    """
    tools = _shows(apply, [_USER], _NAME, tools=[PROBE])
    calls, unread = _call_habit(apply, known)
    chosen = form or (calls.form if calls else _named_format(apply, known, source, tools=tools))
    return Habits(
        system=_shows(apply, [{"role": "system", "content": VALUE}, _USER], VALUE),
        tool_role=(calls is not None and _shows_result(apply, calls)) or _shows_plain_result(apply),
        tools=tools,
        calls=calls,
        unread=unread,
        form=chosen,
        thought_key=_thought_key(apply, FORMATS[chosen]),
        opens=_opens(apply, FORMATS[chosen]),
        late_system=_shows(apply, [_USER, _SAID, {"role": "system", "content": VALUE}, _USER], VALUE),
        dated=_is_dated(apply),
    )


def _opens(apply: Apply, form: Format) -> bool:
    """True if a prompt ends within a thought, with tools on offer or without."""
    for tools in (None, [PROBE]):
        try:
            if opens_thought(apply([_USER], tools=tools, generate=True), form):
                return True
        except ERRORS:
            continue
    return False


def _is_dated(apply: Apply) -> bool:
    """True if another day makes another prompt."""
    try:
        one, other = (apply([_USER], generate=True, strftime_now=lambda _, day=day: day) for day in ("one", "other"))
    except ERRORS:
        return False
    return one != other


def opens_thought(prompt: str, form: Format) -> bool:
    """True if a prompt ends within a thought, which the model goes on with."""
    for opened, closed in form.thought:
        at = prompt.rfind(opened.strip())
        if at >= 0 and prompt.rfind(closed.strip()) < at and not prompt[at + len(opened.strip()) :].strip():
            return True
    return False


def probe_call(as_text: bool, *, names_in_ids: bool = False, number: int = 1, value: str = VALUE) -> dict[str, Any]:
    """A call in the form that messages have."""
    arguments: Any = {_KEY: value}
    if as_text:
        arguments = json.dumps(arguments)
    call_id = f"functions.{_NAME}:{number - 1}" if names_in_ids else f"{ID[:-1]}{number}"
    return {"type": "function", "id": call_id, "function": {"name": _NAME, "arguments": arguments}}


def probe_reply(habit: CallHabit) -> Message:
    """The assistant's message that holds one such call."""
    call = probe_call(habit.as_text, names_in_ids=habit.names_in_ids)
    return {"role": "assistant", "content": habit.empty, "tool_calls": [call]}


def _shows(apply: Apply, messages: list[Message], text: str, **options: Any) -> bool:
    """True if the template renders these without complaint, and without dropping `text`."""
    try:
        return text in apply(messages, **options)
    except ERRORS:
        return False


def _shows_plain_result(apply: Apply) -> bool:
    said = {"role": "assistant", "content": _ANSWER}
    return _shows(apply, [_USER, said, {"role": "tool", "content": _RESULT}], _RESULT)


def _shows_result(apply: Apply, habit: CallHabit) -> bool:
    said = probe_reply(habit)
    return _shows(apply, [_USER, said, result_of(said)], _RESULT, tools=[PROBE])


def result_of(said: Message, text: str = _RESULT) -> Message:
    """The result of the call of `probe_reply`."""
    return {"role": "tool", "name": _NAME, "tool_call_id": said["tool_calls"][0]["id"], "content": text}


def _call_habit(apply: Apply, known: frozenset[str]) -> tuple[CallHabit | None, str | None]:
    """Find how the template renders a call, and a format that reads it; else the call as it was rendered, if it was."""
    unread = None
    for as_text, names_in_ids, empty, shown in _rendered_calls(apply):
        found = _format_of(shown, known)
        if found is None:
            unread = unread or shown
            continue
        name, end, text = found
        end = len(text[:end].removesuffix(FORMATS[name].stop))
        if empty == "" and _ends_sooner_without_content(apply, known, as_text, names_in_ids, shown):
            continue
        call = partial(probe_call, as_text, names_in_ids=names_in_ids)
        pair = {"role": "assistant", "content": empty, "tool_calls": [call(), call(number=2, value="opdSecond")]}
        return CallHabit(
            form=name,
            as_text=as_text,
            empty=empty,
            several=_shows(apply, [_USER, pair], "opdSecond", tools=[PROBE]),
            written=text[:end],
            close=text[text.index(VALUE) + len(VALUE) : end],
            answered=_answered_close(
                apply, known, name, {"role": "assistant", "content": empty, "tool_calls": [call()]}
            ),
            names_in_ids=names_in_ids,
        ), None
    return None, unread


def _shown_call(apply: Apply, said: Message, *after: Message) -> str | None:
    """What a template writes behind the prompt of a call, and what follows it; None where it refuses them."""
    try:
        return behind(apply([_USER], tools=[PROBE], generate=True), apply([_USER, said, *after], tools=[PROBE]))
    except ERRORS:
        return None


def _ends_sooner_without_content(
    apply: Apply, known: frozenset[str], as_text: bool, names_in_ids: bool, shown: str
) -> bool:
    """True if the template writes an answer behind the call, for a content that is "" and not for none."""
    said = {"role": "assistant", "content": None, "tool_calls": [probe_call(as_text, names_in_ids=names_in_ids)]}
    other = _shown_call(apply, said)
    return other is not None and VALUE in other and sum(map(shown.count, known)) > sum(map(other.count, known))


def _answered_close(apply: Apply, known: frozenset[str], form: str, said: Message) -> str:
    """What stands between the call's text argument and its end, where its result follows; "" where that is not read."""
    shown = _shown_call(apply, said, result_of(said))
    if shown is None or VALUE not in shown:
        return ""
    text = _up_to_the_end(shown, known - frozenset(FORMATS[form].markers), from_=shown.index(VALUE))
    reply = read_reply(text, form, names=(_NAME,))
    end = len(text[: reply.end].removesuffix(FORMATS[form].stop))
    return text[text.index(VALUE) + len(VALUE) : end]


def _rendered_calls(apply: Apply) -> Iterator[tuple[bool, bool, str | None, str]]:
    """Render one call in each shape that templates ask for.

    Yields: the arguments are text, ids hold names, the content where there is none, and what was rendered.
    """
    try:
        prompt = apply([_USER], tools=[PROBE], generate=True)
    except ERRORS:
        return
    for as_text, in_ids, empty, answered in product((False, True), (False, True), ("", None), (False, True)):
        call = probe_call(as_text, names_in_ids=in_ids)
        said = {"role": "assistant", "content": empty, "tool_calls": [call]}
        try:
            whole = apply([_USER, said, *([result_of(said)] if answered else [])], tools=[PROBE])
        except ERRORS:
            continue
        shown = behind(prompt, whole)
        if VALUE in shown:
            yield as_text, in_ids, empty, shown


def behind(prompt: str, whole: str) -> str:
    """What a conversation goes on with behind a prompt, whose last words it may lack: a thought that they open."""
    base = prompt if whole.startswith(prompt) else _SCAFFOLD.sub("", prompt)
    same = next((n for n, (a, b) in enumerate(zip(base, whole, strict=False)) if a != b), min(len(base), len(whole)))
    return whole[same:]


def _format_of(shown: str, known: frozenset[str]) -> tuple[str, int, str] | None:
    """Find the format that reads a rendered call: its name, where the call ends, and the text that it read."""
    wanted = ToolCall(name=_NAME, arguments={_KEY: VALUE})
    found: list[tuple[str, int, str]] = []
    for name in FORMATS:
        text = _up_to_the_end(shown, known - frozenset(FORMATS[name].markers), from_=shown.index(VALUE))
        reply = read_reply(text, name, names=(_NAME,))
        calls = [c for c in reply.calls if isinstance(c, ToolCall)]
        if len(calls) == len(reply.calls) == 1 and _same(calls[0], wanted):
            found.append((name, reply.end, text))
    same = [f for f in found if _bare(write_call(_NAME, {_KEY: VALUE}, f[0])) in _bare(f[2])]
    return next(iter(same or found), None)


def _up_to_the_end(text: str, ends: frozenset[str], *, from_: int) -> str:
    """Cut a text before the first of `ends` that stands behind a position."""
    return text[: min((at for end in ends if (at := text.find(end, from_)) >= 0), default=len(text))]


def _same(call: ToolCall, wanted: ToolCall) -> bool:
    return (call.name, call.arguments) == (wanted.name, wanted.arguments)


def _bare(text: str) -> str:
    return "".join(text.split())


def _named_format(apply: Apply, known: frozenset[str], source: str, *, tools: bool) -> str:
    """Guess the format of a template that renders no calls that we can read.

    The prompt may show the model how to write one; else it is the format most of whose markers are tokens, or stand in
    the template. Where nothing tells, tools are told in the form of hermes.
    """
    if tools and _JSON_ASKED_FOR in apply([_USER], tools=[PROBE], generate=True):
        return "llama"
    counts = {
        name: sum(marker in known or marker in source for marker in {*form.openers, *form.closers, *form.wrappers})
        for name, form in FORMATS.items()
    }
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else "hermes"


def _thought_key(apply: Apply, form: Format) -> str | None:
    """Find where a message's thought stands for the template to render it."""
    shows = partial(_shows, apply, text=_THOUGHT)
    for key in _THOUGHT_KEYS:
        if shows([_USER, {"role": "assistant", "content": _ANSWER, key: _THOUGHT}]):
            return key
    for opened, closed in form.thought:
        if shows([_USER, {"role": "assistant", "content": f"{opened}\n{_THOUGHT}\n{closed}\n\n{_ANSWER}"}]):
            return "content"
    return None
