"""Mistral: `[TOOL_CALLS]` before a JSON list of calls (older), or before each `NAME{...}` (newer), and `[THINK]`."""

from __future__ import annotations

import re
from typing import Any

from opd.formats.bodies import JsonList, NamedJson
from opd.formats.form import THINK, Block, Format, dumps

OPEN = "[TOOL_CALLS]"
EXAMPLE = f"{OPEN}name{{...}}"
_HEAD = re.compile(
    r"\s*+(?P<name>[^\s\[\]{}]{1,256})\s*+(?:\[CALL_ID\](?P<id>[^\s\[\]{}]{0,256}+))?\s*+(?:\[ARGS\])?\s*+(?=\{)"
)


def _write(name: str, arguments: dict[str, Any]) -> str:
    return f"{OPEN}{name}{dumps(arguments)}"


FORMAT = Format(
    name="mistral",
    example=EXAMPLE,
    write=_write,
    blocks=(
        Block(opener=OPEN, body=JsonList(), example=EXAMPLE, starts=re.compile(r"\s*+\[")),
        Block(opener=OPEN, body=NamedJson(head=_HEAD), example=EXAMPLE),
    ),
    thought=(("[THINK]", "[/THINK]"), *THINK),
    inner=("[CALL_ID]", "[ARGS]"),
)
