"""Phi-4-mini: a JSON list of calls between `<|tool_call|>` and `<|/tool_call|>`, or after `functools`."""

from __future__ import annotations

from opd.formats.form import Format
from opd.formats.lists import list_block, list_writer

_BLOCK = list_block("<|tool_call|>", "<|/tool_call|>", must_close=False)

FORMAT = Format(
    name="phi",
    example=_BLOCK.example,
    write=list_writer(_BLOCK),
    blocks=(_BLOCK, list_block("functools", starts=r"\s*+\[\s*+\{")),
)
