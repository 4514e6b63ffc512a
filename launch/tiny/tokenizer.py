"""The tokenizer of a tiny model: byte-level BPE over a world's own words, and a chat template with tools: ChatML's.

A model of half a million parameters learns in a minute only if an episode is short and a word has one id
wherever it stands. So what is the same in every episode (JSON around a call's arguments, the sentences
around privileged text) is one id each, and words are split from the white space before them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opd.tool_calls import CLOSE, OPEN

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"

# Tools are shown by their signatures alone: descriptions would be most of a short prompt, and a model that
# is trained on one set of tools does not read them. Nothing that was rendered is ever rewritten.
CHAT_TEMPLATE = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if system or tools %}
    {{- '<|im_start|>system\\n' + system }}
    {%- if tools %}
        {{- ('\\n' if system else '') + 'Tools: ' }}
        {%- for tool in tools %}
            {{- tool.function.name + '(' + (tool.function.parameters.properties or {}) | join(', ') + ')' }}
            {{- '' if loop.last else ', ' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in (messages[1:] if messages[0].role == 'system' else messages) %}
    {{- '<|im_start|>' + message.role + '\\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function | tojson + '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

_ROLES = tuple(f"{START}{role}\n" for role in ("system", "user", "assistant", "tool"))
# The newline after an end-of-turn token is never sampled, so it may as well go with what follows.
_PIECES = (*_ROLES, *(f"\n{role}" for role in _ROLES))
_CHUNKS = r"\d|[^\W\d_]+|[\W_]+"
"""A digit, a word without the space before it, or whatever stands between words."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """Says how conversations are written: a chat template, and the tokens that its markup is made of."""

    special: tuple[str, ...]
    """Tokens that are marked as special."""
    end: str
    """The one of them that ends a text."""
    template: str
    pieces: tuple[str, ...] = ()
    """Further markup, one token each."""


CHATML = Dialect(special=(START, END), end=END, template=CHAT_TEMPLATE, pieces=_PIECES)


def call_pieces(tools: Iterable[dict[str, Any]]) -> list[str]:
    """Return the fixed texts around the arguments, all of them strings, of calls to these tools."""
    pieces = [f'"}}}}{CLOSE}']
    for schema in tools:
        first, *others = schema["function"]["parameters"]["properties"]
        call = json.dumps({"name": schema["function"]["name"], "arguments": {first: ""}})
        pieces += [OPEN + call.removesuffix('"}}'), *(f'", "{name}": "' for name in others)]
    return pieces


def build_tokenizer(words: Sequence[str], pieces: Sequence[str], dialect: Dialect = CHATML) -> PreTrainedTokenizerFast:
    """Make a tokenizer that gives each of `words` one id, and each of the fixed `pieces`; other text falls to bytes.

    Raises ValueError when a piece is not ASCII: the byte-level decoder would not give it back.
    """
    for piece in pieces:
        if not piece.isascii():
            raise ValueError(f"a fixed piece must be ASCII: {piece!r}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CHUNKS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=65_536,  # no limit: merges end when every word is one id
        min_frequency=1,
        special_tokens=[PAD, *dialect.special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(set(words)), trainer)
    fixed = [*dialect.pieces, *pieces]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in dict.fromkeys(fixed)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=dialect.end,
        chat_template=dialect.template,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
