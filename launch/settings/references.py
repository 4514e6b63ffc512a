"""The variables and the secrets in settings: what is read now, what later, and what may not stand where it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd import secrets, variables
from opd.launch.settings.overrides import SHORTHAND
from opd.launch.settings.problems import Problem, is_within, show
from opd.launch.settings.schema import Setting
from opd.variables import WRITE_OUT, Place, key_of

LATE = ("env.kwargs", "eval.env_kwargs")
"""Settings whose variables are read where an environment is made, in the process that holds it."""
_NAMES = ("out", "model", "model.name", "env", "env.id", "tracking.project", "tracking.name", "deepspeed")
_LAST_OF_NAMES = ("file", "data", "model", "sft_teacher")
"""Settings, and ends of their keys, that name what people see: a folder, a file, a model, a project."""


def look_at(data: Mapping[str, Any]) -> list[Problem]:
    """Know the secrets that settings have written out, before any message can show them; return what is wrong with
    variables and with secrets that were taken out."""
    secrets.know_environment()
    secrets.know_settings(data)
    problems = [
        Problem((_whole_key(place),), f"{_whole_key(place)}: {problem}")
        for place, text in variables.texts(data)
        if (problem := variables.problem_in(text) or _lost(place, text))
    ]
    return problems + [
        Problem((key,), f"{key}: a variable cannot give a setting its name; write the name out")
        for key in _keys(data)
        if variables.names_in(key)
    ]


def _whole_key(place: Place) -> str:
    """The key of a setting; of a section that is written as one word, that of the setting which this word is."""
    key = key_of(place)
    return f"{key}.{SHORTHAND[key]}" if key in SHORTHAND else key


def _lost(place: Place, text: str) -> str | None:
    last = next((part for part in reversed(place) if isinstance(part, str)), "")
    if text != secrets.MARK or not secrets.tells_of_secret(last):
        return None
    return f"{secrets.MARK} stands for a secret that was left out; write ${{env:NAME}} there and set the variable"


def _keys(data: Any, prefix: str = "") -> list[str]:
    if not isinstance(data, Mapping):
        return []
    return [key for name, value in data.items() for key in (f"{prefix}{name}", *_keys(value, f"{prefix}{name}."))]


def with_values(data: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the values of their variables, but for those that are read later. `look_at` comes first."""

    def change(place: Place, text: str) -> str:
        key = key_of(place)
        if any(is_within(key, late) for late in LATE):
            for name in variables.names_in(text):  # so that no message shows it meanwhile
                variables.with_values(f"${{env:{name}}}")
            return text
        return variables.with_values(text, is_name=key in _NAMES or key.rpartition(".")[2] in _LAST_OF_NAMES)

    return variables.replaced(data, change)


def written(data: Mapping[str, Any], settings: Mapping[str, Setting]) -> tuple[dict[Place, str], list[Problem]]:
    """Return the texts with variables by where they stand in a whole tree, and those that may not stand there.

    A text can be the value of a setting that takes any text. What a run is (its method, a choice, a number) is written
    down, so that nothing that its weights depend on changes unseen.
    """
    places, problems = {}, []
    for place, text in variables.texts(data):
        if not variables.names_in(text):
            continue
        key = key_of(place)
        setting = settings.get(key)
        if key == "method" or (setting is not None and setting.choices):
            problems.append(Problem((key,), f"{key} = {show(text)}: {WRITE_OUT}"))
        elif key != "deepspeed":  # whose file's content is what is written
            places[(*place, SHORTHAND[key]) if key in SHORTHAND else place] = text
    return places, problems
