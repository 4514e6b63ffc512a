"""Settings on the command line: `--key.sub value` or `--key.sub=value`, for any key of the file.

Values are read as YAML, as if they stood in the file: `--train.lr 1e-4`, `--env.kwargs.hops "[1, 2]"`,
`--model.lora null`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from opd.backends import deepspeed_json
from opd.errors import ConfigError
from opd.launch.settings.config import without_other_methods
from opd.launch.settings.problems import did_you_mean, nearest_key, short, show
from opd.launch.settings.reader import parse_yaml
from opd.launch.settings.schema import Setting
from opd.secrets import know_settings
from opd.variables import resolve

FILES = {"deepspeed": deepspeed_json.read}
"""Sections that may be written as the name of a file, and what reads it."""

SHORTHAND = {"model": "name", "env": "id", "METHOD.divergence": "kind"}
"""Sections that may be written as one word, and the setting which that word is."""
REPLACED = "METHOD.divergence"
"""The one of them of which the word is all: what else the section holds, such as another kind's beta, goes with it."""


def split(
    arguments: Sequence[str], *, options: Collection[str], settings: Mapping[str, Setting]
) -> tuple[list[str], dict[str, Any]]:
    """Take the settings out of a command line: (what is left for the command's own options, values by key).

    Raises ConfigError for a key that does not exist, a key without a value, and a key given twice.
    """
    left: list[str] = []
    values: dict[str, Any] = {}
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        name, equals, text = word.partition("=")
        if not word.startswith("--") or word == "--" or name in options:
            left.append(word)
            continue
        key = name.removeprefix("--")
        _check_key(key, options=options, settings=settings)
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise ConfigError(f"command line: --{key} needs a value: {allowed_text(key, settings)}")
            text = waiting.pop(0)
        put(values, key, parse_yaml(text, f"command line: --{key}") if text else "")
    return left, values


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Add one setting. Raises ConfigError when the key was given before."""
    if key in values:
        know_settings({key.rpartition(".")[2]: [values[key], value]})
        raise ConfigError(f"command line: {key} is given twice: {show(values[key])} and {show(value)}. Give one.")
    values[key] = value


def allowed_text(key: str, settings: Mapping[str, Setting]) -> str:
    """Say what a key allows; a key of the user's choice allows any value."""
    return settings[key].allowed if key in settings else "any value"


def merge(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file with those of the command line laid over them; neither is changed.

    `model` and `env` stay what they are short for: over `model: {name: a, lora: {r: 4}}`, `--model b` keeps
    the adapters, and over `model: a`, `--model.lora.r 8` keeps the name. A divergence's kind takes the place of the
    whole section; what else of it the command line gives, before it or after it, is laid over that.
    """
    merged = copy.deepcopy(dict(data))
    kinds_first = sorted(overrides.items(), key=lambda override: _general(override[0]) != REPLACED)
    for key, value in kinds_first:
        if (word := _shorthand(key)) and not isinstance(value, dict):
            if _general(key) == REPLACED and isinstance(value, str):
                value = {word: value}
            else:
                key = f"{key}.{word}"
        *sections, name = key.split(".")
        place = merged
        for n, section in enumerate(sections):
            place = _enter(place, section, ".".join(sections[: n + 1]))
        place[name] = copy.deepcopy(value)
    return merged


def _shorthand(key: str) -> str | None:
    """The setting that a section's one word is, if it may be written as one."""
    return SHORTHAND.get(_general(key))


def _general(key: str) -> str:
    """A key as `SHORTHAND` has it."""
    _, *rest = key.split(".")
    return "METHOD.divergence" if rest == ["divergence"] else key


def _enter(place: dict[str, Any], section: str, key: str) -> dict[str, Any]:
    """The settings of a section within `place`, made where there are none; `key` is the section's whole key."""
    held = place.get(section)
    if isinstance(held, str) and section in FILES:
        try:
            held = place[section] = FILES[section](resolve(held, section))
        except ValueError as error:
            raise ConfigError(f"{section}: {error}") from error
    if isinstance(held, dict):
        return held
    word = _shorthand(key)
    place[section] = {word: held} if word and isinstance(held, str) else {}
    entered: dict[str, Any] = place[section]
    return entered


def _check_key(key: str, *, options: Collection[str], settings: Mapping[str, Setting]) -> None:
    parts = key.split(".")
    parents = (".".join(parts[:n]) for n in range(1, len(parts)))
    if key in settings or any(p in settings and settings[p].free for p in parents):
        return
    near = without_other_methods(settings, parts[0])
    found = nearest_key(key, [*near, *(option.removeprefix("--") for option in options)])
    raise ConfigError(
        f"command line: --{short(key)} is unknown.{did_you_mean(found and f'--{found}')}"
        " `opd config --explain KEY` tells what a key is for."
    )
