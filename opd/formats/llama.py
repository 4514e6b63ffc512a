"""Llama 3: `{"name": ..., "parameters": {...}}` as the whole text or after `<|python_tag|>`; several with `;`."""

from __future__ import annotations

from typing import Any

from opd.formats.bare import bare_json
from opd.formats.bodies import JsonObjects
from opd.formats.form import Block, Format, dumps

EXAMPLE = '{"name": "...", "parameters": {...}}'


def _write(name: str, arguments: dict[str, Any]) -> str:
    return dumps({"name": name, "parameters": arguments})


FORMAT = Format(
    name="llama",
    example=EXAMPLE,
    write=_write,
    blocks=(Block(opener="<|python_tag|>", body=JsonObjects(), example=EXAMPLE),),
    bares=(bare_json(EXAMPLE),),
)
