"""The typed settings that every run shares. No torch here: a bad file must fail before anything heavy.

Each field's description is what `opd config --explain KEY` prints. A method's own settings stand in its
file under `trainers/`; `opd.launch.settings.config` joins the two and reads YAML.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from opd.secrets import redact
from opd.variables import of_shell

_LONGEST_PART, _LONGEST_PATH = 255, 4000
"""Bytes of a file's name, and of a path."""


def _plain_path(text: str) -> str:
    """Return a path or name as it is. Raises ValueError for what no file's name can hold, or a shell would replace."""
    if control := next((c for c in text if ord(c) < 32 or c == "\x7f"), None):
        raise ValueError(f"it holds the control character {control!r}; write the name without it")
    if variable := re.search(r"\$\{\w+\}|\$[A-Za-z_]\w*", text):
        raise ValueError(of_shell(variable[0]))
    if not text.strip():
        raise ValueError("it is empty; write a name")
    if not_text := next((c for c in text if "\ud800" <= c <= "\udfff"), None):
        raise ValueError(f"it holds {not_text!a}, half of a character; write the name without it")
    longest = max(map(len, map(str.encode, text.split("/"))))
    if longest > _LONGEST_PART or len(text.encode()) > _LONGEST_PATH:
        raise ValueError(f"it has {len(text):,} characters, more than a name of a file can have ({_LONGEST_PART})")
    if text.startswith("~") and os.path.expanduser(text) == text:
        raise ValueError(f"there is no home of {text.partition('/')[0]}; write the whole path")
    return text


PathText = Annotated[str, AfterValidator(_plain_path)]
"""The name of a file, a folder or a model."""


@dataclass(frozen=True, slots=True)
class OneOf:
    """Said of a text in an annotation: which names it may be, read off a table that others may add to.

    It only informs `opd config --explain`; whoever takes the name refuses those that are not known.
    """

    names: Callable[[], Mapping[str, str]]
    """Each name, and what it is."""
    other: str
    """What else may stand there."""


When = Mapping[str, Sequence[Any] | Literal[True]]


"""Other settings of the same section, and the values that they must have; True: any but null, 0 and nothing."""


@dataclass(frozen=True, slots=True)
class Condition:
    """When a setting is used; at other times it must be left at its default."""

    when: When
    needed: str = ""
    """Not empty: the setting must then be given. What to say of it, such as a published value."""

    def unmet(self, section: BaseModel) -> str | None:
        """The first of the other settings that has another value, or None."""
        return next((name for name, values in self.when.items() if not _meets(getattr(section, name), values)), None)

    def __str__(self) -> str:
        return " and ".join(_spelled(name, values) for name, values in self.when.items())


def setting(default: Any, *, when: When, needed: str = "", **field: Any) -> Any:
    """A field of a section that is used under a condition alone (`Condition`); all else is as for pydantic's `Field`.

    `Strict` refuses another value than the default where the condition does not hold. A subclass that gives the field
    another default or description leaves the condition as it is.
    """
    return Field(default, json_schema_extra={"condition": Condition(when, needed)}, **field)  # type: ignore[dict-item]


def condition_of(section: type[BaseModel], name: str) -> Condition | None:
    """What a section, or the nearest class that it is made from, says of when a field is used."""
    for cls in section.__mro__:
        field = cls.model_fields.get(name) if issubclass(cls, BaseModel) else None
        extra: Any = field.json_schema_extra if field is not None else None
        found = extra.get("condition") if isinstance(extra, dict) else None
        if isinstance(found, Condition):
            return found
    return None


def _meets(value: Any, values: Sequence[Any] | Literal[True]) -> bool:
    return bool(value) if values is True else value in values


def _spelled(name: str, values: Sequence[Any] | Literal[True]) -> str:
    return name if values is True else f"{name} = {' or '.join(spelled(value) for value in values)}"


def spelled(value: Any) -> str:
    """A plain value as a file has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class Strict(BaseModel):
    """A section of the settings: unknown keys and those without effect are errors; values are frozen once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __repr__(self) -> str:
        return redact(super().__repr__())

    __str__ = __repr__

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Refuse a condition on a setting that the section does not have. Raises TypeError."""
        for name in cls.model_fields:
            condition = condition_of(cls, name)
            if condition and (unknown := [other for other in condition.when if other not in cls.model_fields]):
                raise TypeError(f"{cls.__name__}.{name} has a condition on {unknown[0]}, which is no setting there")

    @model_validator(mode="after")
    def _conditions_hold(self) -> Self:
        """Raises ValidationError, at the fields themselves, for what is unused or missing (`setting`)."""
        if problems := list(self._unmet()):
            raise ValidationError.from_exception_data(type(self).__name__, problems)
        return self

    def _unmet(self) -> Iterator[InitErrorDetails]:
        for name, field in type(self).model_fields.items():
            condition = condition_of(type(self), name)
            if condition is None:
                continue
            value, other = getattr(self, name), condition.unmet(self)
            if other is None and condition.needed and not _meets(value, True):
                has = " and ".join(f"{other} = {spelled(getattr(self, other))}" for other in condition.when)
                text = f"is missing: {has} needs it ({condition.needed})"
            elif other is None or value == field.get_default(call_default_factory=True, validated_data={}):
                continue
            elif (values := condition.when[other]) is True:
                text = f"is used with {other} alone; set {other}, or remove it"
            else:
                is_now = f"{other} = {spelled(getattr(self, other))}"
                text = f"is used by {_spelled(other, values)} alone, but {is_now}; remove it"
            yield InitErrorDetails(
                type=PydanticCustomError(
                    "condition", "{text}", {"text": text, "other": other or next(iter(condition.when))}
                ),
                loc=(name,),
                input=value,
            )


def _address(url: str) -> str:
    """An address of a server and nothing else. Raises ValueError for what cannot be asked."""
    wanted = "a server's address is like http://127.0.0.1:8000, with nothing behind the port"
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:  # of the port, or of the brackets of an IPv6 address
        raise ValueError(f"{url!r}: {error}; {wanted}") from None
    if not named or url.rstrip("/") != f"{parts.scheme}://{parts.netloc}" or "@" in url or not url.isprintable():
        raise ValueError(f"{url!r}: {wanted}")
    return url


ServerAddress = Annotated[str, AfterValidator(_address)]
