"""DeepSeek V3, R1 and V3.1: calls between `<｜tool▁calls▁begin｜>` and its end, each a name and JSON.

V3 and R1 write `function<｜tool▁sep｜>NAME` and the JSON as a block of code, V3.1 `NAME<｜tool▁sep｜>{...}`.
"""

from __future__ import annotations

import re
from typing import Any

from opd.formats.bodies import NamedJson
from opd.formats.form import Block, Format, dumps

FRAME = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
OPEN, SEPARATOR, CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
EXAMPLE = f"{FRAME[0]}{OPEN}name{SEPARATOR}{{...}}{CLOSE}{FRAME[1]}"
_NAME = r"(?P<name>[^\s<>{}｜`]{1,256})"
_CODE = rf"\s*+function{SEPARATOR}{_NAME}\s*+```(?:json)?+\s*+"


def _write(name: str, arguments: dict[str, Any]) -> str:
    return f"{FRAME[0]}{OPEN}{name}{SEPARATOR}{dumps(arguments)}{CLOSE}{FRAME[1]}"


FORMAT = Format(
    name="deepseek",
    example=EXAMPLE,
    write=_write,
    blocks=(
        Block(
            opener=OPEN,
            closer=CLOSE,
            body=NamedJson(head=re.compile(_CODE), tail=re.compile(r"\s*+```")),
            example=EXAMPLE,
            starts=re.compile(_CODE),
        ),
        Block(
            opener=OPEN,
            closer=CLOSE,
            body=NamedJson(head=re.compile(rf"\s*+{_NAME}{SEPARATOR}\s*+")),
            example=EXAMPLE,
        ),
    ),
    frame=(FRAME,),
    inner=(SEPARATOR,),
)
