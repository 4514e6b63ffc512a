"""The format `json`: `{"name": ..., "arguments": {...}}` as the whole text, or a list of such; of any model."""

from __future__ import annotations

from typing import Any

from opd.formats.bare import bare_json
from opd.formats.form import Format, dumps

EXAMPLE = '{"name": "...", "arguments": {...}}'


def _write(name: str, arguments: dict[str, Any]) -> str:
    return dumps({"name": name, "arguments": arguments})


FORMAT = Format(name="json", example=EXAMPLE, write=_write, bares=(bare_json(EXAMPLE, auto=True),))
