"""Hermes: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number, with free text around them.

Of Hermes, Qwen 2.5, Qwen 3, SmolLM3, Granite 4 and ERNIE 4.5, and the plain format of templates that know no tools.
Qwen3-Coder's form between the same markers is read too.
"""

from __future__ import annotations

from typing import Any

from opd.formats.bodies import JsonObject
from opd.formats.form import Block, Format, dumps
from opd.formats.qwen_coder import function_block

OPEN, CLOSE = "<tool_call>", "</tool_call>"
EXAMPLE = f'{OPEN}{{"name": "...", "arguments": {{...}}}}{CLOSE}'


def _write(name: str, arguments: dict[str, Any]) -> str:
    return f"{OPEN}{dumps({'name': name, 'arguments': arguments})}{CLOSE}"


FORMAT = Format(
    name="hermes",
    example=EXAMPLE,
    write=_write,
    blocks=(
        function_block(OPEN, CLOSE, auto=True),
        Block(opener=OPEN, closer=CLOSE, body=JsonObject(), example=EXAMPLE),
    ),
)
