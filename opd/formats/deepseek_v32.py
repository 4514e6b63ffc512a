"""DeepSeek V3.2 and V4: `<｜DSML｜invoke name="...">` and a tag for each argument, which says if it is text."""

from __future__ import annotations

import re
from typing import Any

from opd.formats.bodies import Tags
from opd.formats.form import Block, Format, as_text

FRAMES = tuple((f"<｜DSML｜{name}>", f"</｜DSML｜{name}>") for name in ("function_calls", "tool_calls"))
OPEN, CLOSE = "<｜DSML｜invoke", "</｜DSML｜invoke>"
_ARGUMENT, _END = "<｜DSML｜parameter", "</｜DSML｜parameter>"
EXAMPLE = f'{FRAMES[0][0]}{OPEN} name="name">{_ARGUMENT} name="key" string="true">value{_END}{CLOSE}{FRAMES[0][1]}'


def _write(name: str, arguments: dict[str, Any]) -> str:
    given = "".join(
        f'{_ARGUMENT} name="{key}" string="{str(isinstance(value, str)).lower()}">{as_text(value)}{_END}\n'
        for key, value in arguments.items()
    )
    return f'{FRAMES[0][0]}\n{OPEN} name="{name}">\n{given}{CLOSE}\n{FRAMES[0][1]}'


FORMAT = Format(
    name="deepseek_v32",
    example=EXAMPLE,
    write=_write,
    blocks=(
        Block(
            opener=OPEN,
            closer=CLOSE,
            body=Tags(
                head=re.compile(r'\s+name="([^"<>]{1,256})"\s*+>'),
                argument=re.compile(rf'\s*+{_ARGUMENT}\s+name="([^"<>]{{1,256}})"\s+string="(true|false)"\s*+>'),
                value_end=re.compile(rf"{_END}(?=\s*+(?:{_ARGUMENT}\s|{CLOSE}))"),
                tail=re.compile(r""),
                typed=True,
            ),
            example=EXAMPLE,
        ),
    ),
    frame=FRAMES,
    inner=(_ARGUMENT, _END),
)
