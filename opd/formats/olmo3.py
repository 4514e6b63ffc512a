"""OLMo 3: `<function_calls>name(key="value")</function_calls>`, a line for each call."""

from __future__ import annotations

from typing import Any

from opd.formats.bodies import PythonCalls
from opd.formats.form import Block, Format
from opd.formats.pythonic import write_python

OPEN, CLOSE = "<function_calls>", "</function_calls>"
EXAMPLE = f'{OPEN}name(key="value"){CLOSE}'


def _write(name: str, arguments: dict[str, Any]) -> str:
    return f"{OPEN}{write_python(name, arguments)}{CLOSE}"


FORMAT = Format(
    name="olmo3",
    example=EXAMPLE,
    write=_write,
    blocks=(Block(opener=OPEN, closer=CLOSE, body=PythonCalls(bracketed=False), example=EXAMPLE),),
)
