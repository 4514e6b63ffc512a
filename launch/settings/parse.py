"""From plain data to typed sections, or to sentences about what is wrong with it.

pydantic decides what is valid; here its errors become the house's form. Which sections there are is up to
`opd.launch.settings.config`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from opd.launch.settings.problems import Problem, did_you_mean, nearest, nearest_key, short, show
from opd.launch.settings.schema import Setting
from opd.variables import WRITE_OUT, names_in

_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
"""What pydantic calls a key that a section does not have: of a model, and of a dataclass."""


def parse(
    data: Mapping[str, Any],
    types: Mapping[str, Any],
    settings: Mapping[str, Setting],
    written: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], list[Problem]]:
    """Parse each top-level setting by itself, so that one wrong section hides no problem of another.

    Args:
        types: what each top-level setting is; what `data` does not mention keeps its default.
        settings: every setting, by its dotted key.
        written: the data as messages show it, with the names of variables in place of their values.

    Returns the values that are valid, by top-level name, and what is wrong with the others.
    """
    values: dict[str, Any] = {}
    problems = [_missing(key, settings) for key in types if settings[key].required and data.get(key) is None]
    for name, value in data.items():
        if name not in types:
            problems.append(_unknown(name, settings))
        elif value is not None:  # a section with nothing in it is its defaults; so is a null
            try:
                values[name] = TypeAdapter(types[name]).validate_json(_as_json(value), strict=True)
            except TypeError as error:
                problems.append(Problem((name,), f"{name} holds what a file cannot: {error}. Use plain values."))
            except ValidationError as error:
                found = error.errors(include_url=False)
                problems += [_problem(name, one, written or data, settings) for one in found]
    return values, problems


def bad_value(setting: Setting, value: Any) -> Problem:
    """Say it like `opsd.teacher.weights = "emaa" is unknown. Allowed: live, frozen, ema, ... Did you mean "ema"?`"""
    what = "is unknown" if setting.choices and isinstance(value, str) else "is not allowed"
    likely = did_you_mean(nearest(value, setting.choices)) if isinstance(value, str) else ""
    if isinstance(value, str) and names_in(value):
        likely = f" {WRITE_OUT[0].upper()}{WRITE_OUT[1:]}."
    return Problem((setting.key,), f"{setting.key} = {show(value)} {what}. Allowed: {setting.allowed}.{likely}")


def _as_json(value: Any) -> str:
    """Write a value as JSON: there pydantic's strict mode means what YAML does, a list is a list and "3" is not 3.

    Raises TypeError for what neither could hold.
    """
    try:
        return json.dumps(value)
    except (ValueError, RecursionError) as error:  # a list that holds itself
        raise TypeError(str(error)) from None


def _problem(name: str, error: ErrorDetails, data: Mapping[str, Any], settings: Mapping[str, Setting]) -> Problem:
    key = _key_of(name, error, settings)
    if error["type"] in _UNKNOWN:
        return _unknown(key, settings)
    if error["type"] == "condition":  # of `opd.config.Strict`
        section = key.rpartition(".")[0]
        return Problem((key, f"{section}.{error['ctx']['other']}"), f"{key} {error['msg']}")
    if error["type"] == "missing" and key.endswith(f".{error['loc'][-1]}"):  # else a place in a list is
        return _missing(key, settings)
    if error["type"] == "value_error":
        text = _with_key(key, str(error["ctx"]["error"]))
        named = re.split("[ :]", text, maxsplit=1)[0]  # often a setting below the section that was checked
        return Problem((named if named in settings else key,), text)
    return (
        bad_value(settings[key], _value_at(key, data)) if key in settings else Problem((key,), f"{key}: {error['msg']}")
    )


def _key_of(name: str, error: ErrorDetails, settings: Mapping[str, Setting]) -> str:
    """Return the dotted key that pydantic means, without places in lists and alternatives of a type."""
    key = name
    for part in error["loc"]:
        deeper = f"{key}.{part}"
        if deeper in settings or error["type"] in _UNKNOWN:
            key = deeper
    return key


def _with_key(key: str, message: str) -> str:
    """Put the setting in front of a validator's message, unless the message begins with (the end of) its key."""
    parts = key.split(".")
    for start in range(len(parts)):
        if message.startswith(f"{'.'.join(parts[start:])}."):
            return ".".join([*parts[:start], message])
    return f"{key}: {message}"


def _unknown(key: str, settings: Mapping[str, Setting]) -> Problem:
    section = key.rpartition(".")[0]
    siblings = [k for k in settings if k.rpartition(".")[0] == section]
    likely = did_you_mean(nearest_key(key, settings))
    allowed = ", ".join(k.rpartition(".")[2] for k in siblings)
    return Problem((key,), f"{short(key)} is unknown.{likely} Allowed: {allowed}.")


def _missing(key: str, settings: Mapping[str, Setting]) -> Problem:
    setting = settings[key]
    return Problem((key,), f"{key} is missing. Allowed: {setting.allowed}. {setting.description}".rstrip())


def _value_at(key: str, data: Any) -> Any:
    for part in key.split("."):
        data = data.get(part) if isinstance(data, Mapping) else data
    return data
