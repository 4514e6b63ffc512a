"""MiniMax M2: `<minimax:tool_call>` around `<invoke name="...">` with a tag for each argument."""

from __future__ import annotations

import re
from typing import Any

from opd.formats.bodies import Tags
from opd.formats.form import Block, Format, as_text

FRAME = ("<minimax:tool_call>", "</minimax:tool_call>")
EXAMPLE = f'{FRAME[0]}<invoke name="name"><parameter name="key">value</parameter></invoke>{FRAME[1]}'


def _write(name: str, arguments: dict[str, Any]) -> str:
    given = "".join(f'<parameter name="{key}">{as_text(value)}</parameter>\n' for key, value in arguments.items())
    return f'{FRAME[0]}\n<invoke name="{name}">\n{given}</invoke>\n{FRAME[1]}'


FORMAT = Format(
    name="minimax",
    example=EXAMPLE,
    write=_write,
    blocks=(
        Block(
            opener="<invoke",
            closer="</invoke>",
            body=Tags(
                head=re.compile(r'\s+name="([^"<>]{1,256})"\s*+>'),
                argument=re.compile(r'\s*+<parameter\s+name="([^"<>]{1,256})"\s*+>'),
                value_end=re.compile(r"</parameter>(?=\s*+<(?:parameter\s|/invoke>))"),
                tail=re.compile(r""),
            ),
            example=EXAMPLE,
            framed=True,
        ),
    ),
    frame=(FRAME,),
    inner=("<parameter", "</parameter>"),
)
