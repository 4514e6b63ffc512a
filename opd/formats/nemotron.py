"""Nemotron before 3 (Llama-Nemotron, Nemotron Nano 2): a JSON list of calls between `<TOOLCALL>` and its end."""

from __future__ import annotations

from opd.formats.form import Format
from opd.formats.lists import list_block, list_writer

_BLOCK = list_block("<TOOLCALL>", "</TOOLCALL>")

FORMAT = Format(name="nemotron", example=_BLOCK.example, write=list_writer(_BLOCK), blocks=(_BLOCK,))
