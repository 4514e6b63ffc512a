"""Gemma 4: `<|tool_call>call:NAME{key:<|"|>text<|"|>,other:1}<tool_call|>`; FunctionGemma alike with `<escape>`."""

from __future__ import annotations

import re
from typing import Any

from opd.formats.bodies import Braced
from opd.formats.form import THINK, Block, Format, dumps
from opd.formats.values import Spelling

OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_KEY = re.compile(r'\s*+([^:,{}\[\]<>"\n]{1,256}):')


def braced_block(opener: str, closer: str, quote: str) -> Block:
    """The block of calls in this form, by its markers and what stands around a string."""
    mark = re.escape(quote)
    string = re.compile(rf"{mark}((?:(?!{mark}).)*+){mark}", re.DOTALL)
    return Block(
        opener=opener,
        closer=closer,
        body=Braced(spelling=Spelling(string=string, key=_KEY)),
        example=f"{opener}call:name{{key:{quote}value{quote}}}{closer}",
    )


def write_braced(block: Block, quote: str, name: str, arguments: dict[str, Any]) -> str:
    """Write a call in this form. Raises ValueError for nan and inf."""
    dumps(arguments)
    return f"{block.opener}call:{name}{_spell(arguments, quote)}{block.closer}"


def _spell(value: Any, quote: str) -> str:
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_spell(item, quote)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_spell(item, quote) for item in value) + "]"
    return dumps(value)


_BLOCK = braced_block(OPEN, CLOSE, QUOTE)


def _write(name: str, arguments: dict[str, Any]) -> str:
    return write_braced(_BLOCK, QUOTE, name, arguments)


FORMAT = Format(
    name="gemma",
    example=_BLOCK.example,
    write=_write,
    blocks=(_BLOCK,),
    thought=(("<|channel>thought", "<channel|>"), *THINK),
    inner=(QUOTE,),
)
