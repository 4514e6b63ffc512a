"""Calls that are a whole text, without markers: what tells them from an answer that is JSON or has brackets."""

from __future__ import annotations

import re

from opd.formats.bodies import JsonList, JsonObjects, Keys, PythonCalls
from opd.formats.form import Bare, Begun
from opd.formats.source import Calls, Source
from opd.json_text import JsonError, read_json

_KEYS = Keys()
_JSON = re.compile(r"\s*+(?=\{|\[\s*+\{)")
_QUOTE = r"""["']?+"""
_JSON_CALL = re.compile(
    rf"\s*+(?:\[\s*+)?\{{\s*+(?:{_QUOTE}type{_QUOTE}\s*+:\s*+{_QUOTE}function{_QUOTE}\s*+,\s*+)?"
    rf"{_QUOTE}(?:name|function){_QUOTE}\s*+:\s*+{_QUOTE}(?P<name>[^\"',{{}}\[\]\n]{{1,256}}){_QUOTE}"
    rf"(?P<call>\s*+,\s*+{_QUOTE}(?:arguments|parameters){_QUOTE}\s*+:)?"
)
"""How an object that may be broken begins where it is meant as a call; `call` is None where only the name can tell."""
_PYTHON_CALL = re.compile(
    r"\s*+\[\s*+(?P<name>[A-Za-z_][\w.-]{0,255}+)\s*+\(\s*+(?P<call>\)|[^\W\d]\w{0,255}+\s*+=(?!=))?"
)


class _JsonCalls:
    """JSON objects with semicolons between them, or a list of such."""

    def read(self, source: Source, at: int, example: str) -> tuple[Calls, int]:
        body = JsonList() if source.holds("[", at) else JsonObjects()
        return body.read(source, at, example)


def look_for_json(text: str, at: int, names: frozenset[str]) -> tuple[Begun, int]:
    """Tell a call that is JSON from an answer that is."""
    start = _JSON.match(text, at)
    if start is None:
        return Begun.PROSE, at
    try:
        value, end = read_json(text, start.end())
    except JsonError:
        begun = _JSON_CALL.match(text, at)
        meant = begun is not None and (begun["call"] is not None or begun["name"] in names)
        return (Begun.CALL if meant else Begun.BROKEN), at
    values = value if isinstance(value, list) else [value]
    return (Begun.CALL if any(_KEYS.means_a_call(value, names) for value in values) else Begun.ANSWER), end


def look_for_python(text: str, at: int, names: frozenset[str]) -> tuple[Begun, int]:
    """Tell a list of calls from prose in brackets."""
    begun = _PYTHON_CALL.match(text, at)
    meant = begun is not None and (begun["call"] is not None or begun["name"] in names)
    return (Begun.CALL if meant else Begun.PROSE), at


def look_for_offered_python(text: str, at: int, names: frozenset[str]) -> tuple[Begun, int]:
    """Tell a list of calls of tools on offer from anything else."""
    begun = _PYTHON_CALL.match(text, at)
    return (Begun.CALL if begun is not None and begun["name"] in names else Begun.PROSE), at


def bare_json(example: str, *, auto: bool = False) -> Bare:
    """Calls in JSON as the whole text."""
    return Bare(body=_JsonCalls(), example=example, look=look_for_json, auto=auto)


def bare_python(example: str) -> Bare:
    """A list of calls as the whole text."""
    return Bare(body=PythonCalls(), example=example, look=look_for_python, auto=False)


def offered_python(example: str) -> Bare:
    """A list of calls of tools on offer as the whole text."""
    return Bare(body=PythonCalls(), example=example, look=look_for_offered_python)
