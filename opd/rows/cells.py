"""The types that a person may give columns: `columns: {age: int}`. Without one a cell of CSV is the text that it is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from opd.errors import ConfigError, DataError
from opd.json_text import parse_json

_WHOLE = re.compile(r"[+-]?[0-9]{1,300}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def converted(value: Any, type_: str) -> Any:
    """Return a value as one of its column's type; an empty cell, but of text, as None. Raises ValueError else."""
    if value is None or (type_ != "str" and isinstance(value, str) and not value.strip()):
        return None
    try:
        return TYPES[type_](value)
    except ValueError as error:
        reason = f" ({error})" if type_ == "json" else ""
        raise ValueError(f"{value!r:.80} is no {type_}{reason}") from None


def check_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    """Return the types of columns. Raises ConfigError for a type that does not exist."""
    if columns is None:
        return {}
    if not isinstance(columns, Mapping):
        raise ConfigError(f"columns = {columns!r:.80} must be names with their types, such as {{age: int}}")
    for name, type_ in columns.items():
        if not isinstance(type_, str) or type_ not in TYPES:
            near = get_close_matches(str(type_), TYPES, n=1)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise ConfigError(f"columns.{name} = {type_!r:.80} is no type. Allowed: {', '.join(TYPES)}.{hint}")
    return dict(columns)


def convert_columns(
    rows: Sequence[dict[str, Any]],
    types: Mapping[str, str],
    *,
    columns: Sequence[str],
    path: str,
    where: Callable[[int], str],
) -> None:
    """Give columns their types, in place.

    Raises ConfigError for one that is not there; DataError, with the row as `where` tells it, for another value.
    """
    for name, type_ in types.items():
        if name not in columns:
            raise ConfigError(f"columns.{name}: {path} has no such column. Its columns: {', '.join(columns):.500}")
        for number, row in enumerate(rows):
            if name in row:
                try:
                    row[name] = converted(row[name], type_)
                except ValueError as error:
                    raise DataError(f"{where(number)}, {name}: {error}. Mend it, or change columns.{name}") from None


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _int(value: Any) -> int:
    if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
        return int(value)
    if type(value) is not int:
        raise ValueError
    return value


def _float(value: Any) -> float:
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _bool(value: Any) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if type(value) is not bool:
        raise ValueError
    return value


def _json(value: Any) -> Any:
    return parse_json(value) if isinstance(value, str) else value


TYPES: dict[str, Callable[[Any], Any]] = {"str": _str, "int": _int, "float": _float, "bool": _bool, "json": _json}
"""What each type makes of a value; ValueError for what is none."""
