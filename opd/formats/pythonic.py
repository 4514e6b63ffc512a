"""Calls as Python writes them: `[name(key="value")]` as the whole text, or between `<|python_start|>` and its end.

Of Llama 3.2 and Llama 4, and of models that are prompted so.
"""

from __future__ import annotations

from typing import Any

from opd.formats.bare import bare_python, offered_python
from opd.formats.bodies import PythonCalls
from opd.formats.form import Block, Format, dumps

EXAMPLE = '[name(key="value")]'


def write_python(name: str, arguments: dict[str, Any]) -> str:
    """Write a call without brackets around it. Raises ValueError for nan and inf."""
    dumps(arguments)
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def _write(name: str, arguments: dict[str, Any]) -> str:
    return f"[{write_python(name, arguments)}]"


FORMAT = Format(
    name="pythonic",
    example=EXAMPLE,
    write=_write,
    blocks=(
        Block(
            opener="<|python_start|>", closer="<|python_end|>", must_close=False, body=PythonCalls(), example=EXAMPLE
        ),
    ),
    bares=(bare_python(EXAMPLE), offered_python(EXAMPLE)),
)
