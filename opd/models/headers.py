"""What can be told of a model's weights before one is read: from config.json and the headers of its safetensors.

A model that would be refused when it is loaded is refused here by the same words, in a second, whatever its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub as hub
from huggingface_hub import constants
from transformers import AutoConfig

from opd.errors import ModelError
from opd.models.config import ModelConfig
from opd.models.description import check_causal, positions_of
from opd.models.export import Base, try_export
from opd.models.files import INDEX, SINGLE, check_description, check_weights, read_description, tensors_of
from opd.models.gguf import positions_of_gguf
from opd.models.layers import CHUNK, WINDOW, reach_of
from opd.models.loading import describing_folder, source_of
from opd.models.multimodal import composite_class
from opd.models.tokenizers import read_tokenizer
from opd.models.whole import compare_whole

Tensors = Mapping[str, Mapping[str, Any]]
LATER = "compared with config.json when they are loaded"


def check_headers(config: ModelConfig) -> list[tuple[str, str]]:
    """Return rows on a model's `weights`, `quantisation`, `positions`, `engines` and `export`, each a name and what was
    found, in words.

    Raises ModelError where loading would: adapters, weights that are quantised, missing, of another size or too many,
    and an export that would fail.
    """
    source, options = source_of(config.name)
    if "gguf_file" in options:
        found = positions_of_gguf(Path(source) / options["gguf_file"])
        return [
            ("weights", f"a GGUF file; {LATER}"),
            ("quantisation", "a GGUF file: plain floats are made of it when it is loaded"),
            ("positions", _positions(found)),
        ]
    folder = describing_folder(config.name, source)
    how = check_description(config.name, folder, dequantize=config.dequantize)
    return [
        ("weights", _weights(config, folder, quantised=how is not None)),
        ("quantisation", f"{how}; plain floats are made of it (model.dequantize)" if how else "none"),
        ("positions", _positions(positions_of(read_description(config.name, folder)))),
        ("engines", _engines(read_description(config.name, folder))),
        ("export", _export(config, folder)),
    ]


def _engines(described: Mapping[str, Any]) -> str:
    """Say which of the engines can generate with a model, as far as its config.json tells."""
    try:
        reach = reach_of(described)
    except ValueError as error:
        return f"vllm, not transformers: {error}"
    sizes = {WINDOW: ("windows", reach.window), CHUNK: ("chunks", reach.chunk)}
    parts = [f"{name} of {size:,} tokens" for kind, (name, size) in sizes.items() if kind in reach.kinds and size]
    return f"transformers, vllm{'; ' if parts else ''}{' and '.join(parts)}"


def _export(config: ModelConfig, folder: Path) -> str:
    """Write all of an export but its weights, and read it back. Raises ModelError where that fails."""
    trusted = config.trust_remote_code
    try:
        described = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        tokenizer = read_tokenizer(str(folder), trust_remote_code=trusted)
    except (OSError, ValueError, ImportError, KeyError):
        return "tried when the model is loaded"  # on the hub the tokenizer is not here yet
    stands_in = SimpleNamespace(config=described, generation_config=None)
    try_export(config.name, stands_in, tokenizer, Base(folder, tokenizer, {}, trusted))
    return "config, generation settings and tokenizer are written and read back as they were"


def _weights(config: ModelConfig, folder: Path, *, quantised: bool) -> str:
    """Compare the tensors' names and sizes with config.json; say what was found. Raises ModelError."""
    name = config.name
    tensors, where = _tensors(config, folder)
    if tensors is None:
        return where
    size = sum(math.prod(entry["shape"]) for entry in tensors.values())
    kinds = ", ".join(sorted({str(entry["dtype"]) for entry in tensors.values()}))
    said = f"{len(tensors)} tensors{where}, {size:,} numbers in {kinds}"
    if quantised:
        return f"{said}; {LATER}"
    try:
        described = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"model.name = {name!r} cannot be loaded: {error}") from error
    check_causal(name, described)
    composite = composite_class(name, described)
    if composite is None and described.get_text_config(decoder=True) is not described:
        return f"{said}; {LATER}"  # a part of it is loaded
    kind = compare_whole(name, described, tensors, composite, allow_missing=config.allow_missing)
    if kind is None:
        return f"{said}; {LATER}"
    lacks = ", but for model.allow_missing" if config.allow_missing else ""
    return f"{said}: all of {kind}{lacks}, and nothing else"


def _tensors(config: ModelConfig, folder: Path) -> tuple[Tensors | None, str]:
    """Return the tensors of a checkpoint by name, and where they lie; none where that cannot be told, and why."""
    here = any((folder / file).is_file() for file in (SINGLE, INDEX))
    if here:
        check_weights(config.name, folder, dequantize=config.dequantize)
        return tensors_of(config.name, folder), ""
    if list(folder.glob("*.bin")):
        check_weights(config.name, folder, dequantize=config.dequantize)
        return None, f"no safetensors; {LATER}"
    if Path(config.name).expanduser().is_dir() or constants.HF_HUB_OFFLINE:
        return None, f"not here yet; {LATER}"
    try:
        files = hub.get_safetensors_metadata(config.name).files_metadata.values()
    except Exception:  # whatever the network throws, and a repository without safetensors
        return None, f"not here yet; {LATER}"
    told = {
        tensor: {"dtype": info.dtype, "shape": info.shape} for file in files for tensor, info in file.tensors.items()
    }
    return told, " on the hub"


def _positions(found: tuple[str, int] | None) -> str:
    return "no bound is named" if found is None else f"{found[1]:,} ({found[0]})"
