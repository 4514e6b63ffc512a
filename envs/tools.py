"""Typed, documented Python functions as tools: their JSON schemas, and calls with checked arguments.

transformers' `get_json_schema` makes such schemas too, but imports torch to do so and checks no arguments.
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.json_schema import GenerateJsonSchema

from opd.errors import ConfigError, EnvError

_MARK = "__opd_tool__"
F = TypeVar("F", bound=Callable[..., Any])


class ToolError(EnvError):
    """Raised by a tool to tell the model, in plain words, why the call cannot be answered."""


def tool(function: F) -> F:
    """Mark a method of a `ToolEnv` as a tool. Its name, annotations and docstring become the schema."""
    setattr(function, _MARK, True)
    return function


def marked_tools(obj: object) -> list[Callable[..., Any]]:
    """The bound methods marked with `@tool`, in the order in which they are defined, base classes first."""
    names: dict[str, None] = {}
    for cls in reversed(type(obj).__mro__):
        names.update(dict.fromkeys(name for name, value in vars(cls).items() if hasattr(value, _MARK)))
    methods = [getattr(obj, name) for name in names]
    return [method for method in methods if hasattr(method, _MARK)]  # an override without the mark is no tool


class Tool:
    """One callable tool.

    The docstring's first paragraph describes the tool, lines `name: text` under `Args:` its arguments.
    Raises ConfigError when an argument has no annotation, there is no docstring, or it documents an
    argument that does not exist.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name: str = function.__name__
        # By the plain function: binding a method to each new environment must not build its model again.
        self._signature = _signature(getattr(function, "__func__", function))

    def schema(self) -> dict[str, Any]:
        """The JSON schema in OpenAI's form; a fresh copy at each call."""
        description, _, parameters = self._signature
        schema = {"name": self.name, "description": description, "parameters": json.loads(parameters)}
        return {"type": "function", "function": schema}

    def __call__(self, arguments: dict[str, Any]) -> str:
        """Check and coerce the arguments, call the function, and give its result as text.

        Raises ToolError when the arguments do not fit, and whatever the function raises.
        """
        return to_text(self.function(**self._checked(arguments)))

    def _checked(self, arguments: dict[str, Any]) -> dict[str, Any]:
        _, model, _ = self._signature
        try:
            checked = model.model_validate(arguments)
        except ValidationError as error:
            problems = "; ".join(_problem(detail["loc"], detail["msg"]) for detail in error.errors()[:3])
            raise ToolError(f"wrong arguments for {self.name}: {problems}") from None
        return {str(info.alias): getattr(checked, field) for field, info in model.model_fields.items()}


def to_text(result: object) -> str:
    """A tool's result as the model reads it: text as it is, anything else as JSON."""
    if result is None:
        return "(no output)"
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)


def _problem(location: tuple[int | str, ...], message: str) -> str:
    path = ".".join(str(part) for part in location)
    return f"{path}: {message[:1].lower()}{message[1:]}"


class _Untitled(GenerateJsonSchema):
    """JSON schemas without the titles that pydantic derives from names: a prompt need not say it twice."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@lru_cache(maxsize=1024)
def _signature(function: Callable[..., Any]) -> tuple[str, type[BaseModel], str]:
    """Description, model of the arguments, and its JSON schema as text, from a plain function."""
    name = getattr(function, "__qualname__", repr(function))
    description, documented = _read_docstring(inspect.getdoc(function) or "")
    if not description:
        raise ConfigError(f"tool {name} has no docstring; its first paragraph is what the model reads")
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.name not in hints or parameter.kind not in _NAMED:
            raise ConfigError(f"tool {name}: argument {parameter.name} must be a named one with a type annotation")
        default = ... if parameter.default is parameter.empty else parameter.default
        # A field may not be called `copy` or `schema`; an alias may.
        fields[f"field_{len(fields)}"] = (
            hints[parameter.name],
            Field(default, alias=parameter.name, description=documented.pop(parameter.name, None)),
        )
    if documented:
        raise ConfigError(f"tool {name}: the docstring describes {sorted(documented)}, which are no arguments")
    config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    model: type[BaseModel] = create_model(name, __config__=config, **fields)
    schema = model.model_json_schema(schema_generator=_Untitled)
    parameters = {"type": "object", "properties": {}} | schema
    del parameters["title"], parameters["additionalProperties"]
    return description, model, json.dumps(parameters)


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_ARGS = re.compile(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", re.MULTILINE)
_ARG = re.compile(r"^\s*(\w+)(?:\s*\([^)]*\))?:\s*(.*)$")


def _read_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """The first paragraph, and the arguments' descriptions (Google style; deeper lines continue one)."""
    description = " ".join(doc.split("\n\n")[0].split())
    found = _ARGS.search(doc)
    if found is None:
        return description, {}
    lines = [line for line in found.group(1).split("\n") if line.strip()]
    indent = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    arguments: dict[str, str] = {}
    for line in lines:
        entry = _ARG.match(line) if len(line) - len(line.lstrip()) == indent else None
        if entry:
            name = entry.group(1)
            arguments[name] = entry.group(2)
        elif arguments:
            arguments[name] += " " + line.strip()
    return description, arguments
