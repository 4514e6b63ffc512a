"""Tool calls are read from any text, and what cannot be read says why."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.envs.tool_calls import MalformedCall, ToolCall, parse_tool_calls

GOOD = '<tool_call>{"name": "get", "arguments": {"key": "a"}}</tool_call>'


def test_a_call_is_read_with_text_around_it():
    assert parse_tool_calls(f"I think so.\n{GOOD} done") == [ToolCall(name="get", arguments={"key": "a"})]


def test_several_calls_are_read_in_order():
    calls = parse_tool_calls(GOOD + GOOD.replace("get", "put") + "\n" + GOOD.replace("get", "del"))
    assert [call.name for call in calls] == ["get", "put", "del"]


def test_white_space_and_line_breaks_do_not_matter():
    text = '<tool_call>\n{\n "name": "get",\n "arguments": {}\n}\n</tool_call>'
    assert parse_tool_calls(text) == [ToolCall(name="get", arguments={})]


def test_a_json_object_alone_is_a_call():
    assert parse_tool_calls(' {"name": "get", "arguments": {"n": 1}}\n') == [ToolCall(name="get", arguments={"n": 1})]


def test_a_call_without_arguments_has_none():
    assert parse_tool_calls('{"name": "get"}') == [ToolCall(name="get", arguments={})]


@pytest.mark.parametrize("text", ["", "hello", "</tool_call>", "see: {}", '["name"]', "tool_call get", "<tool_calls>"])
def test_text_that_calls_nothing_gives_nothing(text):
    assert parse_tool_calls(text) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<tool_call>", "not closed"),
        (GOOD[:-1], "not closed"),
        ("<tool_call></tool_call>", "not valid JSON"),
        ("<tool_call>get(a)</tool_call>", "not valid JSON"),
        ('<tool_call>{"name": "get",}</tool_call>', "not valid JSON"),
        ("<tool_call>{'name': 'get'}</tool_call>", "not valid JSON"),
        (f"<tool_call>{{}} {GOOD[11:]}", "not valid JSON"),
        ('{"name": "get"', "not valid JSON"),
        ('{"name": "get"} trailing', "not valid JSON"),
        ('<tool_call>{"name": "get", "arguments": {"x": NaN}}</tool_call>', "NaN is not JSON"),
        (f'<tool_call>{{"name": "get", "arguments": {{"x": {"9" * 5000}}}}}</tool_call>', "not valid JSON"),
        ("<tool_call>[]</tool_call>", "must be a JSON object"),
        ("<tool_call>3</tool_call>", "must be a JSON object"),
        ("<tool_call>{}</tool_call>", 'has no "name"'),
        ('<tool_call>{"name": ""}</tool_call>', 'has no "name"'),
        ('<tool_call>{"name": ["get"]}</tool_call>', 'has no "name"'),
        ('<tool_call>{"name": "get", "arguments": []}</tool_call>', '"arguments" must be a JSON object'),
        ('<tool_call>{"name": "get", "arguments": "{}"}</tool_call>', '"arguments" must be a JSON object'),
        ('<tool_call>{"name": "get", "arguments": null}</tool_call>', '"arguments" must be a JSON object'),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_a_malformed_call_says_why(text, reason):
    [call] = parse_tool_calls(text)
    assert isinstance(call, MalformedCall)
    assert reason in call.error


def test_an_unclosed_call_does_not_swallow_the_next():
    first, second = parse_tool_calls(f'<tool_call>{{"name": "put" {GOOD}')
    assert isinstance(first, MalformedCall)
    assert second == ToolCall(name="get", arguments={"key": "a"})


def test_good_calls_around_a_bad_one_are_read():
    kinds = [type(call) for call in parse_tool_calls(f"{GOOD}<tool_call>oops</tool_call>{GOOD}")]
    assert kinds == [ToolCall, MalformedCall, ToolCall]


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.text(min_size=1), st.dictionaries(st.text(), _json, max_size=4))
def test_every_call_written_as_json_is_read_back(name, arguments):
    # ASCII escapes, so that a tag inside a string cannot be mistaken for the tag itself.
    body = json.dumps({"name": name, "arguments": arguments}).replace("<", "\\u003c")
    assert parse_tool_calls(f"<tool_call>{body}</tool_call>") == [ToolCall(name=name, arguments=arguments)]
