"""Our reading of well-formed replies equals that of others: of transformers by TRL's templates, and of vLLM's parsers.

The replies are what chat templates make of a message with calls. Not covered: vLLM's parsers that need a real tokenizer
(Cohere's, gpt-oss'), and calls that those readers get wrong (see `docs/decisions/004-tool-calls-parsed-by-hand.md`).
"""

import importlib.util
import json
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import pytest

from opd.formats import FORMATS, read_reply, write_call

ARGUMENTS = {"text": "a, b: c", "number": -1.5, "count": 3, "list": ["x", "y"], "of": {"k": ["v"], "n": {"m": "w"}}}
TYPES = {"text": "string", "number": "number", "count": "integer", "list": "array", "of": "object"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "It works.",
            "parameters": {"type": "object", "properties": properties},
        },
    }
    for name, properties in (
        ("put", {key: {"type": kind, "description": "One."} for key, kind in TYPES.items()}),
        ("get", {}),
    )
]
USER = {"role": "user", "content": "Go."}
CALLS = {"one": [("put", ARGUMENTS)], "none": [("get", {})], "two": [("put", ARGUMENTS), ("put", {"text": "漢"})]}
SINGLE = {"llama3_1", "llama3_2", "gptoss", "internlm"}
"""Templates that hold one call at most, and a format of which vLLM reads only one."""
TEMPLATES = {
    **dict.fromkeys(("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"), "hermes"),
    **dict.fromkeys(("qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"), "qwen_coder"),
    **dict.fromkeys(("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"), "qwen_coder"),
    **dict.fromkeys(("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"), "gemma"),
    **dict.fromkeys(("lfm2_v2", "lfm2_2_5", "lfm2_2_5_v2"), "lfm2"),
    **dict.fromkeys(("llama3_1", "llama3_2"), "llama"),
    "glm4moe": "glm",
    "gptoss": "harmony",
}


def typed(call):
    """The arguments of a call of `put` with the types that its schema asks for."""
    if not call.as_text:
        return call.arguments
    return {key: text if TYPES[key] == "string" else json.loads(text) for key, text in call.arguments.items()}


def ours(text, form, **kwargs):
    reply = read_reply(text, form, names=("put", "get"), **kwargs)
    return reply, [(call.name, typed(call)) for call in reply.calls]


def source(template):
    trl = importlib.util.find_spec("trl")
    path = Path(trl.origin).parent / "chat_templates" / f"{template}.jinja" if trl and trl.origin else None
    if path is None or not path.exists():
        pytest.skip(f"this version of TRL ships no template {template}")
    return path.read_text()


def rendered(template, calls, thought):
    """Return the prompt and the reply that a template makes of a message with calls."""
    from transformers.utils.chat_template_utils import render_jinja_template

    made = [{"id": "a1b2c3d4e", "type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    said = {"role": "assistant", "content": "", "tool_calls": made}
    if thought:
        said["thinking" if template.startswith(("gptoss", "lfm2")) else "reasoning_content"] = thought
    options = {"tools": TOOLS, "chat_template": source(template), "bos_token": "<s>", "eos_token": "</s>"}
    full = render_jinja_template(conversations=[[USER, said]], **options)[0][0]
    start = render_jinja_template(conversations=[[USER]], add_generation_prompt=True, **options)[0][0]
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(full, start, strict=False)))
    return full[:same], full[same:]


@pytest.mark.parametrize("thought", ["", "I could call get."])
@pytest.mark.parametrize(
    ("template", "calls"),
    [(name, calls) for name in TEMPLATES for calls in CALLS if name not in SINGLE or calls != "two"],
)
def test_what_a_template_renders_is_read_back_and_as_transformers_reads_it(template, calls, thought):
    trl = pytest.importorskip("trl.chat_template_utils")
    parsing = pytest.importorskip("transformers.utils.chat_parsing")
    calls = CALLS[calls]
    prompt, text = rendered(template, calls, thought)
    thinking = prompt.rstrip().endswith("<think>")
    for form in (TEMPLATES[template], "auto"):
        reply, read = ours(text, form, starts_thinking=thinking)
        assert read == calls
        assert reply.content == ""
        assert (reply.thought or "").strip() == (thought if thought in text else "")
    tokenizer = trl.add_response_schema(SimpleNamespace(chat_template=source(template)))
    theirs = parsing.parse_response(text, tokenizer.response_template, prefix=prompt, tools=TOOLS)
    found = [(call["function"]["name"], call["function"]["arguments"]) for call in theirs["tool_calls"]]
    assert found == calls
    assert (theirs.get("reasoning_content") or theirs.get("thinking") or "").strip() == (reply.thought or "").strip()


# -- vLLM ----------------------------------------------------------------------------------------------------

PARSERS = {
    "hermes": "hermes",
    "qwen_coder": "qwen3_coder",
    "seed_oss": "seed_oss",
    "glm": "glm47",
    "deepseek": "deepseek_v31",
    "deepseek_v32": "deepseek_v32",
    "minimax": "minimax_m2",
    "kimi": "kimi_k2",
    "llama": "llama3_json",
    "mistral": "mistral",
    "gemma": "gemma4",
    "pythonic": "pythonic",
    "lfm2": "lfm2",
    "olmo3": "olmo3",
    "granite": "granite",
    "jamba": "jamba",
    "internlm": "internlm",
}
"""From a format to vLLM's parser of the family. Its parsers of FunctionGemma (which drops what is no text), of
Phi-4-mini (which stops at the first bracket), Cohere and gpt-oss (which need real tokenizers) are left out."""


class Vocabulary:
    """Stands for a tokenizer in which every marker is a token."""

    all_special_tokens = ()
    bos_token_id = eos_token_id = None
    chat_template = ""

    def __init__(self):
        markers = sorted({marker for form in FORMATS.values() for marker in form.markers})
        self.ids = {marker: number for number, marker in enumerate(markers, 1)}

    def get_vocab(self):
        return self.ids

    def encode(self, text, **kwargs):
        return [self.ids.get(text, 0)]

    def tokenize(self, text):
        return [text]

    def convert_tokens_to_ids(self, text):
        return self.ids.get(text)

    def decode(self, ids, **kwargs):
        return ""


def joined(form, calls):
    """Write several calls as one text, by the markers that are around all of them."""
    texts = [write_call(name, arguments, form) for name, arguments in calls]
    for opener, closer in FORMATS[form].frame:
        texts = [text.replace(opener, "").replace(closer, "") for text in texts]
    text = "\n".join(texts)
    used = next((pair for pair in FORMATS[form].frame if pair[0] in write_call(*calls[0], form)), ("", ""))
    lists = {
        "pythonic": "]\n[",
        "lfm2": "]<|tool_call_end|>\n<|tool_call_start|>[",
        "olmo3": "</function_calls>\n<function_calls>",
        "granite": "]\n<|tool_call|>[",
        "jamba": "]</tool_calls>\n<tool_calls>[",
        "llama": "\n",
    }
    between = {"olmo3": "\n", "llama": "; "}.get(form, ", ")
    return used[0] + text.replace(lists.get(form, "\x00"), between) + used[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "calls"), [(name, calls) for name in PARSERS for calls in CALLS if name not in SINGLE or calls != "two"]
)
def test_a_call_is_read_as_by_vllm(form, calls):
    parsers = pytest.importorskip("vllm.tool_parsers")
    protocol = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol")
    calls = CALLS[calls]
    try:
        made = parsers.ToolParserManager.get_tool_parser(PARSERS[form])
    except KeyError:
        pytest.skip(f"this version of vLLM has no parser {PARSERS[form]}")
    request = protocol.ChatCompletionRequest(messages=[USER], model="m", tools=TOOLS)
    text = joined(form, calls)
    theirs = made(Vocabulary(), tools=request.tools).extract_tool_calls(text, request)
    found = [(call.function.name, json.loads(call.function.arguments)) for call in theirs.tool_calls]
    reply, read = ours(text, form)
    assert read == found == calls
    assert reply.content == (theirs.content or "").strip()
