"""What a model's config says of how it may be run: its dropout, the attention that it needs, the positions it knows.

Reads plain data of a `config.json` as well as the config objects of transformers. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from opd.errors import ConfigError, ModelError

Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"]

DROPOUT = re.compile(r"dropout|pdrop|layer_?drop|drop_path|_drop$|jitter")
"""In the name of a setting by which a model that trains leaves something out, or adds noise, at random."""
NO_DROPOUT = {"phimoe": frozenset({"router_jitter_noise"})}
"""Settings of a `model_type` that are named like one and are none: a threshold by which Phi-3.5-MoE chooses experts."""
POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx")
"""The names under which configs say how many positions a model knows; the first that is there counts."""
STRETCHED = ("linear", "dynamic", "yarn", "ntk")
"""Kinds of rotary scaling whose factor comes on top of the positions that the config names."""
SOFT_CAP = "attn_logit_softcapping"
WITHOUT_SOFT_CAP = ("sdpa",)
"""Implementations of attention that take no soft-cap, and leave it out in silence."""


def dropouts(config: Any) -> dict[str, float]:
    """Return the settings of dropout of a config and of those inside it that are above 0, by dotted name."""
    return {path: getattr(owner, name) for path, owner, name in _dropouts(config, "")}


def drop_nothing(config: Any) -> dict[str, float]:
    """Set all dropout of a config object to 0; return what was set, as `dropouts` does."""
    found = dropouts(config)
    for _, owner, name in list(_dropouts(config, "")):
        setattr(owner, name, 0.0)
    return found


def _dropouts(config: Any, above: str) -> Iterator[tuple[str, Any, str]]:
    for name, value in list(vars(config).items()):
        if is_dropout(name, value, getattr(config, "model_type", "")):
            yield f"{above}{name}", config, name
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _dropouts(value, f"{above}{name}.")


def is_dropout(name: str, value: Any, model_type: str) -> bool:
    """True if an attribute of this name and value, of a model of this kind, leaves something out at random."""
    if name in NO_DROPOUT.get(model_type, ()):
        return False
    return bool(DROPOUT.search(name)) and isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def with_dropouts(config: dict[str, Any], found: Mapping[str, float]) -> None:
    """Put what `drop_nothing` returned back into the plain data of the same config."""
    for path, value in found.items():
        *above, name = path.split(".")
        part: Any = config
        for key in above:
            part = part.get(key) if isinstance(part, dict) else None
        if isinstance(part, dict):
            part[name] = value


def looks_ahead(name: str) -> str:
    """Word the error for a model whose tokens look at those behind them."""
    return (
        f"{name} is no language model that goes on from left to right: tokens look at those behind them (an encoder, "
        "or a model that reads its prompt as a whole, such as PaliGemma). Name a causal language model."
    )


def check_causal(name: str, config: Any) -> None:
    """Raise ModelError where a config says that tokens look at those behind them, in text as well as in images."""
    language = language_of(config)
    if language.get("use_bidirectional_attention") in (True, "all") or language.get("is_causal") is False:
        raise ModelError(looks_ahead(f"model.name = {name!r}"))


def attention_of(name: str, config: Any, asked: Attention) -> str | None:
    """Return the attention that a model is to run with; None leaves the choice to transformers.

    Args:
        name: what messages call the model: the value of model.name.
        config: its `config.json`, or the object of transformers.

    Raises:
        ConfigError: what is asked for would drop the soft-cap of its scores.
    """
    cap = language_of(config).get(SOFT_CAP)
    if cap and asked in WITHOUT_SOFT_CAP:
        raise ConfigError(
            f"model.attention = {asked} leaves out the soft-cap of {name!r} ({SOFT_CAP} = {cap}): it would be another "
            "model. Allowed for it: auto, eager, flex_attention, flash_attention_2."
        )
    if asked == "auto":
        return "eager" if cap else None
    return asked


def positions_of(config: Any) -> tuple[str, int] | None:
    """Return how many positions a model knows, after the name of the setting that says so; None where none does.

    Rotary scaling counts where its factor comes on top: a YaRN of 4 over 32768 makes 131072.
    """
    language = language_of(config)
    for name in POSITIONS:
        own = language.get(name)
        if isinstance(own, int) and not isinstance(own, bool) and own > 0:
            scaled = max([own, *_stretched(language, own)])
            return (name if scaled == own else f"{name} with its rope scaling"), scaled
    return None


def _stretched(language: Mapping[str, Any], own: int) -> Iterator[int]:
    """Yield the positions that each rotary scaling of a config makes of its `own`."""
    for key in ("rope_scaling", "rope_parameters"):
        given = language.get(key)
        parts = [given, *given.values()] if isinstance(given, dict) else []
        for part in parts:
            if not isinstance(part, dict) or part.get("rope_type", part.get("type")) not in STRETCHED:
                continue
            factor, first = part.get("factor"), part.get("original_max_position_embeddings")
            if isinstance(factor, int | float):
                yield int((first if isinstance(first, int) else own) * factor)


def language_of(config: Any) -> Mapping[str, Any]:
    """Return the settings of the language model: of a composite config, those of its part for text."""
    data: Any = config if isinstance(config, Mapping) else config.to_dict()
    inner = data.get("text_config")
    return inner if isinstance(inner, Mapping) else data
