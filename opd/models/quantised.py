"""Makes plain floats of a quantised checkpoint, by transformers' own means, as a model that never was quantised.

What transformers dequantises keeps traces: scales stay in the modules, and names that were made of two tensors are
turned back into the wrong one of them when it is saved. So its values are moved into a new model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_AFTERWARDS = "bitsandbytes"
"""The kind that transformers loads as it is, and dequantises afterwards."""


def ask_for_floats(config: Any) -> None:
    """Mark a config of transformers so that its weights are dequantised as they are loaded."""
    for part in (config, config.get_text_config(decoder=True)):
        quantisation = getattr(part, "quantization_config", None)
        if isinstance(quantisation, dict) and quantisation.get("quant_method") != _AFTERWARDS:
            quantisation["dequantize"] = True


@contextmanager
def unwarned() -> Iterator[None]:
    """Hide the warnings of packages for quantised weights, which are of no use to whoever asked for plain ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def moved_into_plain(model: Any, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, dict[str, set[Any]]]:
    """Move the values of a dequantised model into a plain one of its class; the given one is of no use afterwards.

    Args:
        dtype: of the weights.
        options: of `from_pretrained`, by which the given model was loaded.

    Returns:
        The model, and what it did not get: `missing_keys`, `unexpected_keys` and `mismatched_keys`.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        model = model.dequantize(dtype)
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with torch.device("meta"):
        taken = set(type(model)(copy.deepcopy(config)).state_dict())
    values = {name: value for name, value in model.state_dict().items() if name in taken}  # scales are left behind
    kept = {key: options[key] for key in ("attn_implementation", "trust_remote_code") if key in options}
    plain, found = type(model).from_pretrained(
        None,
        config=config,
        state_dict=values,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **kept,
    )
    plain._weight_conversions = None  # it is saved under the names of its class
    plain.generation_config = model.generation_config
    plain.config.name_or_path = plain.name_or_path = model.name_or_path
    return plain, found
