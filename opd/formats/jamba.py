"""Jamba and Hunyuan: a JSON list of calls between `<tool_calls>` and `</tool_calls>`."""

from __future__ import annotations

from opd.formats.form import Format
from opd.formats.lists import list_block, list_writer

_BLOCK = list_block("<tool_calls>", "</tool_calls>", starts=r"\s*+\[")

FORMAT = Format(name="jamba", example=_BLOCK.example, write=list_writer(_BLOCK), blocks=(_BLOCK,))
