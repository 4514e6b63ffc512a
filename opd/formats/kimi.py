"""Kimi K2: `<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>` in a section."""

from __future__ import annotations

import re
from typing import Any

from opd.formats.bodies import NamedJson
from opd.formats.form import Block, Format, dumps

FRAME = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
OPEN, SEPARATOR, CLOSE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
EXAMPLE = f"{FRAME[0]}{OPEN}functions.name:0{SEPARATOR}{{...}}{CLOSE}{FRAME[1]}"
_HEAD = re.compile(
    rf"\s*+(?P<id>(?:functions\.)?(?P<name>[^\s<>{{}}|]{{1,256}}?)(?::\d{{1,9}})?)\s*+{re.escape(SEPARATOR)}\s*+"
)


def _write(name: str, arguments: dict[str, Any]) -> str:
    return f"{FRAME[0]}{OPEN}functions.{name}:0{SEPARATOR}{dumps(arguments)}{CLOSE}{FRAME[1]}"


FORMAT = Format(
    name="kimi",
    example=EXAMPLE,
    write=_write,
    blocks=(Block(opener=OPEN, closer=CLOSE, body=NamedJson(head=_HEAD), example=EXAMPLE),),
    frame=(FRAME,),
    thought=(("<think>", "</think>"), ("◁think▷", "◁/think▷")),
    inner=(SEPARATOR,),
)
