"""What each layer of a model looks at, by its config: all that came before, a window or a chunk of it, or a state.

Reads plain data of a `config.json` as well as the config objects of transformers. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd.models.description import language_of

FULL, WINDOW, CHUNK = "full_attention", "sliding_attention", "chunked_attention"
"""The kinds of layers whose past lies in keys and values alone, so that a mask says what they see; transformers' names.
"""
_OLD_NAMES = {"attention": FULL}
_NO_PAST = {"mlp", "moe"}
"""Layers that look at no other token."""
STATEFUL = frozenset(
    {
        "bamba", "deepseek_v4", "falcon_h1", "falcon_mamba", "granitemoehybrid", "inkling_text", "jamba", "kimi_linear",
        "lfm2", "lfm2_moe", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe",
        "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "rwkv",
        "xlstm", "zamba", "zamba2", "zaya",
    }
)  # fmt: skip
"""Architectures some of whose layers keep a state or a convolution's last inputs, unless their config says otherwise of
each layer."""
OWN_MASK = frozenset({"bloom", "gpt_neo"})
"""Architectures that compute who sees whom, or how far off it is, for rows of one length alone."""
NOT_EMBEDDED, USE_VLLM = "rollout.engine = transformers cannot generate with", "Set rollout.engine: vllm."
"""What is said of a model that the embedded engine cannot serve, before and after the reason."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How far the layers of a model look back."""

    kinds: tuple[str, ...]
    """The kinds of its layers, at least one of `FULL`, `WINDOW` and `CHUNK`."""
    window: int = 0
    """Tokens that a layer with a window sees, its own included."""
    chunk: int = 0
    """Tokens of a chunk, beyond which a layer of that kind does not look."""


def reach_of(config: Any) -> Reach:
    """Return how far a config's layers look back; ValueError, with the reason, where a mask alone cannot say it."""
    language = language_of(config)
    kind = str(language.get("model_type", ""))
    if kind in OWN_MASK or (kind == "falcon" and language.get("alibi")):
        raise ValueError(f"{kind} computes who sees whom by itself, for rows of one length")
    given = language.get("layer_types") or language.get("layers_block_type")
    listed = [name for name in given if isinstance(name, str)] if isinstance(given, list | tuple) else []
    if kind in STATEFUL and not listed:
        raise ValueError(f"layers of {kind} keep a state of their own")
    window, chunk = _number(language, "sliding_window"), _number(language, "attention_chunk_size")
    kinds = {_OLD_NAMES.get(name, name) for name in listed} - _NO_PAST if listed else {WINDOW if window else FULL}
    if strange := kinds - {FULL, WINDOW, CHUNK}:
        raise ValueError(f"it has layers of {' and '.join(sorted(strange))}, which keep a state of their own")
    filled = not isinstance(config, Mapping)  # by its class, with what a file may leave out
    if filled and ((WINDOW in kinds and not window) or (CHUNK in kinds and not chunk)):
        raise ValueError("its layers have windows whose length its config does not give")
    return Reach(tuple(sorted(kinds)) or (FULL,), window=window, chunk=chunk)


def _number(language: Mapping[str, Any], name: str) -> int:
    value = language.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
