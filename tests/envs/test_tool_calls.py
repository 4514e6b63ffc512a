"""Tool calls are read from any text in each format, and what cannot be read says why.

`tests/opd/test_formats.py` covers each family's own form, and what is left of a reply beside its calls.
"""

import math
import re
import time
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from opd.formats import FORMATS
from opd.tool_calls import (
    FORMS,
    TOOL_FORMATS,
    MalformedCall,
    ToolCall,
    format_call,
    parse_tool_calls,
    valid_tool_calls,
)

GOOD = '<tool_call>{"name": "get", "arguments": {"key": "a"}}</tool_call>'
GET = ToolCall(name="get", arguments={"key": "a"})
FUNCTION = "<tool_call>\n<function=get>\n<parameter=key>\na\n</parameter>\n</function>\n</tool_call>"


def malformed(text, tool_format="auto"):
    """Return the error of the only call in a text, which must be malformed."""
    [call] = parse_tool_calls(text, tool_format)
    assert isinstance(call, MalformedCall)
    return call.error


def test_a_call_is_read_with_text_around_it():
    assert parse_tool_calls(f"I think so.\n{GOOD} done") == [GET]


def test_several_calls_are_read_in_order():
    calls = parse_tool_calls(GOOD + GOOD.replace("get", "put") + "\n" + GOOD.replace("get", "del"))
    assert [call.name for call in calls] == ["get", "put", "del"]


@pytest.mark.parametrize(
    ("text", "tool_format"),
    [
        ('<tool_call>\n{\n "name": "get",\n "arguments": {"key": "a"}\n}\n</tool_call>', "hermes"),
        (GOOD.replace("arguments", "parameters"), "hermes"),
        (GOOD + "<|im_end|>", "hermes"),
        ('{"name": "get", "parameters": {"key": "a"}}', "llama"),
        ('{"type": "function", "name": "get", "parameters": {"key": "a"}}', "llama"),
        ('<|python_tag|>{"name": "get", "parameters": {"key": "a"}}', "llama"),
        ('<|python_tag|>{"name": "get", "parameters": {"key": "a"}}<|eom_id|>', "llama"),
        ('Let me look.<|python_tag|> {"name": "get", "parameters": {"key": "a"}}<|eot_id|>', "llama"),
        ('[TOOL_CALLS] [{"name": "get", "arguments": {"key": "a"}, "id": "a1b2c3d4e"}]</s>', "mistral"),
        ('[TOOL_CALLS]get{"key": "a"}', "mistral"),
        ('Let me look.[TOOL_CALLS] get {"key": "a"}\n', "mistral"),
        ('[TOOL_CALLS]get[ARGS]{"key": "a"}', "mistral"),
        ('[TOOL_CALLS]get[CALL_ID]a1b2c3d4e[ARGS]{"key": "a"}</s>', "mistral"),
        (' {"name": "get", "arguments": {"key": "a"}}\n', "json"),
        ('[{"name": "get", "arguments": {"key": "a"}}]', "json"),
    ],
)
def test_each_form_is_read_by_its_own_name_and_by_auto_and_by_no_other(text, tool_format):
    for name in (tool_format, "auto"):
        assert [replace(call, id=None) for call in parse_tool_calls(text, name)] == [GET]
    bare = text.lstrip().startswith(("{", "[{"))
    shared = {name for name, form in FORMATS.items() if any(opener in text for opener in form.openers)}
    for other in FORMATS.keys() - shared - {tool_format, *(("llama", "json") if bare else ())}:
        assert parse_tool_calls(text, other) == []


@pytest.mark.parametrize(
    "text",
    [
        f"{GOOD}\n{GOOD}",
        '<|python_tag|>{"name": "get", "parameters": {"key": "a"}}; {"name": "get", "arguments": {"key": "a"}}',
        '{"name": "get", "parameters": {"key": "a"}};{"name": "get", "parameters": {"key": "a"}}',
        '[TOOL_CALLS][{"name": "get", "arguments": {"key": "a"}}, {"name": "get", "arguments": {"key": "a"}}]',
        '[TOOL_CALLS]get{"key": "a"}[TOOL_CALLS]get{"key": "a"}',
        '[{"name": "get", "arguments": {"key": "a"}}, {"name": "get", "arguments": {"key": "a"}}]',
    ],
)
def test_each_form_holds_parallel_calls(text):
    assert parse_tool_calls(text) == [GET, GET]


def test_a_call_without_arguments_has_none():
    for text in ('{"name": "get"}', '<tool_call>{"name": "get"}</tool_call>', "[TOOL_CALLS]get{}"):
        assert parse_tool_calls(text, names=("get",)) == [ToolCall(name="get", arguments={})]


@pytest.mark.parametrize(
    "answer", ['{"answer": 42}', '{"name": "Alice", "age": 3}', '[{"a": 1}]', '{"name": "get"}', '{"name": "get"']
)
def test_a_final_answer_in_json_calls_nothing(answer):
    for tool_format in ("auto", "llama", "json"):
        assert parse_tool_calls(answer, tool_format, names=("put",)) == []


def test_a_call_after_an_answer_in_json_is_read():
    assert parse_tool_calls('{"text": "<tool_call>{}</tool_call>"} ' + GOOD) == [GET]


def test_arguments_may_be_a_string_that_holds_an_object_and_strings_may_hold_line_breaks():
    assert parse_tool_calls('{"name": "get", "arguments": "{\\"key\\": \\"a\\"}"}') == [GET]
    [call] = parse_tool_calls('<tool_call>{"name": "get", "arguments": {"key": "a\n\tb"}}</tool_call>')
    assert call.arguments == {"key": "a\n\tb"}


def test_the_values_of_qwen_coders_form_are_the_text_between_its_tags():
    text = FUNCTION.replace("\na\n", "\n  two\nlines </parameter> and </tool_call> \n")
    [call] = parse_tool_calls(text)
    assert call == ToolCall(name="get", arguments={"key": "  two\nlines </parameter> and </tool_call> "}, as_text=True)


def test_qwen_coders_form_may_stand_twice_and_have_several_or_no_parameters():
    two = FUNCTION.replace("</function>", "<parameter=b>1</parameter></function>")
    none = "<tool_call><function=now></function></tool_call>"
    assert [(call.name, call.arguments) for call in parse_tool_calls(f"So:\n{two}\n{none}")] == [
        ("get", {"key": "a", "b": "1"}),
        ("now", {}),
    ]


@pytest.mark.parametrize("text", ["", "hello", "</tool_call>", "see: {}", '["name"]', "tool_call get", "<tool_calls>"])
def test_text_that_calls_nothing_gives_nothing(text):
    for tool_format in TOOL_FORMATS:
        assert parse_tool_calls(text, tool_format) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<tool_call>", "not closed"),
        (GOOD[:-1], "not closed"),
        ("<tool_call></tool_call>", "not a JSON object"),
        ("<tool_call>get(a)</tool_call>", "not a JSON object"),
        ("<tool_call>[]</tool_call>", "not a JSON object"),
        ("<tool_call>3</tool_call>", "not a JSON object"),
        ('<tool_call>{"name": "get",}</tool_call>', "not valid JSON"),
        ('<tool_call>{"name": "get", "arguments": {"key": "a",}}</tool_call>', "not valid JSON"),
        ("<tool_call>{'name': 'get'}</tool_call>", "not valid JSON"),
        ('<tool_call>{name: "get"}</tool_call>', "not valid JSON"),
        ('<tool_call>{"name": "get"} // look</tool_call>', "there is more after the object"),
        (f"<tool_call>{{}} {GOOD[11:]}", "there is more after the object"),
        ('{"name": "get", "arguments": {"key": "a"', "not valid JSON"),
        ("{'name': 'get', 'arguments': {'key': 'a'}}", "not valid JSON"),
        ('{"name": "get", "arguments": {}} trailing', "there is more after the call"),
        ('{"name": "get", "arguments": {}}}', "there is more after the call"),
        ('{"name": "get", "arguments": {}};', "not a JSON object"),
        ('<tool_call>{"name": "get", "arguments": {"x": NaN}}</tool_call>', "NaN is not JSON"),
        ('<tool_call>{"name": "get", "arguments": {"x": 1e999}}</tool_call>', "1e999 is out of range"),
        (f'<tool_call>{{"name": "get", "arguments": {{"x": {"9" * 5000}}}}}</tool_call>', "not valid JSON"),
        ('<tool_call>{"name": "get", "name": "put"}</tool_call>', "the key 'name' stands twice"),
        ('{"name": "get", "arguments": {"x": {"a": 1, "a": 1}}}', "the key 'a' stands twice"),
        ("<tool_call>{}</tool_call>", 'has no "name"'),
        ('<tool_call>{"name": ""}</tool_call>', 'has no "name"'),
        ('<tool_call>{"name": ["get"]}</tool_call>', 'has no "name"'),
        ('<tool_call>{"name": "get", "argument": {"key": "a"}}</tool_call>', "unknown key 'argument'"),
        ('{"name": "get", "arguments": {}, "parameters": {}}', 'both "arguments" and "parameters"'),
        ('<tool_call>{"name": "get", "arguments": []}</tool_call>', '"arguments" must be a JSON object'),
        ('<tool_call>{"name": "get", "arguments": "[]"}</tool_call>', '"arguments" must be a JSON object'),
        ('<tool_call>{"name": "get", "arguments": "{} {}"}</tool_call>', '"arguments" must be a JSON object'),
        ('{"name": "get", "parameters": null}', '"parameters" must be a JSON object'),
        (f'<tool_call>{{"a": {"[" * 100_000}</tool_call>', "nested too deeply"),
        ('{"name": "get", "arguments": ' + '{"a":' * 100_000, "nested too deeply"),
        ("<|python_tag|>print(1)", "not a JSON object"),
        ('<|python_tag|>brave_search.call(query="x")<|eom_id|>', "not a JSON object"),
        ("[TOOL_CALLS]", "cannot be read; write [TOOL_CALLS]name{...}"),
        ("[TOOL_CALLS]get", "cannot be read; write [TOOL_CALLS]name{...}"),
        ("[TOOL_CALLS]get{'key': 1}", "not valid JSON"),
        ('[TOOL_CALLS]get{"key": 1} and more', "there is more after the call"),
        ("[TOOL_CALLS][]", "the list of tool calls is empty"),
        ('[TOOL_CALLS][{"name": "get"}', "not valid JSON"),
        ("[TOOL_CALLS][3]", "not a JSON object"),
        (FUNCTION.replace("</function>\n", ""), "write <tool_call><function=name><parameter=key>value</parameter>"),
        (FUNCTION.replace("</parameter>\n", ""), "write <tool_call><function=name><parameter=key>value</parameter>"),
        (FUNCTION.replace("get", ""), "write <tool_call><function=name><parameter=key>value</parameter>"),
        (FUNCTION.replace("</f", "<parameter=key>b</parameter></f"), "write <tool_call><function=name>"),
    ],
)
def test_a_malformed_call_says_why(text, reason):
    assert reason in malformed(text)


@pytest.mark.parametrize("tool_format", FORMS)
@pytest.mark.parametrize(
    "value", ["</tool_call>", '"}}', "{[", "[TOOL_CALLS]x{}", "\\", '\\"', "; {", "é 漢 😀", "\ud800", "\x00"]
)
def test_tags_quotes_braces_and_any_character_in_a_string_do_not_end_a_call(tool_format, value):
    text = format_call("put", {"text": value}, tool_format)
    [call] = parse_tool_calls(text, names=("put",))
    assert (call.name, call.arguments) == ("put", {"text": value})


def test_good_calls_around_a_bad_one_are_read():
    kinds = [type(call) for call in parse_tool_calls(f"{GOOD}<tool_call>oops</tool_call>{GOOD}")]
    assert kinds == [ToolCall, MalformedCall, ToolCall]


def test_a_call_whose_end_is_missing_does_not_swallow_the_next():
    first, second = parse_tool_calls(f'<tool_call>{{"name": "put"}}\n{GOOD}')
    assert (type(first), second) == (MalformedCall, GET)


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>{{'text': '{GOOD}'}}</tool_call>",
        f'<tool_call>{{"name": "put" {GOOD}',
        "[TOOL_CALLS]put{'text': '[TOOL_CALLS]get{}'}",
        f"<|python_tag|>write('''{GOOD}''')",
        f"{{'name': 'put', 'text': '{GOOD}'}}",
    ],
)
def test_a_call_inside_a_malformed_one_is_not_run(text):
    malformed(text)


def test_a_call_inside_a_string_of_another_format_is_not_run():
    for text in (format_call("put", {"text": GOOD}, name) for name in FORMS):
        assert [call.name for call in parse_tool_calls(text, names=("put",))] == ["put"]


# -- thoughts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (f"<think>I could {GOOD}</think>\n\nNo.", []),
        (f"<think>I could {GOOD}</think>\n\n{GOOD.replace('get', 'put')}", ["put"]),
        (f"I could {GOOD}\n</think>\n\n{GOOD.replace('get', 'put')}", ["put"]),
        (f"<tool_call>oops </think>{GOOD}", ["get"]),
        (f'<tool_call>{{"name": "a", "arguments": {{"x": " </think>{GOOD}', ["get"]),
        (f"<think>never closed {GOOD}", []),
        (f"{GOOD}<think>and then {GOOD}", ["get"]),
        (f"{GOOD}<think>and then {GOOD}</think>{GOOD.replace('get', 'put')}", ["get", "put"]),
        (f"<think>a <think> b </think> {GOOD} </think> no", []),
        ('<think>{"name": "get"}</think>\n{"name": "put"}', ["put"]),
        ('{"name": "get"}</think>\n{"name": "put"}', ["put"]),
        ("<think>[TOOL_CALLS]get{}</think>[TOOL_CALLS]put{}", ["put"]),
        ("[TOOL_CALLS]get{</think>[TOOL_CALLS]put{}", ["put"]),
        ('<think></think><|python_tag|>{"name": "put"}', ["put"]),
        (FUNCTION + "</think>" + FUNCTION.replace("get", "put"), ["put"]),
    ],
)
def test_a_thought_calls_nothing(text, names):
    assert [call.name for call in parse_tool_calls(text, names=("get", "put"))] == names


def test_a_text_that_starts_in_a_thought_calls_nothing_before_its_end():
    assert parse_tool_calls(f"perhaps {GOOD}", starts_thinking=True) == []
    assert parse_tool_calls(f"perhaps {GOOD}</think>{GOOD}", starts_thinking=True) == [GET]
    assert parse_tool_calls(f"perhaps {GOOD}") == [GET]


@pytest.mark.parametrize("tool_format", FORMS)
def test_the_tag_of_a_thought_in_an_argument_is_text(tool_format):
    arguments = {"text": "<think> a </think> b"}
    text = format_call("put", arguments, tool_format)
    [call] = parse_tool_calls(text, tool_format)
    assert (call.name, call.arguments) == ("put", arguments)


# -- properties -----------------------------------------------------------------------------------------

_texts = st.text(st.characters(codec=None)) | st.sampled_from(
    ["</tool_call>", "<tool_call>{", '"}}', "\\", "</think>", "[TOOL_CALLS]", "<|python_tag|>", "<|eom_id|>", "</s>"]
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)
_names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.:-]{0,30}", fullmatch=True)
_formats = st.sampled_from(["cohere", "deepseek", "harmony", "hermes", "json", "kimi", "llama", "mistral", "phi"])
"""Those that write arguments in JSON, and so can hold any."""


@given(_names, st.dictionaries(_texts, _json, max_size=4), _formats, st.sampled_from(["", "\n", "<|im_end|>", " </s>"]))
def test_a_call_that_is_written_is_read_back_in_its_format_and_by_auto(name, arguments, tool_format, end):
    text = format_call(name, arguments, tool_format)
    for form in (tool_format, "auto"):
        [call] = parse_tool_calls(text + end, form)
        assert (call.name, call.arguments, call.as_text) == (name, arguments, False)


_SAFE = st.text(st.characters(codec="utf-8", exclude_characters="<"))


@given(_names, st.dictionaries(_names.filter(lambda name: "=" not in name), _SAFE, max_size=4))
def test_a_call_in_qwen_coders_form_is_read_back(name, arguments):
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    text = f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"
    assert parse_tool_calls(text) == [ToolCall(name=name, arguments=arguments, as_text=True)]


_scraps = st.sampled_from(
    [
        *(
            "<tool_call>",
            "</tool_call>",
            "<think>",
            "</think>",
            "<|python_tag|>",
            "<|eom_id|>",
            "[TOOL_CALLS]",
            "[ARGS]",
        ),
        *(
            "<function=f>",
            "<parameter=a>",
            "</parameter>",
            "</function>",
            "</s>",
            ";",
            "{",
            "}",
            "[",
            "]",
            '"',
            "\\",
            "'",
        ),
        *('{"name": "a"', '"arguments": {', GOOD, FUNCTION, "get", " ", "\n", "1e999", "[" * 99, "😀", "\ud800"),
    ]
)


@given(st.lists(_scraps | _texts, max_size=12).map("".join), st.sampled_from(TOOL_FORMATS), st.booleans())
@example("[TOOL_CALLS]" + "a" * 300 + "{}", "auto", False)
def test_no_text_makes_the_parser_raise(text, tool_format, starts_thinking):
    for call in parse_tool_calls(text, tool_format, starts_thinking=starts_thinking):
        assert isinstance(call, ToolCall | MalformedCall)


_UNITS = [
    *('<tool_call>{"a":', "<tool_call>{</tool_call>", '<tool_call>["', '<tool_call>["\\"</tool_call>', "<tool_call> "),
    *("<tool_call><function=f><parameter=a></tool_call></parameter><parameter=b>", "</think>", "<think>", "[", "{"),
    *("<tool_call><function=f><parameter=a>1</parameter> ", "<tool_call><function=f><parameter=a></tool_call>"),
    *('</think>{"a":"', "[TOOL_CALLS]", '[TOOL_CALLS][{"', "[TOOL_CALLS]a ", "<|python_tag|>", '{"name": "x"};'),
    *('<tool_call>["<tool_call>[","', '"', '\\"', " ", "</s>", "</parameter>x", '{"a":1,', GOOD),
]


@pytest.mark.slow
@pytest.mark.parametrize("unit", _UNITS)
def test_a_megabyte_of_anything_is_read_in_linear_time(unit):
    def seconds(size, start, end):
        text = start + unit * (size // len(unit)) + end
        since = time.process_time()
        parse_tool_calls(text)
        return time.process_time() - since

    for start, end in (("", ""), ('<tool_call>{"a": "', "</tool_call>"), ("{", "</parameter></function></tool_call>")):
        # A parser that passes over the rest of the text at each tag takes minutes; ours takes at most about a second.
        assert seconds(1_000_000, start, end) < 8


# -- the forms that models are told of --------------------------------------------------------------------


@pytest.mark.parametrize("tool_format", FORMS)
def test_the_form_of_an_error_text_is_one_that_can_be_read(tool_format):
    text = FORMS[tool_format].replace("{...}", "{}").replace("...", "get")
    [call] = parse_tool_calls(text, tool_format)
    assert type(call) is ToolCall
    assert call.arguments in ({}, {"key": "value"})


def test_the_plain_format_that_a_template_without_tools_is_given_is_one_that_is_read(make_chat):
    schema = {"type": "function", "function": {"name": "get", "description": "Get.", "parameters": {"type": "object"}}}
    chat = make_chat("no_tools")
    prompt = chat.tokenizer.decode(chat.start([{"role": "user", "content": "Go."}], [schema]))
    [form] = re.findall(r"in the form (.*?):\n", prompt)
    [call] = parse_tool_calls(form.replace("{...}", "{}").replace("...", "get"))
    assert call == ToolCall(name="get")


@pytest.mark.parametrize(
    ("completion", "reward"),
    [(GOOD, 1.0), (f"So: {GOOD}{GOOD}", 1.0), ("hello", 0.0), (f"{GOOD}<tool_call>oops</tool_call>", 0.0)],
)
def test_valid_tool_calls_rewards_calls_that_can_all_be_read(completion, reward):
    assert valid_tool_calls([completion]) == [reward]
    assert valid_tool_calls([[{"role": "assistant", "content": completion}]]) == [reward]


@pytest.mark.parametrize("tool_format", FORMS)
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_json_has_no_form_for_is_not_written(number, tool_format):
    with pytest.raises(ValueError, match="Out of range"):
        format_call("get", {"x": number}, tool_format)
