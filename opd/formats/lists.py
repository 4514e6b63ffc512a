"""What families share that write their calls as a JSON list between markers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from opd.formats.bodies import JsonList, Keys
from opd.formats.form import Block, dumps

KEYS = Keys()


def list_block(
    opener: str,
    closer: str = "",
    *,
    keys: Keys = KEYS,
    starts: str | None = None,
    must_close: bool = True,
    auto: bool = True,
) -> Block:
    """The block of calls in a JSON list between two markers."""
    return Block(
        opener=opener,
        closer=closer,
        body=JsonList(keys=keys),
        example=f'{opener}[{{"{keys.name[0]}": "...", "{keys.arguments[0]}": {{...}}}}]{closer}',
        starts=re.compile(starts) if starts else None,
        must_close=must_close,
        auto=auto,
    )


def list_writer(block: Block, keys: Keys = KEYS) -> Callable[[str, dict[str, Any]], str]:
    """Return what writes a call as a list of one between the block's markers."""

    def write(name: str, arguments: dict[str, Any]) -> str:
        return f"{block.opener}{dumps([{keys.name[0]: name, keys.arguments[0]: arguments}])}{block.closer}"

    return write
