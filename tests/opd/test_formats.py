"""Each family's replies are taken apart: calls with every kind of value, thoughts, and what is left as content.

The texts are written out as the chat templates of the families render them. `test_formats_oracles.py` compares with
other readers; `tests/envs/test_tool_calls.py` has the rules that hold for all formats.
"""

import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from opd.formats import FORMATS, MalformedCall, Reply, ToolCall, read_reply, write_call

VALUES = {
    "text": "a é 漢 😀",
    "number": -1.5,
    "count": 3,
    "yes": True,
    "none": None,
    "list": [1, "b"],
    "of": {"k": [{}]},
}
JSON = (
    '{"text": "a é 漢 😀", "number": -1.5, "count": 3, "yes": true, "none": null, "list": [1, "b"], "of": {"k": [{}]}}'
)
PYTHON = 'text="a é 漢 😀", number=-1.5, count=3, yes=True, none=None, list=[1, "b"], of={"k": [{}]}'
TEXTS = {key: value if isinstance(value, str) else json.dumps(value) for key, value in VALUES.items()}
EM = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
DS = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
DSML = "<｜DSML｜function_calls>\n", "\n</｜DSML｜function_calls>"
MM = "<minimax:tool_call>\n", "\n</minimax:tool_call>"


def tagged(argument, between=""):
    """Write every value by a template with KEY and VALUE."""
    return between.join(argument.replace("KEY", key).replace("VALUE", text) for key, text in TEXTS.items())


def braced(quote):
    strings = VALUES | {"text": f"{quote}{VALUES['text']}{quote}"}
    plain = f"number:-1.5,count:3,yes:true,none:null,list:[1,{quote}b{quote}],of:{{k:[{{}}]}}"
    return f"text:{strings['text']},{plain}"


CALLS = {
    # format: (before all calls, the call `put` with VALUES, the call `get` of nothing, after all calls)
    "hermes": (
        "",
        f'<tool_call>\n{{"name": "put", "arguments": {JSON}}}\n</tool_call>',
        '<tool_call>{"name": "get", "arguments": {}}</tool_call>',
        "",
    ),
    "qwen_coder": (
        "",
        "<tool_call>\n<function=put>\n"
        + tagged("<parameter=KEY>\nVALUE\n</parameter>\n")
        + "</function>\n</tool_call>",
        "<tool_call>\n<function=get>\n</function>\n</tool_call>",
        "",
    ),
    "seed_oss": (
        "",
        "<seed:tool_call>\n<function=put>\n"
        + tagged("<parameter=KEY>VALUE</parameter>\n")
        + "</function>\n</seed:tool_call>",
        "<seed:tool_call>\n<function=get>\n</function>\n</seed:tool_call>",
        "",
    ),
    "glm": (
        "",
        "<tool_call>put\n" + tagged("<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n") + "</tool_call>",
        "<tool_call>get</tool_call>",
        "",
    ),
    "deepseek": (
        DS[0],
        f"<｜tool▁call▁begin｜>put<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n{}\n```<｜tool▁call▁end｜>",
        DS[1],
    ),
    "deepseek_v32": (
        DSML[0],
        '<｜DSML｜invoke name="put">\n'
        + "\n".join(
            f'<｜DSML｜parameter name="{key}" string="{str(key == "text").lower()}">{text}</｜DSML｜parameter>'
            for key, text in TEXTS.items()
        )
        + "\n</｜DSML｜invoke>",
        '<｜DSML｜invoke name="get">\n</｜DSML｜invoke>',
        DSML[1],
    ),
    "minimax": (
        MM[0],
        '<invoke name="put">\n' + tagged('<parameter name="KEY">VALUE</parameter>\n') + "</invoke>",
        '<invoke name="get">\n</invoke>',
        MM[1],
    ),
    "kimi": (
        EM[0],
        f"<|tool_call_begin|>functions.put:0<|tool_call_argument_begin|>{JSON}<|tool_call_end|>",
        "<|tool_call_begin|>functions.get:1<|tool_call_argument_begin|>{}<|tool_call_end|>",
        EM[1],
    ),
    "llama": (
        "<|python_tag|>",
        f'{{"name": "put", "parameters": {JSON}}}',
        '{"name": "get", "parameters": {}}',
        "",
    ),
    "mistral": ("", f"[TOOL_CALLS]put{JSON}", "[TOOL_CALLS]get[ARGS]{}", ""),
    "gemma": (
        "",
        "<|tool_call>call:put{" + braced('<|"|>') + "}<tool_call|>",
        "<|tool_call>call:get{}<tool_call|>",
        "",
    ),
    "function_gemma": (
        "",
        f"<start_function_call>call:put{{{braced('<escape>')}}}<end_function_call>",
        "<start_function_call>call:get{}<end_function_call>",
        "",
    ),
    "pythonic": ("<|python_start|>[", f"put({PYTHON})", "get()", "]<|python_end|>"),
    "lfm2": ("<|tool_call_start|>[", f"put({PYTHON})", "get()", "]<|tool_call_end|>"),
    "olmo3": ("<function_calls>", f"put({PYTHON})", "get()", "</function_calls>"),
    "phi": (
        "<|tool_call|>[",
        f'{{"name": "put", "arguments": {JSON}}}',
        '{"name": "get", "arguments": {}}',
        "]<|/tool_call|>",
    ),
    "granite": ("<|tool_call|>[", f'{{"name": "put", "arguments": {JSON}}}', '{"name": "get", "arguments": {}}', "]"),
    "cohere": (
        "<|START_ACTION|>[",
        f'{{"tool_name": "put", "parameters": {JSON}}}',
        '{"tool_name": "get", "parameters": {}}',
        "]<|END_ACTION|>",
    ),
    "jamba": (
        "<tool_calls>[",
        f'{{"name": "put", "arguments": {JSON}}}',
        '{"name": "get", "arguments": {}}',
        "]</tool_calls>",
    ),
    "nemotron": (
        "<TOOLCALL>[",
        f'{{"name": "put", "arguments": {JSON}}}',
        '{"name": "get", "arguments": {}}',
        "]</TOOLCALL>",
    ),
    "internlm": (
        "",
        f'<|action_start|><|plugin|>{{"name": "put", "parameters": {JSON}}}<|action_end|>',
        '<|action_start|><|plugin|>{"name": "get", "parameters": {}}<|action_end|>',
        "",
    ),
    "harmony": (
        "",
        f"<|start|>assistant<|channel|>commentary to=functions.put <|constrain|>json<|message|>{JSON}<|call|>",
        "<|start|>assistant to=functions.get<|channel|>commentary json<|message|>{}<|call|>",
        "",
    ),
    "json": ("[", f'{{"name": "put", "arguments": {JSON}}}', '{"name": "get", "arguments": {}}', "]"),
}
COMMA = {"pythonic", "lfm2", "phi", "granite", "cohere", "jamba", "nemotron", "json"}
RAW = {"qwen_coder", "seed_oss", "glm", "minimax"}
"""Formats whose values are text, which the tool's schema types."""
MARKED = sorted(FORMATS.keys() - {"json"})
"""Formats whose calls stand between markers, and may have text before them."""


def written(form, *which):
    """Write calls of `put` (0) and `get` (1) in the form of a family."""
    before, put, get, after = CALLS[form]
    separator = "," if form in COMMA else ";" if form == "llama" else "\n"
    return before + separator.join((put, get)[at] for at in which) + after


def called(reply):
    """The names and arguments of a reply's calls, which must all be read."""
    assert all(isinstance(call, ToolCall) for call in reply.calls), reply.calls
    return [(call.name, call.arguments) for call in reply.calls]


def put(form):
    return ("put", TEXTS if form in RAW else VALUES)


def test_every_format_is_written_out_here():
    assert CALLS.keys() == FORMATS.keys()


@pytest.mark.parametrize("form", FORMATS)
def test_a_call_is_read_with_values_of_every_kind(form):
    reply = read_reply(written(form, 0), form)
    assert called(reply) == [put(form)]
    assert [call.as_text for call in reply.calls] == [form in RAW]
    assert (reply.thought, reply.content, reply.end) == (None, "", len(written(form, 0)))


@pytest.mark.parametrize("form", FORMATS)
def test_two_calls_are_read_in_order_and_one_may_have_no_arguments(form):
    assert called(read_reply(written(form, 0, 1), form)) == [put(form), ("get", {})]
    assert called(read_reply(written(form, 1, 0), form)) == [("get", {}), put(form)]


@pytest.mark.parametrize("form", FORMATS)
def test_a_call_is_read_where_the_format_is_not_known(form):
    assert called(read_reply(written(form, 0, 1), names=("put", "get"))) == [put(form), ("get", {})]


@pytest.mark.parametrize("form", MARKED)
def test_text_before_a_call_is_content(form):
    if form == "harmony":
        text = f"<|channel|>commentary<|message|>Let me see.<|end|>{written(form, 1)}"
    else:
        text = f"Let me see.\n{written(form, 1)}"
    reply = read_reply(text, form)
    assert (called(reply), reply.content, reply.end) == ([("get", {})], "Let me see.", len(text))


THOUGHTS = [
    (form, opener, closer) for form in sorted(FORMATS) for opener, closer in FORMATS[form].thought if form != "harmony"
]


@pytest.mark.parametrize(("form", "opener", "closer"), THOUGHTS)
def test_a_call_in_a_thought_is_not_read_and_one_behind_it_is(form, opener, closer):
    inside, outside = written(form, 0), written(form, 1)
    reply = read_reply(f"{opener}\nI could {inside}\n{closer}\n\n{outside}", form)
    assert (called(reply), reply.thought, reply.content) == ([("get", {})], f"I could {inside}", "")
    opened = read_reply(f"\nI could {inside}\n{closer}\n\n{outside}", form, starts_thinking=True)
    assert opened == Reply(**{name: getattr(reply, name) for name in ("thought", "content", "calls")}, end=opened.end)
    assert read_reply(f"\nI could {inside}", form, starts_thinking=True) == Reply(thought=f"I could {inside}")
    assert read_reply(f"{opener}never closed {inside}", form).calls == []


def test_a_thought_of_harmony_calls_nothing():
    inside = '<|channel|>commentary to=functions.put<|message|>{"a": 1}'
    text = f"<|channel|>analysis<|message|>I could {inside}<|end|>{written('harmony', 1)}"
    reply = read_reply(text, "harmony")
    assert (called(reply), reply.thought, reply.content) == ([("get", {})], f"I could {inside}", "")
    assert read_reply("hm<|end|>" + written("harmony", 1), "harmony", starts_thinking=True).thought == "hm"


@pytest.mark.parametrize("form", MARKED)
def test_an_unclosed_call_is_malformed_and_its_error_shows_the_form(form):
    text = written(form, 0)
    cut = text.index("count") + 3
    for name in (form, "auto"):
        [call] = read_reply(f"Look: {text[:cut]}" if form != "harmony" else text[:cut], name).calls
        assert isinstance(call, MalformedCall)
        assert "write " in call.error or "not closed by" in call.error


@pytest.mark.parametrize("form", FORMATS)
def test_a_malformed_body_is_answered_with_the_form(form):
    breaks = {"name": ("count", "???\x00<"), "harmony": ('"count"', "count")}
    old, new = breaks.get(form, ('"count"', "count") if '"count": 3' in CALLS[form][1] else ("3", "3<"))
    if form in RAW:
        old, new = "count>" if form in ("qwen_coder", "seed_oss") else 'count"' if form == "minimax" else "count<", "<"
    elif form == "deepseek_v32":
        old, new = ">3<", ">3 4<"
    broken = written(form, 0).replace(old, new, 1)
    assert broken != written(form, 0)
    [call] = read_reply(broken, form).calls
    assert isinstance(call, MalformedCall)
    examples = {block.example for block in FORMATS[form].blocks} | {FORMATS[form].example}
    assert any(f"write {shown}" in call.error for shown in examples)


CLOSED = [(form, closer) for form in MARKED for closer in FORMATS[form].closers]


@pytest.mark.parametrize(("form", "closer"), CLOSED)
def test_a_closing_marker_in_an_argument_ends_nothing(form, closer):
    [call] = read_reply(write_call("put", {"text": f"a {closer} b"}, form), form).calls
    assert (call.name, call.arguments) == ("put", {"text": f"a {closer} b"})


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "answer", ["It is 2.", '{"answer": 42}', '{"name": "Alice", "age": 3}', '[{"a": 1}]', "[1, 2]", "f(x) = [x]", ""]
)
def test_a_final_answer_is_content_even_in_json(form, answer):
    for name in (form, "auto"):
        assert read_reply(answer, name, names=("put",)) == Reply(content=answer)
        thinking = read_reply(f"<think>\nhm\n</think>\n\n{answer}", name)
        assert thinking == Reply(thought="hm", content=answer) or name == "harmony"


# -- what only some families have ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "text", "ids"),
    [
        ("mistral", '[TOOL_CALLS][{"name": "get", "arguments": {}, "id": "a1b2c3d4e"}]', ["a1b2c3d4e"]),
        ("mistral", "[TOOL_CALLS]get[CALL_ID]a1b2c3d4e[ARGS]{}[TOOL_CALLS]get{}", ["a1b2c3d4e", None]),
        ("kimi", written("kimi", 0, 1), ["functions.put:0", "functions.get:1"]),
        (
            "cohere",
            '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "get", "parameters": {}}]<|END_ACTION|>',
            ["0"],
        ),
        ("hermes", written("hermes", 0), [None]),
    ],
)
def test_ids_are_kept(form, text, ids):
    assert [call.id for call in read_reply(text, form).calls] == ids


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|channel|>analysis<|message|>T<|end|><|start|>assistant<|channel|>final<|message|>A<|return|>", ("T", "A")),
        ("<|channel|>final<|message|>A", (None, "A")),
        ("<|channel|>analysis<|message|>cut off", ("cut off", "")),
        ("<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>A", ("", "A")),
        (
            "<|channel|>analysis<|message|>T<|end|><|start|>assistant<|channel|>analysis<|message|>U<|end|>",
            ("T\n\nU", ""),
        ),
        ("plain words", (None, "plain words")),
        ("words <|channel|>final<|message|>A", (None, "words\n\nA")),
        ("<|channel|>final<|message|>1 <think> 2 </think> {}<|end|>", (None, "1 <think> 2 </think> {}")),
    ],
)
def test_the_channels_of_harmony_are_told_apart(text, expected):
    reply = read_reply(text, "harmony")
    assert (reply.thought, reply.content, reply.calls) == (*expected, [])


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.get <|constrain|>json",
        "<|channel|>commentary to=functions.get<|constrain|>json",
        "<|channel|>commentary to=functions.get",
        "<|start|>assistant<|channel|>commentary to=functions.get code",
        "<|start|>assistant to=functions.get<|channel|>commentary json",
        " to=functions.get<|channel|>commentary json",
        "<|channel|>analysis<|message|>T<|end|><|start|>assistant to=functions.get<|channel|>commentary json",
    ],
)
@pytest.mark.parametrize("end", ["", "<|call|>", "<|end|>", "<|call|><|endoftext|>", " "])
def test_a_call_of_harmony_is_read_whatever_its_header(header, end):
    text = f'{header}<|message|>{{"key": "<|call|>"}}{end}'
    for form in ("harmony", "auto"):
        reply = read_reply(text, form)
        assert called(reply) == [("get", {"key": "<|call|>"})]
        assert text[: reply.end].endswith(("<|call|>", "<|end|>", "}"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<|channel|>commentary to=browser.search<|message|>{}", "no recipient 'browser.search'"),
        ("<|channel|>analysis to=python code<|message|>1 + 1<|call|>", "no recipient 'python'"),
        ("<|channel|>commentary to=functions.<|message|>{}", "no recipient 'functions.'"),
        ("<|channel|>commentary to=functions.get<|message|>a", "not a JSON object"),
        ("<|channel|>commentary to=functions.get<|message|>{} {}<|call|>", "there is more after the object"),
        ("<|channel|>commentary to=functions.get <|constrain|>json", "has no <|message|>"),
    ],
)
def test_a_malformed_call_of_harmony_says_why(text, reason):
    [call] = read_reply(text, "harmony").calls
    assert isinstance(call, MalformedCall)
    assert reason in call.error


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[f(1)]", "every argument needs its name"),
        ("[f(a=1, a=2)]", "'a' stands twice"),
        ("[f(a=__import__('os').system('true'))]", "is no string, number"),
        ("[f(a=1 + 1)]", "a comma or ) is missing"),
        ("[f(a=(1, 2))]", "there is no value"),
        ("[f(a={1: 2})]", "no key with a colon"),
        ("[f(a=f'{x}')]", "is no string, number"),
        ("[f(a=b'x')]", "is no string, number"),
        ("[f(a=[x for x in y])]", "is no string, number"),
        ("[f(a='x' 'y')]", "a comma or ) is missing"),
        ("[f(a='\\x')]", "escape"),
        ("[f(a=1e999)]", "is no string, number"),
        ("[f(a=" + "9" * 5000 + ")]", "is no string, number"),
        ("[f(a=" + "[" * 100_000 + ")]", "nested too deeply"),
        ("[f(a=1)", "a comma or ] is missing"),
        ("[f(a='x", "there is no value"),
        ("[f(a=1), g]", "no call of a function"),
        ("[f(a=1)] and more", "there is more after the call"),
    ],
)
def test_an_expression_that_is_no_literal_is_malformed(text, reason):
    [call] = read_reply(text, "pythonic", names=("f",)).calls
    assert isinstance(call, MalformedCall)
    assert reason in call.error
    assert read_reply(text) == Reply(content=text)


@pytest.mark.parametrize(
    ("literal", "value"),
    [
        ("'it\\'s \\n \\u00e9 \\x41 \\d'", "it's \n é A \\d"),
        ('"""a "quoted" \n b"""', 'a "quoted" \n b'),
        ("'a\nb'", "a\nb"),
        ("-0.5e-3", -0.5e-3),
        ("+7", 7),
        ("[True, False, None, true, false, null, ]", [True, False, None, True, False, None]),
        ("{'a': {\"b\": []},}", {"a": {"b": []}}),
    ],
)
def test_literals_are_read_as_python_reads_them(literal, value):
    assert called(read_reply(f"[f(a={literal}, )]", "pythonic")) == [("f", {"a": value})]


def test_a_bare_list_of_calls_is_read_by_pythonic_and_of_tools_on_offer_where_the_format_is_not_known():
    text = "[find(a=1), other.tool()]"
    expected = [("find", {"a": 1}), ("other.tool", {})]
    assert called(read_reply(text, "pythonic")) == called(read_reply(text, names=("find",))) == expected
    assert read_reply(text, names=("other",)) == read_reply(text) == Reply(content=text)


@pytest.mark.parametrize("form", ["deepseek", "deepseek_v32", "kimi", "minimax"])
def test_what_else_stands_in_a_section_of_calls_is_malformed(form):
    before, _, get, after = CALLS[form]
    assert [type(call) for call in read_reply(f"{before}{get} so {get}{after} yes", form).calls] == [
        *(ToolCall, MalformedCall),
    ]
    for text in (f"{before}{after}", f"{before} words {after}", before):
        [call] = read_reply(text, form).calls
        assert "there is something else than tool calls" in call.error
    reply = read_reply(f"a {before}{get}{get} {after} b", form)
    assert (called(reply), reply.content) == ([("get", {})] * 2, "a  b")


def test_the_marker_of_a_call_is_prose_where_the_family_needs_more():
    for form, text in (("minimax", '<invoke name="get"></invoke>'), ("jamba", "Use <tool_calls> for that.")):
        assert read_reply(text, form) == Reply(content=text)


def test_what_wraps_an_answer_is_no_part_of_it():
    text = "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
    assert read_reply(text, "cohere") == read_reply(text) == Reply(thought="hm", content="Yes.")


def test_thoughts_are_joined_and_content_is_what_is_left():
    text = '<think>\none\n</think>\nA <think>two</think>B<tool_call>{"name": "get"}</tool_call> C<|im_end|>\n'
    reply = read_reply(text)
    assert (reply.thought, reply.content, called(reply)) == ("one\n\ntwo", "A B C", [("get", {})])
    assert text[: reply.end].endswith("</tool_call>")
    assert read_reply("<think></think>A").thought == ""
    assert read_reply("<think>a</think> b </think> c") == Reply(thought="a\n\n b ", content="c")


def test_markers_hold_every_marker_of_a_family():
    for form in FORMATS.values():
        assert {*form.openers, *form.closers, *(marker for pair in form.thought for marker in pair)} <= {*form.markers}
        assert all(form.markers)
    assert {"<|channel|>", "<|start|>", "<|call|>", "<|constrain|>"} <= {*FORMATS["harmony"].markers}


@pytest.mark.parametrize(
    ("form", "arguments"),
    [
        ("qwen_coder", {"a": "</parameter></function>"}),
        ("glm", {"a": "</arg_value></tool_call>"}),
        ("glm", {"<": "a"}),
        ("gemma", {"a": '<|"|>'}),
        ("pythonic", {"no name": 1}),
        ("minimax", {'"': 1}),
    ],
)
def test_what_a_form_cannot_hold_is_not_written(form, arguments):
    with pytest.raises(ValueError, match="cannot be written in the form"):
        write_call("put", arguments, form)


# -- properties ----------------------------------------------------------------------------------------------

_texts = st.text(st.characters(codec=None)) | st.sampled_from(
    [*(marker for form in FORMATS.values() for marker in form.markers), "\\", "'", '"', "'''", "\n", "}}", ")]"]
)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)
_names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,30}", fullmatch=True)


@given(_names, st.dictionaries(_names, _json, max_size=4), st.sampled_from(sorted(FORMATS)))
def test_a_call_that_can_be_written_is_read_back(name, arguments, form):
    try:
        text = write_call(name, arguments, form)
    except ValueError:  # raw values and Gemma's strings cannot hold their own ends, nor Gemma's keys everything
        assert form in {*RAW, "deepseek_v32", "gemma", "function_gemma"}
        return
    [call] = read_reply(text, form).calls
    expected = arguments
    if form in RAW:
        expected = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in arguments.items()}
    assert (call.name, call.arguments, call.as_text) == (name, expected, form in RAW)


_PLAIN = st.text("ab <>{}[]()'\"\\,:;=\n漢", max_size=20)
"""Texts that spell no marker."""


@given(_names, st.dictionaries(_names, _PLAIN | st.integers() | st.lists(_PLAIN, max_size=2), max_size=4))
@pytest.mark.parametrize("form", FORMATS)
def test_a_call_with_plain_values_can_be_written_in_every_format(form, name, arguments):
    [call] = read_reply(write_call(name, arguments, form), names=(name,)).calls
    assert (call.name, call.arguments.keys()) == (name, arguments.keys())


_SCRAPS = sorted(
    {
        *(marker for form in FORMATS.values() for marker in form.markers),
        *(piece for texts in CALLS.values() for piece in texts),
        *("{", "}", "[", "]", "(", ")", '"', "'", "'''", "\\", ",", ":", ";", "=", " ", "\n", "to=functions.a", "a=1"),
        *('{"name": "a", "arguments": {', "[f(a=", "call:f{", "1e999", "[" * 99, "```json", "\ud800", "get", "json"),
        *("<|im_end|>", "</s>", "<function=f>", "<parameter=a>", 'name="a">', "<arg_key>a</arg_key>"),
    }
)


@given(
    st.lists(st.sampled_from(_SCRAPS) | st.text(max_size=5), max_size=12).map("".join),
    st.sampled_from(["auto", *sorted(FORMATS)]),
    st.booleans(),
)
@example("[TOOL_CALLS]" + "a" * 300 + "{}", "auto", False)
def test_no_text_makes_the_reading_raise_and_the_end_lies_in_the_text(text, form, starts_thinking):
    reply = read_reply(text, form, starts_thinking=starts_thinking, names=("get",))
    assert 0 <= reply.end <= len(text)
    assert (reply.end == 0) == (not reply.calls)
    assert all(isinstance(call, ToolCall | MalformedCall) for call in reply.calls)


_UNITS = sorted(
    {
        *_SCRAPS,
        *(
            opener + piece
            for form in FORMATS.values()
            for opener in form.openers
            for piece in ("{", "[f(a='", '{"a":"')
        ),
        *(
            '<minimax:tool_call><invoke name="a"><parameter name="b">',
            "<|channel|>commentary to=functions.f<|message|>{",
        ),
        *(closer + piece for _, _, closer in THOUGHTS for piece in ('{"a":"', "[f(a=", '{"name": "f", "arguments": ')),
        *("<tool_call>a<arg_key>k</arg_key><arg_value>", "<|tool_call>call:f{a:[", "[f(a=1),", " to=a"),
    }
    - {"", " ", "\n"}
)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["auto", *FORMATS])
def test_much_of_anything_is_read_in_linear_time(form):
    for unit in _UNITS:
        if form != "auto" and not any(marker in unit for marker in FORMATS[form].markers):
            continue
        for start in ("", CALLS.get(form, CALLS["hermes"])[0], "[f(a='"):
            text = start + unit * (100_000 // len(unit))
            since = time.process_time()
            read_reply(text, form, names=("f",))
            # A reader that passes over the rest of the text at each marker takes minutes; ours a tenth of a second.
            assert time.process_time() - since < 4, unit
