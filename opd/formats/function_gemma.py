"""FunctionGemma: `<start_function_call>call:NAME{key:<escape>text<escape>}<end_function_call>`."""

from __future__ import annotations

from typing import Any

from opd.formats.form import Format
from opd.formats.gemma import braced_block, write_braced

QUOTE = "<escape>"
_BLOCK = braced_block("<start_function_call>", "<end_function_call>", QUOTE)


def _write(name: str, arguments: dict[str, Any]) -> str:
    return write_braced(_BLOCK, QUOTE, name, arguments)


FORMAT = Format(name="function_gemma", example=_BLOCK.example, write=_write, blocks=(_BLOCK,), inner=(QUOTE,))
