"""Qwen3-Coder: `<tool_call><function=NAME><parameter=KEY>text</parameter></function></tool_call>`.

Of Qwen3-Coder, Qwen 3.5 and Nemotron 3. Hermes' JSON between the same markers is read too.
"""

from __future__ import annotations

import re
from typing import Any

from opd.formats.bodies import JsonObject, Tags
from opd.formats.form import Block, Format, as_text

OPEN, CLOSE = "<tool_call>", "</tool_call>"
EXAMPLE = f"{OPEN}<function=name><parameter=key>value</parameter></function>{CLOSE}"


def function_block(opener: str, closer: str, *, auto: bool) -> Block:
    """The block of calls in this form between two markers; it is chosen by how its body begins."""
    return Block(
        opener=opener,
        closer=closer,
        body=Tags(
            head=re.compile(r"\s*+<function=([^\s<>=]{1,256})\s*+>"),
            argument=re.compile(r"\s*+<parameter=([^\s<>=]{1,256})\s*+>"),
            value_end=re.compile(r"</parameter>(?=\s*+<(?:parameter=|/function>))"),
            tail=re.compile(r"\s*+</function>"),
            lines=True,
        ),
        example=f"{opener}<function=name><parameter=key>value</parameter></function>{closer}",
        starts=re.compile(r"\s*+<function="),
        auto=auto,
    )


def write_function(name: str, arguments: dict[str, Any], opener: str = OPEN, closer: str = CLOSE) -> str:
    """Write a call in this form between two markers."""
    parameters = "".join(f"<parameter={key}>\n{as_text(value)}\n</parameter>\n" for key, value in arguments.items())
    return f"{opener}\n<function={name}>\n{parameters}</function>\n{closer}"


FORMAT = Format(
    name="qwen_coder",
    example=EXAMPLE,
    write=write_function,
    blocks=(
        function_block(OPEN, CLOSE, auto=False),
        Block(opener=OPEN, closer=CLOSE, body=JsonObject(), example=EXAMPLE, auto=False),
    ),
    inner=("<function=", "<parameter=", "</parameter>", "</function>"),
)
