"""`${env:NAME}` in a setting: the value of an environment variable, which is read late and never written.

The settings keep the text as it was written; `resolve` puts the value in its place where something is built of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from opd import secrets
from opd.errors import ConfigError

T = TypeVar("T")
Place = tuple[str | int, ...]
"""Where a value stands: names of sections, and positions in lists."""

WRITE_OUT = (
    "the value of a variable can stand where any text may. Write the value out, or give it on the command line, where "
    "the shell replaces it"
)
"""What messages say of a variable in a setting that is no free text."""

_REFERENCE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
_BEGUN = re.compile(r"\$\{\s*env\b", re.IGNORECASE)
_NAME = r"\$(?:\{[A-Za-z_]\w*\}|[A-Z_][A-Z0-9_]*)"
_SHELL = re.compile(rf"(?:^|(?<=[/:=,]))({_NAME})(?=/)|^(\$(?:\{{[A-Z_][A-Z0-9_]*\}}|[A-Z_][A-Z0-9_]*))$")
_ABSOLUTE = re.compile(r"/|~/?")


def names_in(text: str) -> list[str]:
    """Return the names of the variables that a text refers to, in its order."""
    return _REFERENCE.findall(text)


def texts(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Yield every text in plain data, with where it stands; the names of sections are not among them."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts(item, (*place, key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from texts(item, (*place, number))


def key_of(place: Place) -> str:
    """Write a place as a message names a setting: `env.kwargs.headers.0`."""
    return ".".join(map(str, place))


def problem_in(text: str) -> str | None:
    """Say what is wrong with the variables in a text, never with their values; None where nothing is.

    What is wrong: a variable is not set or empty, what begins as a reference is none, or a path begins with a variable
    as a shell writes it.
    """
    for name in names_in(text):
        if not os.environ.get(name):
            state = "is empty" if name in os.environ else "is not set"
            return f"the environment variable {name} {state}. Set it, here and on every machine of the run"
    if odd := _BEGUN.search(_REFERENCE.sub("", text)):
        return f"what begins with {odd[0]} is no variable: write ${{env:NAME}}, NAME being letters, digits and _ alone"
    found = None if re.search(r"\s", text) else _SHELL.search(text)
    if found:
        return of_shell(found[1] or found[2])
    return None


def of_shell(variable: str) -> str:
    """Say what to write in place of a variable as a shell has it, `$HOME` or `${HOME}`."""
    return (
        f"a file of settings does not know the variable {variable}; write ${{env:{variable.strip('${}')}}} or the name "
        "itself, or give it on the command line, where the shell replaces it"
    )


def replaced(value: T, change: Callable[[Place, str], str], place: Place = ()) -> T:
    """Return plain data with each text as `change` makes it of its place and itself."""
    made: Any = value
    if isinstance(value, str):
        made = change(place, value)
    elif isinstance(value, Mapping):
        made = {key: replaced(item, change, (*place, key)) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        made = [replaced(item, change, (*place, number)) for number, item in enumerate(value)]
    return made  # type: ignore[no-any-return]


def resolve(value: T, setting: str) -> T:
    """Return plain data with the values of variables in their places, and know these as secrets.

    `setting` is where the data stands, for messages. Raises ConfigError naming the setting and the variable for one
    that is not set.
    """

    def change(place: Place, text: str) -> str:
        if problem := problem_in(text):
            raise ConfigError(f"{key_of((setting, *place))}: {problem}")
        return with_values(text)

    return replaced(value, change)


def with_values(text: str, *, is_name: bool = False) -> str:
    """Return a text with the values of its variables, all of which are set, and know these as secrets.

    What stands in a name (`is_name`: of a folder, a model, a project) and what is an absolute path is known as one only
    where the variable's own name tells of a secret: such are shown to people.
    """
    for name in names_in(text):
        value = os.environ[name]
        if secrets.tells_of_secret(name) or not (is_name or (_ABSOLUTE.match(value) and os.path.exists(value))):
            secrets.know(value)
    return _REFERENCE.sub(lambda found: os.environ[found[1]], text)
