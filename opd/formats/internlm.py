"""InternLM 2 and 3: one JSON call between `<|action_start|><|plugin|>` and `<|action_end|>`."""

from __future__ import annotations

from typing import Any

from opd.formats.bodies import JsonObject, Keys
from opd.formats.form import Block, Format, dumps

OPEN, CLOSE = "<|action_start|><|plugin|>", "<|action_end|>"
EXAMPLE = f'{OPEN}{{"name": "...", "parameters": {{...}}}}{CLOSE}'


def _write(name: str, arguments: dict[str, Any]) -> str:
    return f"{OPEN}{dumps({'name': name, 'parameters': arguments})}{CLOSE}"


FORMAT = Format(
    name="internlm",
    example=EXAMPLE,
    write=_write,
    blocks=(Block(opener=OPEN, closer=CLOSE, body=JsonObject(keys=Keys()), example=EXAMPLE),),
)
