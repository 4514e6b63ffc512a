"""Granite 3: a JSON list of calls after `<|tool_call|>` (3.0) or `<tool_call>` (3.1), which nothing closes.

Granite 4 writes Hermes' form.
"""

from __future__ import annotations

from opd.formats.form import Format
from opd.formats.lists import list_block, list_writer

_BLOCK = list_block("<|tool_call|>", auto=False)

FORMAT = Format(
    name="granite",
    example=_BLOCK.example,
    write=list_writer(_BLOCK),
    blocks=(_BLOCK, list_block("<tool_call>", auto=False)),
)
