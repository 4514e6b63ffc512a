"""A typed, documented function becomes a schema, and its arguments are checked before it runs."""

import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import numpy as np
import pytest
import torch
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from opd.envs.tools import Tool, ToolError, marked_tools, to_text, tool
from opd.errors import ConfigError


def book(city: str, nights: int = 1, tags: list[str] | None = None, *, kind: Literal["room", "suite"] = "room") -> str:
    """Book a place
    to stay.

    More that the model need not read.

    Args:
        city: where to stay,
            in English, or
            code: three letters.
        nights (int): how long.

    Returns:
        str: what was booked.
    """
    return f"{city!r} {nights!r} {tags!r} {kind!r}"


def test_the_schema_comes_from_signature_and_docstring():
    assert Tool(book).schema() == {
        "type": "function",
        "function": {
            "name": "book",
            "description": "Book a place to stay.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "where to stay, in English, or code: three letters."},
                    "nights": {"type": "integer", "description": "how long.", "default": 1},
                    "tags": {
                        "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
                        "default": None,
                    },
                    "kind": {"type": "string", "enum": ["room", "suite"], "default": "room"},
                },
                "required": ["city"],
            },
        },
    }


def test_the_schema_agrees_with_transformers():
    from transformers.utils import get_json_schema

    def search(query: str, limit: int, exact: bool):
        """Search the index.

        Args:
            query: what to look for.
            limit: how many results.
            exact: whether words must match.
        """

    assert Tool(search).schema() == get_json_schema(search)


def test_a_changed_schema_does_not_change_the_next():
    made = Tool(book)
    made.schema()["function"]["parameters"]["properties"].clear()
    assert made.schema()["function"]["parameters"]["properties"]


def test_a_tool_without_arguments_has_an_empty_schema():
    def now() -> str:
        """Tell the time."""
        return "noon"

    made = Tool(now)
    assert made.schema()["function"]["parameters"] == {"type": "object", "properties": {}}
    assert made({}) == "noon"


def test_arguments_are_coerced_to_their_types_and_defaults_apply():
    assert Tool(book)({"city": 5, "nights": "3"}) == "'5' 3 None 'room'"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "city: field required"),
        ({"city": "Rome", "night": 2}, "night: extra inputs are not permitted"),
        ({"city": "Rome", "nights": "two"}, "nights: input should be a valid integer"),
        ({"city": None}, "city: input should be a valid string"),
        ({"city": "Rome", "kind": "tent"}, "kind: input should be 'room' or 'suite'"),
        ({"city": "Rome", "tags": ["a", {}]}, "tags.1: input should be a valid string"),
        ({"city": "Rome", "field_1": 2}, "field_1: extra inputs are not permitted"),
    ],
)
def test_wrong_arguments_are_told_by_name(arguments, reason):
    with pytest.raises(ToolError, match=f"wrong arguments for book: {reason}"):
        Tool(book)(arguments)


def test_arguments_may_have_names_that_pydantic_uses_itself():
    def dump(schema: str, copy: bool, model_config: int = 0) -> str:
        """Dump."""
        return f"{schema} {copy} {model_config}"

    assert Tool(dump)({"schema": "s", "copy": True, "model_config": 2}) == "s True 2"


def test_a_structured_argument_reaches_the_function_as_its_type():
    class Point(BaseModel):
        x: int
        y: int

    def move(to: Point) -> int:
        """Move."""
        return to.x + to.y

    assert Tool(move)({"to": {"x": 1, "y": "2"}}) == "3"


class Color(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Point:
    x: int
    title: str = "p"


class Area(TypedDict, total=False):
    """Where to look."""

    corners: list[Point]
    color: Color


class Plan(BaseModel):
    area: Area
    steps: Annotated[int, Field(ge=1, description="how many")] = 3


def survey(
    plan: Plan,
    color: Color = Color.RED,
    near: Optional[Point] = None,  # noqa: UP045  (as users write it)
    sizes: dict[str, float] | None = None,
    kinds: list[Literal["a", "b"]] = ["a"],  # noqa: B006
    note: int | str = 0,
    rest: Any = None,
) -> str:
    """Survey an area."""
    return repr((plan, color, near, sizes, kinds, note, rest))


def test_nested_types_stand_in_the_schema_as_they_are_without_references():
    point = {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "title": {"type": "string", "default": "p"}},
        "required": ["x"],
    }
    color = {"type": "string", "enum": ["red", "blue"]}
    area = {
        "type": "object",
        "description": "Where to look.",
        "properties": {"corners": {"type": "array", "items": point}, "color": color},
    }
    steps = {"type": "integer", "minimum": 1, "default": 3, "description": "how many"}
    assert Tool(survey).schema()["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "plan": {"type": "object", "properties": {"area": area, "steps": steps}, "required": ["area"]},
            "color": {**color, "default": "red"},
            "near": {"anyOf": [point, {"type": "null"}], "default": None},
            "sizes": {
                "anyOf": [{"type": "object", "additionalProperties": {"type": "number"}}, {"type": "null"}],
                "default": None,
            },
            "kinds": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}, "default": ["a"]},
            "note": {"anyOf": [{"type": "integer"}, {"type": "string"}], "default": 0},
            "rest": {"default": None},
        },
        "required": ["plan"],
    }


def test_nested_arguments_reach_the_function_as_their_types():
    arguments = {"plan": {"area": {"corners": [{"x": "1"}], "color": "blue"}}, "near": {"x": 2, "title": "q"}}
    plan = Plan(area={"corners": [Point(1)], "color": Color.BLUE})
    assert Tool(survey)(arguments) == repr((plan, Color.RED, Point(2, "q"), None, ["a"], 0, None))
    with pytest.raises(ToolError, match=r"wrong arguments for survey: plan\.area\.corners\.0\.x: input should be"):
        Tool(survey)({"plan": {"area": {"corners": [{"x": "one"}]}}})


def test_a_default_that_is_a_list_is_not_shared_between_calls():
    def collect(into: list[int] = []) -> list[int]:  # noqa: B006
        """Collect."""
        into.append(1)
        return into

    made = Tool(collect)
    assert (made({}), made({})) == ("[1]", "[1]")


class Node(BaseModel):
    children: list["Node"]


class Opaque:
    pass


class OldDict(typing.TypedDict):
    a: int


def tool_of(annotation, default=...):
    def made(x):
        """Do it."""

    made.__annotations__ = {"x": annotation}
    made.__defaults__ = None if default is ... else (default,)
    return made


def star(*args: int):
    """Do it."""


def slash(x: int, /):
    """Do it."""


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (tool_of(Node), "made: the type Node holds itself; a tool's schema cannot"),
        (tool_of(Opaque), r"made: no JSON schema can be made for \(x: .*Opaque\): Unable to generate"),
        (tool_of(Callable[[int], int]), r"made: no JSON schema can be made for \(x: .*Callable"),
        (tool_of(int, default=Opaque()), r"made: no JSON schema can be made for \(x: int\): Default value .*Opaque"),
        (tool_of("Nowhere"), "made: its annotations cannot be read: name 'Nowhere' is not defined"),
        (star, "star: argument args must be a named one"),
        (slash, "slash: argument x must be a named one"),
        (partial(survey, note=1), "a tool must be a function"),
        (lambda: 3, "<lambda> has no docstring"),
    ],
)
def test_what_has_no_schema_is_refused_by_name(function, reason):
    with pytest.raises(ConfigError, match=reason):
        Tool(function)


def test_a_typed_dict_of_the_standard_library_is_taken_or_the_mend_is_told():
    if sys.version_info >= (3, 12):  # below, pydantic needs the one of typing_extensions
        schema = Tool(tool_of(OldDict)).schema()["function"]["parameters"]["properties"]["x"]
        assert schema["properties"] == {"a": {"type": "integer"}}
    else:
        with pytest.raises(ConfigError, match=r"Please use `typing_extensions\.TypedDict`"):
            Tool(tool_of(OldDict))


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (str, "3", "3"),
        (str, "true", "true"),
        (str | None, "null", "null"),
        (Any, "[1]", "[1]"),
        (Literal["1", "2"], "1", "1"),
        (Color, "red", Color.RED),
        (int, "3", 3),
        (float, "-2.5", -2.5),
        (bool, "true", True),
        (bool, "True", True),
        (int | None, "None", None),
        (int | None, "null", None),
        (list[int], "[1, 2]", [1, 2]),
        (Literal[1, 2], "2", 2),
        (dict[str, int], '{"a": 1}', {"a": 1}),
        (Point, '{"x": 4}', Point(4)),
    ],
)
def test_arguments_that_come_as_text_are_read_by_their_type(annotation, text, value):
    assert Tool(tool_of(annotation)).checked({"x": text}, as_text=True) == {"x": value}


def test_a_text_that_its_type_does_not_take_is_told():
    with pytest.raises(ToolError, match="wrong arguments for made: x: input should be a valid integer"):
        Tool(tool_of(int)).checked({"x": "three"}, as_text=True)
    with pytest.raises(ToolError, match="wrong arguments for made: x: field required; y: extra inputs"):
        Tool(tool_of(int)).checked({"y": "3"}, as_text=True)


def endless():
    ring: list[object] = []
    ring.append(ring)
    return ring


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("é", "é"),
        ("", ""),
        (None, "(no output)"),
        (3, "3"),
        (True, "true"),
        (2.5, "2.5"),
        ({"a": ["é", None]}, '{"a": ["é", null]}'),
        ((1, "b"), '[1, "b"]'),
        (b"caf\xc3\xa9 \xff", "café \N{REPLACEMENT CHARACTER}"),
        ({"raw": b"a"}, '{"raw": "a"}'),
        (np.arange(3), "[0, 1, 2]"),
        (np.float32(0.5), "0.5"),
        ({"mean": np.int64(3)}, '{"mean": 3}'),
        (torch.tensor([[1.5]]), "[[1.5]]"),
        (Point(1), '{"x": 1, "title": "p"}'),
        ([Point(1)], '[{"x": 1, "title": "p"}]'),
        (Plan(area={"color": Color.BLUE}), '{"area": {"color": "blue"}, "steps": 3}'),
        (Color.RED, "red"),
        ({3, 1, 2}, "[1, 2, 3]"),
        (ValueError("no"), "ValueError: no"),
        (Path("a/b"), "a/b"),
        (Decimal("1.10"), "1.10"),
    ],
)
def test_a_result_becomes_text(result, text):
    assert to_text(result) == text


def test_a_result_that_holds_itself_is_an_error_and_no_hang():
    with pytest.raises(ValueError, match="Circular reference"):
        to_text(endless())


def test_static_and_class_methods_can_be_tools_in_either_order_of_the_marks():
    class Kit:
        base = 10

        @tool
        @staticmethod
        def first(x: int) -> int:
            """One."""
            return x

        @staticmethod
        @tool
        def second(x: int) -> int:
            """Two."""
            return x + 1

        @classmethod
        @tool
        def third(cls, x: int) -> int:
            """Three."""
            return x + cls.base

        @tool
        @classmethod
        def fourth(cls, x: int) -> int:
            """Four."""
            return x + cls.base + 1

    made = {method.__name__: Tool(method)({"x": 1}) for method in marked_tools(Kit())}
    assert made == {"first": "1", "second": "2", "third": "11", "fourth": "12"}


def test_the_first_argument_of_a_function_is_an_argument_whatever_its_name():
    def greet(self: str) -> str:
        """Greet."""
        return f"hello {self}"

    assert Tool(greet)({"self": "you"}) == "hello you"


def test_a_tool_without_a_docstring_is_refused():
    def silent(x: int) -> int:
        return x

    with pytest.raises(ConfigError, match="silent has no docstring"):
        Tool(silent)


def test_a_tool_with_an_untyped_argument_is_refused():
    def untyped(x):
        """Do it."""

    with pytest.raises(ConfigError, match="untyped: argument x must be a named one with a type annotation"):
        Tool(untyped)


def test_a_tool_with_open_arguments_is_refused():
    def open_ended(**rest: int):
        """Do it."""

    with pytest.raises(ConfigError, match="open_ended: argument rest must be a named one"):
        Tool(open_ended)


def test_a_docstring_about_an_argument_that_does_not_exist_is_refused():
    def renamed(city: str):
        """Do it.

        Args:
            town: where.
        """

    with pytest.raises(ConfigError, match=r"renamed: the docstring describes \['town'\], which are no arguments"):
        Tool(renamed)


class Base:
    @tool
    def second(self) -> None:
        """Second by name, first in order."""

    @tool
    def hidden(self) -> None:
        """Overridden without the mark."""


class Derived(Base):
    @tool
    def first(self) -> None:
        """First by name."""

    def hidden(self) -> None:
        """No tool any more."""

    def helper(self) -> None:
        """Never a tool."""


def test_marked_methods_are_found_in_the_order_of_their_definition():
    assert [method.__name__ for method in marked_tools(Derived())] == ["second", "first"]
