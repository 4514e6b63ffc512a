"""GLM 4.5 to 4.7: `<tool_call>NAME<arg_key>KEY</arg_key><arg_value>text</arg_value></tool_call>`.

GLM 4.5 writes line breaks between the tags, later ones none.
"""

from __future__ import annotations

import re
from typing import Any

from opd.formats.bodies import NAME, Tags
from opd.formats.form import Block, Format, as_text

OPEN, CLOSE = "<tool_call>", "</tool_call>"
EXAMPLE = f"{OPEN}name<arg_key>key</arg_key><arg_value>value</arg_value>{CLOSE}"
_BODY = Tags(
    head=re.compile(rf"\s*+({NAME})(?=\s*+<)"),
    argument=re.compile(r"\s*+<arg_key>([^<>]{1,256})</arg_key>\s*+<arg_value>"),
    value_end=re.compile(r"</arg_value>(?=\s*+<(?:arg_key>|/tool_call>))"),
    tail=re.compile(r""),
)


def _write(name: str, arguments: dict[str, Any]) -> str:
    given = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{as_text(value)}</arg_value>\n" for key, value in arguments.items()
    )
    return f"{OPEN}{name}\n{given}{CLOSE}"


FORMAT = Format(
    name="glm",
    example=EXAMPLE,
    write=_write,
    blocks=(
        # Hermes has the same markers: in a text of unknown format a key tells, or the name of a tool on offer.
        *(
            Block(opener=OPEN, closer=CLOSE, body=_BODY, example=EXAMPLE, starts=re.compile(starts))
            for starts in (rf"\s*+{NAME}\s*+<arg_key>", rf"\s*+(?P<offered>{NAME})\s*+{CLOSE}")
        ),
        Block(opener=OPEN, closer=CLOSE, body=_BODY, example=EXAMPLE, auto=False),
    ),
    inner=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
