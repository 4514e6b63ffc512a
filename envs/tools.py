"""Turns typed, documented Python functions into tools: their JSON schemas, and calls with checked arguments.

transformers' `get_json_schema` makes such schemas too, and where it can, with the same result (a test compares
them). It knows no enums, typed dicts, dataclasses or pydantic models (they become `{"type": "object"}` without a
word about their fields), drops defaults, needs a description for every argument, imports torch, and checks no
arguments. Pydantic does all of this.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
import warnings
from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from pydantic.json_schema import GenerateJsonSchema, PydanticJsonSchemaWarning

from opd.envs.spaces import without_addresses
from opd.errors import ConfigError, EnvError

_MARK = "__opd_tool__"
F = TypeVar("F", bound=Callable[..., Any])


class ToolError(EnvError):
    """A tool raises this to tell the model, in plain words, why the call cannot be answered."""


def tool(function: F) -> F:
    """Mark a method of a `ToolEnv` as a tool. Its name, annotations and docstring become the schema."""
    setattr(_plain_function(function), _MARK, True)
    return function


def marked_tools(obj: object) -> list[Callable[..., Any]]:
    """Return the bound methods marked with `@tool`, in the order of their definition, base classes first."""
    names: dict[str, None] = {}
    for cls in reversed(type(obj).__mro__):
        marked = (name for name, value in vars(cls).items() if hasattr(_plain_function(value), _MARK))
        names.update(dict.fromkeys(marked))
    methods = [getattr(obj, name) for name in names]
    return [method for method in methods if hasattr(method, _MARK)]  # an override without the mark is no tool


def _plain_function(function: Any) -> Any:
    """Return the function that a bound, static or class method wraps."""
    return getattr(function, "__func__", function)


class Tool:
    """Holds one callable tool, sync or async.

    The docstring's first paragraph describes the tool, lines `name: text` under `Args:` its arguments. Arguments
    may be of any type that pydantic can check: numbers, `str`, `bool`, `Optional`, `Literal`, enums, `list[...]`,
    `dict[...]`, typed dicts, dataclasses, pydantic models. Raises ConfigError when an argument has no annotation or
    none that JSON can express, takes any number of values (`*args`), there is no docstring, or it documents an
    argument that does not exist.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        if not hasattr(function, "__name__"):
            raise ConfigError(f"a tool must be a function; {function!r:.80} has no name of its own")
        self.function = function
        self.name: str = function.__name__
        self.is_async = inspect.iscoroutinefunction(function)
        # By the plain function: binding a method to each new environment must not build its model again.
        self._signature = _read_signature(_plain_function(function), bound=inspect.ismethod(function))

    def schema(self) -> dict[str, Any]:
        """Build the JSON schema in OpenAI's form; a fresh copy at each call."""
        description, _, parameters = self._signature
        schema = {"name": self.name, "description": description, "parameters": json.loads(parameters)}
        return {"type": "function", "function": schema}

    def __call__(self, arguments: dict[str, Any]) -> str:
        """Check and coerce the arguments, call the function, and return its result as text; for a sync tool.

        Raises ToolError when the arguments do not fit, and whatever the function raises.
        """
        return to_text(self.function(**self.checked(arguments)))

    def typed(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return arguments that are text as the model wrote it, each read as its type in the schema says."""
        types = self.schema()["function"]["parameters"].get("properties", {})
        return {name: from_text(text, types.get(name, {})) for name, text in arguments.items()}

    def checked(self, arguments: dict[str, Any], *, as_text: bool = False) -> dict[str, Any]:
        """Return the arguments as the function takes them. Raises ToolError when they do not fit.

        With `as_text` each is text as the model wrote it, and its type in the schema says how to read that.
        """
        _, model, _ = self._signature
        if as_text:
            arguments = self.typed(arguments)
        try:
            checked = model.model_validate(arguments)
        except ValidationError as error:
            problems = "; ".join(_problem(detail["loc"], detail["msg"]) for detail in error.errors()[:3])
            raise ToolError(f"wrong arguments for {self.name}: {problems}") from None
        return {str(info.alias): getattr(checked, field) for field, info in model.model_fields.items()}


def to_text(result: object) -> str:
    """Write a tool's result as the model reads it: text as it is, `None` as "(no output)", data as JSON.

    Bytes are read as UTF-8, arrays become lists, dataclasses and models objects; what JSON has no form for, its `str`.
    """
    if result is None:
        return "(no output)"
    if not isinstance(result, str | int | float | list | tuple | dict):
        result = _to_json_value(result)
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=_to_json_value)


def _to_json_value(value: Any) -> Any:
    """Take a value one step closer to what JSON can hold."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode("utf-8", "replace")
    if isinstance(value, BaseModel):
        return value.model_dump()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        # Not in the order of hashes or of addresses, which differs from run to run.
        return sorted(value, key=lambda one: without_addresses(repr(one)))
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    to_list = getattr(value, "tolist", None)  # numpy's and torch's arrays and scalars
    return to_list() if callable(to_list) else str(value)


def from_text(text: Any, schema: dict[str, Any]) -> Any:
    """Read an argument of a format without types.

    Text stays text where the schema takes it; otherwise it is read as JSON. `True`, `False` and `None` are read too:
    that is how the templates of such models write them.
    """
    if not isinstance(text, str) or _takes_text(schema):
        return text
    if text in _PYTHON:
        return _PYTHON[text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # the check of the arguments says what is wrong with it


_PYTHON = {"True": True, "False": False, "None": None}


def _takes_text(schema: dict[str, Any]) -> bool:
    if any(isinstance(value, str) for value in (*schema.get("enum", ()), schema.get("const"))):
        return True
    if "anyOf" in schema:
        return any(map(_takes_text, schema["anyOf"]))
    return "enum" not in schema and "const" not in schema and schema.get("type", "string") == "string"


def _problem(location: tuple[int | str, ...], message: str) -> str:
    path = ".".join(str(part)[:80] for part in location)
    return f"{path}: {message[:1].lower()}{message[1:]}"


class _Untitled(GenerateJsonSchema):
    """Makes JSON schemas without the titles that pydantic derives from names: a prompt need not say a name twice."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@lru_cache(maxsize=1024)
def _read_signature(function: Callable[..., Any], *, bound: bool) -> tuple[str, type[BaseModel], str]:
    """Read the description, the model of the arguments, and its JSON schema as text, from a plain function."""
    name = getattr(function, "__qualname__", repr(function))
    description, documented = _read_docstring(inspect.getdoc(function) or "")
    if not description:
        raise ConfigError(f"tool {name} has no docstring; its first paragraph is what the model reads")
    hints = _hints(name, function)
    fields: dict[str, Any] = {}
    for parameter in [*inspect.signature(function).parameters.values()][bound:]:
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
    model, parameters = _make_model(name, fields)
    return description, model, json.dumps(parameters)


def _hints(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, SyntaxError) as error:
        raise ConfigError(f"tool {name}: its annotations cannot be read: {error}") from error


def _make_model(name: str, fields: dict[str, Any]) -> tuple[type[BaseModel], dict[str, Any]]:
    """Build the model that checks the arguments, and its JSON schema, which refers to nothing outside itself."""
    config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PydanticJsonSchemaWarning)  # a default that JSON cannot hold
            model: type[BaseModel] = create_model(name, __config__=config, **fields)
            schema = model.model_json_schema(schema_generator=_Untitled)
    except (PydanticUserError, PydanticSchemaGenerationError, PydanticJsonSchemaWarning) as error:
        types = ", ".join(f"{info.alias}: {inspect.formatannotation(hint)}" for hint, info in fields.values())
        raise ConfigError(
            f"tool {name}: no JSON schema can be made for ({types}): {str(error).splitlines()[0]}"
        ) from error
    definitions = schema.pop("$defs", {})
    return model, {"type": "object", "properties": {}} | _inline(name, schema, definitions, ())


def _inline(tool_name: str, part: Any, definitions: dict[str, Any], within: tuple[str, ...]) -> Any:
    """Replace the references in a schema by what they stand for, so that a model can read it as it is.

    Left out is what says nothing to them: titles, which repeat names, and that no other properties are allowed.
    """
    if isinstance(part, list):
        return [_inline(tool_name, one, definitions, within) for one in part]
    if not isinstance(part, dict):
        return part
    inlined: dict[str, Any] = {}
    for key, value in part.items():
        if key == "$ref":
            type_name = value.removeprefix("#/$defs/")
            if type_name in within:
                raise ConfigError(f"tool {tool_name}: the type {type_name} holds itself; a tool's schema cannot")
            inlined = _inline(tool_name, definitions[type_name], definitions, (*within, type_name)) | inlined
        elif key == "properties":  # names of the user's, not words of JSON schema
            inlined[key] = {name: _inline(tool_name, one, definitions, within) for name, one in value.items()}
        elif key in ("default", "enum", "const", "examples"):  # data
            inlined[key] = value
        elif key not in ("title", "discriminator") and (key, value) != ("additionalProperties", False):
            inlined[key] = _inline(tool_name, value, definitions, within)
    return inlined


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_ARGS = re.compile(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", re.MULTILINE)
_ARG = re.compile(r"^\s*(\w+)(?:\s*\([^)]*\))?:\s*(.*)$")


def _read_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """Return the first paragraph and the arguments' descriptions, in Google style.

    Deeper lines continue a description.
    """
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
