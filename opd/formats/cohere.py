"""Cohere's Command: a JSON list of calls between `<|START_ACTION|>` and `<|END_ACTION|>`, with keys of its own."""

from __future__ import annotations

from opd.formats.bodies import Keys
from opd.formats.form import THINK, Format
from opd.formats.lists import list_block, list_writer

_KEYS = Keys(name=("tool_name", "name"), arguments=("parameters", "arguments"), id="tool_call_id")
_BLOCK = list_block("<|START_ACTION|>", "<|END_ACTION|>", keys=_KEYS)

FORMAT = Format(
    name="cohere",
    example=_BLOCK.example,
    write=list_writer(_BLOCK, _KEYS),
    blocks=(_BLOCK,),
    thought=(("<|START_THINKING|>", "<|END_THINKING|>"), *THINK),
    wrappers=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
)
