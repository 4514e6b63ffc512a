"""LFM2: `<|tool_call_start|>[name(key="value")]<|tool_call_end|>`."""

from __future__ import annotations

from typing import Any

from opd.formats.bodies import PythonCalls
from opd.formats.form import Block, Format
from opd.formats.pythonic import write_python

OPEN, CLOSE = "<|tool_call_start|>", "<|tool_call_end|>"
EXAMPLE = f'{OPEN}[name(key="value")]{CLOSE}'


def _write(name: str, arguments: dict[str, Any]) -> str:
    return f"{OPEN}[{write_python(name, arguments)}]{CLOSE}"


FORMAT = Format(
    name="lfm2",
    example=EXAMPLE,
    write=_write,
    blocks=(Block(opener=OPEN, closer=CLOSE, body=PythonCalls(), example=EXAMPLE),),
)
