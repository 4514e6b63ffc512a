"""The families of models that tests know: each with its chat template, the tokens around it, and how replies end.

A template is read from an installed package where one carries it as the model publishes it: `trl:NAME` is a file of
trl's `chat_templates`, `transformers:MODULE` a literal `chat_template` in that module. The rest, `NAME.jinja`, are
files of `tests/templates`, written here after the form that the model is published with.

The tokenizers are small, but have what a chat format meets: the family's added tokens with the flags that they are
published with, its way with spaces, and pieces of several characters.
"""

import ast
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WRITTEN = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Family:
    """How models of one family are published.

    `special` and `markup` are added tokens; decoding with `skip_special_tokens` drops those in `special` alone. Only
    what the template or a reply can hold is listed. `ends` are the texts of `eos_token_id` in generation_config.json.
    `spaces` says what a tokenizer of kind "sentencepiece" does with the first space: "prepend" puts one before every
    stretch of text between special tokens (Llama 2), "first" before the whole text alone, "none" before nothing
    (Gemma). `strips` are the added tokens that swallow white space behind them (`rstrip`).
    """

    name: str
    source: str
    special: tuple[str, ...]
    markup: tuple[str, ...]
    bos: str | None
    eos: str
    ends: tuple[str, ...]
    kind: str = "bytes"
    spaces: str = "prepend"
    strips: tuple[str, ...] = ()


_THINK = ("<think>", "</think>")
_CALL = ("<tool_call>", "</tool_call>")
_RESPONSE = ("<tool_response>", "</tool_response>")
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN3 = (*_CALL, *_RESPONSE, *_THINK)
_CHATML_ENDS = ("<|im_end|>", "<|endoftext|>")
_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
_LLAMA3 += ("<|eom_id|>", "<|eot_id|>")
_LLAMA3_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
_LLAMA4 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|python_start|>",
    "<|python_end|>",
)
_LLAMA4_ENDS = ("<|end_of_text|>", "<|eom|>", "<|eot|>")
_LLAMA4 += _LLAMA4_ENDS[1:]
_GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_GEMMA4 = ("<bos>", "<eos>", "<|turn>", "<turn|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", '<|"|>')
_GEMMA4 += ("<|tool_response>", "<tool_response|>", "<|channel>", "<channel|>", "<|think|>")
_PHI3 = ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_PHI3_ENDS = ("<|endoftext|>", "<|assistant|>", "<|end|>")
_HARMONY = ("<|startoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|end|>")
_HARMONY_ENDS = ("<|return|>", "<|endoftext|>", "<|call|>")
_HARMONY += _HARMONY_ENDS
_GLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
_DEEPSEEK_CALLS = tuple(
    f"<｜tool▁{part}｜>"
    for part in (
        *("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep"),
        *("outputs▁begin", "outputs▁end", "output▁begin", "output▁end"),
    )
)
_COHERE = tuple(f"<|{role}_TOKEN|>" for role in ("START_OF_TURN", "END_OF_TURN", "SYSTEM", "USER", "CHATBOT"))
_LFM2 = ("<|startoftext|>", *_CHATML, "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>")
_LFM2 += ("<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>")
_NEMOTRON = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")  # and of InternLM


def _plain(
    name: str, source: str, special: tuple[str, ...], markup: tuple[str, ...], bos: str | None, eos: str
) -> Family:
    return Family(name, source, special, markup, bos, eos, (eos,))


def _qwen(name: str, source: str, markup: tuple[str, ...] = _QWEN3) -> Family:
    return Family(name, source, _CHATML, markup, None, "<|im_end|>", _CHATML_ENDS)


def _llama3(name: str, source: str, ends: tuple[str, ...] = _LLAMA3_ENDS) -> Family:
    return Family(name, source, _LLAMA3, (), "<|begin_of_text|>", "<|eot_id|>", ends)


def _gemma(name: str, source: str, special: tuple[str, ...], *ends: str) -> Family:
    return Family(name, source, special, (), "<bos>", "<eos>", ("<eos>", *ends), "sentencepiece", "none")


def _phi3(name: str, source: str) -> Family:
    strips = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    return Family(name, source, _PHI3, (), "<s>", "<|endoftext|>", _PHI3_ENDS, "sentencepiece", strips=strips)


def _deepseek(name: str, source: str, markup: tuple[str, ...]) -> Family:
    roles = ("<｜User｜>", "<｜Assistant｜>")  # added, but not special: they show in decoded text
    return Family(name, source, _DEEPSEEK, (*roles, *markup), _DEEPSEEK[0], _DEEPSEEK[1], _DEEPSEEK[1:])


def _nemotron(name: str, source: str) -> Family:
    return Family(name, source, _NEMOTRON, (*_THINK, *_CALL), "<s>", "<|im_end|>", ("</s>", "<|im_end|>"))


def _mistral(name: str, source: str, *marks: str, kind: str = "bytes", spaces: str = "prepend") -> Family:
    special = ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
    special += ("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", *marks)
    return Family(name, source, special, (), "<s>", "</s>", ("</s>",), kind, spaces)


def _granite(name: str, source: str, *markup: str) -> Family:
    special = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")
    return Family(name, source, special, markup, "<|end_of_text|>", "<|end_of_text|>", ("<|end_of_text|>",))


_READ_FROM_PACKAGES = (
    _qwen("qwen2.5", "trl:qwen2_5", _CALL),
    _qwen("qwen3", "trl:qwen3"),
    _qwen("qwen3-2507", "trl:qwen3_instruct_2507"),
    _qwen("qwen3-vl", "trl:qwen3_vl"),
    _qwen("qwen3.5", "trl:qwen3_5_think"),
    _qwen("qwen3.5-small", "trl:qwen3_5_nothink"),
    _qwen("qwen3.6", "trl:qwen3_6"),
    _qwen("qwen3.8", "trl:qwen3_8"),
    _llama3("llama3", "trl:llama3", ("<|end_of_text|>", "<|eot_id|>")),
    _llama3("llama3.1", "trl:llama3_1"),
    _llama3("llama3.2", "trl:llama3_2"),
    Family(
        "llama4", "transformers:models/llama4/processing_llama4.py", _LLAMA4, (), _LLAMA4[0], "<|eot|>", _LLAMA4_ENDS
    ),
    _gemma("gemma2", "trl:gemma", _GEMMA, "<end_of_turn>"),
    _gemma("gemma3", "trl:gemma3", _GEMMA, "<end_of_turn>"),
    _gemma("gemma4", "trl:gemma4_v5", _GEMMA4, "<turn|>", "<|tool_response>"),
    _phi3("phi3", "trl:phi3"),
    _phi3("phi3.5", "trl:phi3_5"),
    Family("gpt-oss", "trl:gptoss", _HARMONY, (), "<|startoftext|>", "<|return|>", _HARMONY_ENDS),
    Family(
        name="glm4.5",
        source="trl:glm4moe",
        special=("<|endoftext|>", "[gMASK]", "<sop>", *_GLM_ROLES),
        markup=("/nothink", *_QWEN3, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        bos=None,
        eos="<|endoftext|>",
        ends=("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    _deepseek("deepseek-v3", "trl:deepseekv3", (*_DEEPSEEK_CALLS, *_THINK)),
    _deepseek("deepseek-r1-distill", "trl:deepseek_r1_distill", _THINK),
    _nemotron("nemotron3-nano", "trl:nemotron_3_nano"),
    _nemotron("nemotron3-super", "trl:nemotron_3_super"),
    _plain("aya-expanse", "trl:cohere", ("<BOS_TOKEN>", *_COHERE), (), "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    _plain(
        "tiny-aya",
        "trl:cohere2",
        ("<BOS_TOKEN>", *_COHERE, "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        (),
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    Family("lfm2", "trl:lfm2_v2", _LFM2, (), "<|startoftext|>", "<|im_end|>", ("<|im_end|>",)),
    Family("lfm2.5", "trl:lfm2_2_5_v2", (*_LFM2, *_THINK), (), "<|startoftext|>", "<|im_end|>", ("<|im_end|>",)),
)

_TEKKEN = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[ARGS]", "[CALL_ID]", "[TOOL_CONTENT]")
_PHI4_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_KIMI = ("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>")
_KIMI_CALLS = tuple(
    f"<|tool_call{part}|>" for part in ("s_section_begin", "s_section_end", "_begin", "_argument_begin", "_end")
)
_COHERE_PARTS = tuple(
    f"<|{at}_{part}|>" for part in ("THINKING", "ACTION", "RESPONSE", "TOOL_RESULT") for at in ("START", "END")
)
_FUNCTIONS = tuple(f"<{at}_function_{part}>" for part in ("declaration", "call", "response") for at in ("start", "end"))

# The flags and ends of FunctionGemma, Kimi K2, MiniMax M2, Seed-OSS, Hunyuan, EXAONE, Falcon3, Granite 4, SmolLM3 and
# Command R7B were written without the published files at hand.
_WRITTEN_HERE = (
    Family("llama2", "llama2.jinja", ("<s>", "</s>"), (), "<s>", "</s>", ("</s>",), "sentencepiece"),
    Family("zephyr", "zephyr.jinja", ("<s>", "</s>"), (), "<s>", "</s>", ("</s>",), "sentencepiece"),
    _mistral("mistral-v0.3", "mistral_v3.jinja", kind="sentencepiece", spaces="first"),
    _mistral("mistral-nemo", "mistral_nemo.jinja"),
    _mistral("mistral-small-3.2", "mistral_small.jinja", *_TEKKEN),
    _mistral("ministral3-reasoning", "ministral3.jinja", *_TEKKEN, "[THINK]", "[/THINK]"),
    _qwen("qwen3-coder", "qwen3_coder.jinja"),
    _gemma(
        "function-gemma", "function_gemma.jinja", (*_GEMMA, *_FUNCTIONS, "<escape>"), "<end_of_turn>", _FUNCTIONS[4]
    ),
    Family("phi4", "phi4.jinja", (*_CHATML, "<|im_sep|>"), (), "<|endoftext|>", "<|im_end|>", _CHATML_ENDS),
    Family(
        name="phi4-mini",
        source="phi4_mini.jinja",
        special=("<|endoftext|>", *_PHI4_ROLES),
        markup=("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>"),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        ends=("<|end|>", "<|endoftext|>"),
        strips=_PHI4_ROLES,
    ),
    _deepseek("deepseek-v3.1", "deepseek_v31.jinja", (*_DEEPSEEK_CALLS, *_THINK)),
    Family("smollm2", "smollm2.jinja", _CHATML, (), "<|im_start|>", "<|im_end|>", ("<|im_end|>",)),
    Family(
        name="smollm3",
        source="smollm3.jinja",
        special=("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"),
        markup=_QWEN3,
        bos=None,
        eos="<|im_end|>",
        ends=("<|im_end|>",),
    ),
    # Its roles, `<|user|>` and the like, are no tokens of their own: they are plain text.
    Family("olmo2", "olmo2.jinja", _CHATML, (), "<|endoftext|>", "<|endoftext|>", ("<|endoftext|>",)),
    # Its markup, `<function_calls>`, is plain text as well.
    Family("olmo3", "olmo3.jinja", _CHATML, (), None, "<|im_end|>", _CHATML_ENDS),
    _granite("granite3.3", "granite33.jinja"),
    _granite("granite4", "granite4.jinja", *_QWEN3),
    Family(
        name="command-r7b",
        source="command_r7b.jinja",
        special=("<BOS_TOKEN>", *_COHERE),
        markup=_COHERE_PARTS,
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        ends=("<|END_OF_TURN_TOKEN|>",),
    ),
    Family("kimi-k2", "kimi_k2.jinja", _KIMI, _KIMI_CALLS, "[BOS]", "[EOS]", ("<|im_end|>",)),
    _plain(
        "minimax-m2",
        "minimax_m2.jinja",
        ("]~!b[", "]~b]", "[e~["),
        (*_THINK, "<minimax:tool_call>", "</minimax:tool_call>"),
        "]~!b[",
        "[e~[",
    ),
    _plain(
        "seed-oss",
        "seed_oss.jinja",
        ("<seed:bos>", "<seed:eos>", "<seed:pad>"),
        ("<seed:think>", "</seed:think>", "<seed:tool_call>", "</seed:tool_call>"),
        "<seed:bos>",
        "<seed:eos>",
    ),
    _plain(
        "hunyuan",
        "hunyuan.jinja",
        ("<|startoftext|>", "<|extra_0|>", "<|extra_4|>", "<|eos|>"),
        (),
        "<|startoftext|>",
        "<|eos|>",
    ),
    _plain(
        "exaone4",
        "exaone4.jinja",
        ("[BOS]", "[|system|]", "[|user|]", "[|assistant|]", "[|tool|]", "[|endofturn|]"),
        (*_THINK, *_CALL, "<tool_result>", "</tool_result>"),
        "[BOS]",
        "[|endofturn|]",
    ),
    _plain(
        "falcon3",
        "falcon3.jinja",
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"),
        (),
        None,
        "<|endoftext|>",
    ),
    Family("internlm2.5", "internlm2.jinja", _NEMOTRON, (), "<s>", "</s>", ("</s>", "<|im_end|>"), "sentencepiece"),
    _plain(
        "hermes3",
        "hermes3.jinja",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"),
        (),
        "<|begin_of_text|>",
        "<|im_end|>",
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in (*_READ_FROM_PACKAGES, *_WRITTEN_HERE)}
"""By name."""


def template(family: Family) -> str | None:
    """Read the family's chat template; None where no installed package carries it (any more)."""
    package, _, name = family.source.rpartition(":")
    if not package:
        return (WRITTEN / name).read_text()
    if find_spec(package) is None:
        return None
    path = files(package) / (name if name.endswith(".py") else f"chat_templates/{name}.jinja")
    if not path.is_file():
        return None
    return _literal(path.read_text()) if name.endswith(".py") else path.read_text()


def _literal(code: str) -> str | None:
    """Read the value of `chat_template = "..."` off Python code, without running it."""
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "chat_template":
            return str(ast.literal_eval(node.value))
    return None


@cache
def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Build the family's tokenizer, of a few hundred or thousand pieces. All callers share it: copy it to change it.

    Raises ModuleNotFoundError for a family of kind "sentencepiece" where mistral_common is not installed, from which
    the pieces are.
    """
    tokenizer = _of_bytes() if family.kind == "bytes" else _of_pieces(family.spaces)
    for text in (*family.special, *family.markup):
        special = text in family.special
        added = AddedToken(text, special=special, normalized=False, rstrip=text in family.strips)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.eos,
        chat_template=template(family),
        clean_up_tokenization_spaces=False,
    )


_MERGES = (
    "T h",
    "Th e",
    "t h",
    "th e",
    "i n",
    "e r",
    "o n",
    "a n",
    "Ċ Ċ",
    "Ġ t",
    "Ġt h",
    "Ġth e",
    "Ġ a",
    ". Ċ",
    "> Ċ",
    '" :',
    "1 2",
)


def _of_bytes() -> Tokenizer:
    """Byte-level BPE of a few merges, some of which join a mark of structure with the text beside it."""
    merges = [tuple(merge.split(" ")) for merge in _MERGES]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _of_pieces(spaces: str) -> Tokenizer:
    """BPE with byte fallback over pieces of a real SentencePiece model, which knows words as `▁The`."""
    vocab, merges = _sentencepieces()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spaces == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    elif spaces == "none":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(parts if spaces == "none" else [*parts, decoders.Strip(" ", 1, 0)])
    return tokenizer


@cache
def _sentencepieces(most: int = 4000) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Take the bytes, the characters and the first `most` joined pieces of Mistral's first model, and their merges."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(files("mistral_common") / "data" / "tokenizer.model.v1"))
    every = [model.id_to_piece(n) for n in range(model.get_piece_size())]
    first = 3 + 256  # behind <unk>, <s>, </s> and the bytes
    joined = [piece for piece in every[first:] if len(piece) > 1][:most]
    kept = ["<unk>", *every[3:first], *(piece for piece in every[first:] if len(piece) == 1), *joined]
    vocab = {piece: n for n, piece in enumerate(kept)}
    # A piece earlier in the model was joined earlier; of its halves either may be the longer.
    halves = ((piece[:at], piece[at:]) for piece in joined for at in range(1, len(piece)))
    return vocab, [(left, right) for left, right in halves if left in vocab and right in vocab]
