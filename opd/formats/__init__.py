"""How families of models write a reply: their thoughts, their tool calls, and the text around them.

A format is data: markers, and a reader of what stands between them (`form`, `bodies`). Each file of this folder with a
`FORMAT` describes one family, and `FORMATS` has them by name. `read_reply` takes a reply apart, `write_call` writes a
call. No text makes the reading raise, and it takes time proportional to the text's length.

What is read is never guessed: a call that cannot be read is answered by words that say why. A thought calls nothing:
neither between the markers of thoughts, nor before a closing one whose opening one the template wrote.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from opd.formats.form import Format, as_text, dumps
from opd.formats.reading import read_marked, unite
from opd.formats.reply import MalformedCall, Reply, ToolCall

__all__ = ["AUTO", "FORMATS", "Format", "MalformedCall", "Reply", "ToolCall", "read_reply", "write_call"]


def _found() -> dict[str, Format]:
    modules = (import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__))
    found = [module.FORMAT for module in modules if hasattr(module, "FORMAT")]
    return {form.name: form for form in sorted(found, key=lambda form: (form.name != "hermes", form.name))}


FORMATS: dict[str, Format] = _found()
"""Every format by its name, the plain one first."""
AUTO: Format = unite(FORMATS.values(), example=FORMATS["hermes"])
"""The format of texts whose format is not known: the first markup of any family decides for that family."""


def read_reply(text: str, form: str = "auto", *, starts_thinking: bool = False, names: Collection[str] = ()) -> Reply:
    """Take a reply apart into thought, content and calls.

    `form` is a name of `FORMATS`, or "auto". `starts_thinking` says that the template has opened a thought already, so
    that a text without the closing marker is nothing but thought. `names` are the tools on offer; they only help to
    tell a call without markers from an answer. Never raises for a text; KeyError for an unknown form.
    """
    chosen = AUTO if form == "auto" else FORMATS[form]
    for family in chosen.families:
        if family.begins and family.begins.match(text):
            chosen = family
    if chosen.whole:
        return chosen.whole(text, starts_thinking)
    return read_marked(text, chosen, starts_thinking=starts_thinking, names=frozenset(names))


def write_call(name: str, arguments: dict[str, Any], form: str) -> str:
    """Write a call as a model of the family would; "auto" is Hermes' form.

    Raises ValueError for nan and inf, and for what the form has no way to write, such as a closing tag within a value
    of raw text.
    """
    chosen = AUTO if form == "auto" else FORMATS[form]
    text = chosen.write(name, arguments)
    calls = read_reply(text, form, names=(name,)).calls
    if len(calls) != 1 or not _is_call(calls[0], name, arguments):
        raise ValueError(f"a call of {name[:80]!r} with these arguments cannot be written in the form {form!r}")
    return text


def _is_call(call: ToolCall | MalformedCall, name: str, arguments: dict[str, Any]) -> bool:
    """True if a call that was read is the one that was written."""
    if isinstance(call, MalformedCall) or call.name != name:
        return False
    if call.as_text:
        return call.arguments == {key: as_text(value) for key, value in arguments.items()}
    return bool(call.arguments == json.loads(dumps(arguments)))
