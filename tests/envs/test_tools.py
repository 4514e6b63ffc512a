"""A typed, documented function becomes a schema, and its arguments are checked before it runs."""

from typing import Literal

import pytest
from pydantic import BaseModel

from opd.envs.tools import Tool, ToolError, marked_tools, tool
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


@pytest.mark.parametrize(
    ("result", "text"),
    [("é", "é"), (3, "3"), (True, "true"), ({"a": ["é", None]}, '{"a": ["é", null]}'), (None, "(no output)"), ("", "")],
)
def test_a_result_becomes_text(result, text):
    def give():
        """Give."""
        return result

    assert Tool(give)({}) == text


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
