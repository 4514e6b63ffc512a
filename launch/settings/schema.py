"""Walks typed settings: which keys there are, what each allows, and what it is for.

The texts come from the pydantic fields themselves, so that `opd config --explain` and the error messages
cannot disagree with what is accepted.
"""

from __future__ import annotations

import dataclasses
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import annotated_types
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from opd.config import Condition, OneOf, condition_of
from opd.launch.settings.problems import show

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    types.NoneType: "null",
    Any: "any value",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of the settings, or a section of them (`section` is its class)."""

    key: str
    allowed: str
    description: str
    required: bool
    default: Any
    section: type[Any] | None
    """A pydantic model, or a dataclass."""
    free: bool
    """True: it holds keys of the user's choice, as `env.kwargs` does. False: its keys are known."""
    choices: tuple[str, ...]
    """The words that it allows, where it allows no others."""
    condition: Condition | None
    """When it is used, where that depends on other settings of its section."""

    def explanation(self) -> str:
        """Return key, default, what is allowed and what it is for, as `opd config --explain` prints it."""
        if self.section is not None:
            head = f"{self.key}: {'required' if self.required else 'may be left out'}"
        elif self.required:
            head = f"{self.key} (required)"
        else:
            head = f"{self.key} = {show(self.default)}"
        lines = [head, f"    allowed: {self.allowed}"]
        if self.condition is not None:
            also = ", and needed then" if self.condition.needed else ""
            lines.append(f"    used by: {self.condition} alone{also}")
        if self.description:
            lines.append(textwrap.fill(self.description, 100, initial_indent="    ", subsequent_indent="    "))
        return "\n".join(lines)


def walk(model: type[Any], prefix: str = "", made: Any = None) -> Iterator[Setting]:
    """Yield every setting of a model, sections before what they hold, in the order of the file.

    `made` is the section as it is where the file leaves it out: its values are the defaults, not those of its class.
    """
    for name, field in _fields(model).items():
        setting = describe(f"{prefix}{name}", field, _condition(model, name))
        if made is not None:
            setting = replace(setting, default=getattr(made, name), required=False)
        yield setting
        if setting.section is not None:
            inner = setting.default if isinstance(setting.default, setting.section) else None
            yield from walk(setting.section, f"{setting.key}.", inner)


def describe(key: str, field: FieldInfo, condition: Condition | None = None) -> Setting:
    """Make the setting that a pydantic field holds."""
    section = _section(field.annotation)
    required = field.is_required()
    return Setting(
        key=key,
        allowed=allowed(field.annotation, field.metadata),
        description=" ".join([field.description or _summary(section), *_names(field.metadata)]),
        required=required,
        default=None if required else field.get_default(call_default_factory=True, validated_data={}),
        section=section,
        free=any(get_origin(part) is dict for part in (field.annotation, *get_args(field.annotation))),
        choices=_choices(field.annotation),
        condition=condition,
    )


def _fields(section: type[Any]) -> dict[str, FieldInfo]:
    """Return the fields of a section by name."""
    if issubclass(section, BaseModel):
        return section.model_fields
    hints = get_type_hints(section, include_extras=True)
    fields = (field for field in dataclasses.fields(section) if field.init)
    return {
        f.name: FieldInfo.from_annotation(hints[f.name])
        if f.default is dataclasses.MISSING
        else FieldInfo.from_annotated_attribute(hints[f.name], f.default)
        for f in fields
    }


def _condition(section: type[Any], name: str) -> Condition | None:
    return condition_of(section, name) if issubclass(section, BaseModel) else None


def _names(metadata: list[Any]) -> list[str]:
    """Say what each name of a table means, a sentence a name."""
    return [f"{name}: {text}" for part in metadata if isinstance(part, OneOf) for name, text in part.names().items()]


def allowed(annotation: Any, metadata: list[Any] | None = None) -> str:
    """Say in words which values a type admits."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return allowed(arguments[0], list(arguments[1:]))
    if origin in (Union, types.UnionType):
        return " or ".join(allowed(a, metadata) if a is not types.NoneType else "null" for a in arguments)
    if origin is Literal:
        return ", ".join(str(a) for a in arguments)
    if origin is list:
        return f"a list of {_plural(arguments[0])}"
    if origin is tuple:
        return "a list of " + ", ".join(allowed(a) for a in arguments)
    if table := next((part for part in metadata or [] if isinstance(part, OneOf)), None):
        return ", ".join([*table.names(), f"or {table.other}"])
    short = "a name or " if any(isinstance(m, BeforeValidator) for m in metadata or []) else ""
    if origin is dict:
        return f"{short}a section with keys of your choice"
    if _is_section(annotation):
        return f"{short}a section with {', '.join(_fields(annotation))}"
    return _WORDS.get(annotation, str(annotation)) + _bounds(metadata or [])


def _plural(annotation: Any) -> str:
    return {str: "texts", int: "whole numbers", float: "numbers"}.get(annotation, allowed(annotation))


def _bounds(metadata: list[Any]) -> str:
    words = []
    for bound in metadata:
        if isinstance(bound, annotated_types.Ge):
            words.append(f"of at least {bound.ge}")
        elif isinstance(bound, annotated_types.Gt):
            words.append(f"above {bound.gt}")
        elif isinstance(bound, annotated_types.Le):
            words.append(f"at most {bound.le}")
        elif isinstance(bound, annotated_types.Lt):
            words.append(f"below {bound.lt}")
    return f" {' and '.join(words)}" if words else ""


def _section(annotation: Any) -> type[Any] | None:
    """Return the model or dataclass among the alternatives of a type; None if there is none."""
    return next((part for part in (annotation, *get_args(annotation)) if _is_section(part)), None)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation))


def _choices(annotation: Any) -> tuple[str, ...]:
    if get_origin(annotation) is Literal:
        return tuple(str(a) for a in get_args(annotation))
    return ()


def _summary(section: type[Any] | None) -> str:
    return (section.__doc__ or "").strip().split("\n")[0] if section else ""
