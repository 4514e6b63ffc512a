"""Seed-OSS: Qwen3-Coder's form between markers of its own."""

from __future__ import annotations

from typing import Any

from opd.formats.form import THINK, Format
from opd.formats.qwen_coder import function_block, write_function

OPEN, CLOSE = "<seed:tool_call>", "</seed:tool_call>"
_BLOCK = function_block(OPEN, CLOSE, auto=True)


def _write(name: str, arguments: dict[str, Any]) -> str:
    return write_function(name, arguments, OPEN, CLOSE)


FORMAT = Format(
    name="seed_oss",
    example=_BLOCK.example,
    write=_write,
    blocks=(_BLOCK,),
    thought=(("<seed:think>", "</seed:think>"), *THINK),
    inner=("<function=", "<parameter=", "</parameter>", "</function>"),
)
