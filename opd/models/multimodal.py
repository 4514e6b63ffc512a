"""Checkpoints of a language model with towers for images, video or sound: the language model is trained, the rest is
carried.

transformers' own class loads all of it, so that names and attention are those of the checkpoint; then its towers are
emptied, and what trains, gathers, adapts or sends weights sees the language model alone. An export takes the tensors of
the towers from the files of the base, byte for byte.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from opd.errors import ModelError
from opd.models.files import name_few, tensors_of, tensors_with_files

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "*_preprocessor_config.json")
"""Patterns of the files that say how images, video and sound are read."""
CHUNK = 16 * 2**20
"""So many bytes of a tensor are copied at once."""


@dataclass(frozen=True, slots=True)
class Carried:
    """The tensors of a checkpoint that an export takes from its base."""

    folder: Path
    """Where the base's safetensors lie."""
    tensors: Mapping[str, dict[str, Any]]
    """Type and shape of each, as in the headers of the files."""
    tied: Mapping[str, str]
    """Names under which the base holds a tied weight once more, and the name under which it is written."""


# -- choosing the class -------------------------------------------------------------------------------


def composite_class(name: str, config: Any) -> type[PreTrainedModel] | None:
    """Return the class that a checkpoint of several parts is loaded as; None for a plain language model.

    Args:
        name: what messages call the model: the value of model.name.
        config: its configuration, an object of transformers.

    Raises:
        ModelError: its language model cannot be trained by itself, by what the configuration says.
    """
    text = config.get_text_config(decoder=True)
    inner = {key: getattr(config, key, None) for key in getattr(config, "sub_configs", {})}
    parts = sorted(key for key, value in inner.items() if value is not None and value is not text)
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    whole = MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(config.model_type)
    named = next(iter(config.architectures or ()), None)
    if not parts or "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return None
    if causal is not None and causal != whole and named in (causal, None if whole is None else causal):
        return None  # a language model that was saved with the configuration of the whole
    found = f"it has {', '.join(parts)} beside its language model"
    if whole is None and causal is None:
        _refuse(name, f"{found}, and transformers knows no class of model type {config.model_type} that writes text")
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        _refuse(name, "it is an encoder with a decoder, not a language model that reads on from its own text")
    kind = getattr(transformers, named or whole or causal, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        _refuse(name, f"its architecture {named} is no class of transformers {transformers.__version__}")
    with torch.device("meta"):
        try:
            blank = kind(copy.deepcopy(config))
        except Exception as error:  # whatever a model's code says of a configuration
            raise ModelError(f"model.name = {name!r} cannot be built from its config.json: {error}") from error
    _kept(name, blank)
    return kind


def decoder_of(model: Any) -> Any:
    """Return the part of a model that maps ids to hidden states, in whatever other parts it lies."""
    decoder = model.get_decoder()
    while isinstance(decoder, PreTrainedModel) and decoder.get_output_embeddings() is not None:
        inner = decoder.get_decoder()
        decoder = inner if inner is not decoder else decoder.model  # Llama 4 does not know its own
    return decoder


def attention_option(config: Any, attention: str) -> str | dict[str, str]:
    """Return `attn_implementation` for a model: of a composite one, for its language model alone."""
    text = config.get_text_config(decoder=True)
    keys = [key for key in getattr(config, "sub_configs", {}) if getattr(config, key, None) is text]
    return dict.fromkeys(keys, attention) or attention


def _kept(name: str, model: Any) -> list[nn.Module]:
    """Return the decoder and the head of the language model. Raises ModelError where they are not apart."""
    decoder, head = decoder_of(model), model.get_output_embeddings()
    text = model.config.get_text_config(decoder=True)
    kind = type(model).__name__
    if text is model.config or getattr(decoder, "config", None) is not text:
        _refuse(name, f"in a {kind} the parts for images or sound stand inside the language model")
    if not isinstance(head, nn.Linear):
        _refuse(name, f"the head of a {kind} is {'missing' if head is None else type(head).__name__}")
    embeddings = model.get_input_embeddings()
    if all(module is not embeddings for module in decoder.modules()):
        _refuse(name, f"a {kind} has its embeddings outside of its language model")
    return [decoder, head]


def _refuse(name: str, why: str) -> NoReturn:
    raise ModelError(
        f"model.name = {name!r} is not trained here: {why}. Trained are language models, and those inside of models "
        "for images, video or sound whose parts are apart. Name a checkpoint of the language model by itself."
    )


# -- the language model by itself ---------------------------------------------------------------------


class Elsewhere(nn.Module):
    """Stands where a tower was whose weights are carried; some models ask for its place and type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.empty(0, dtype=dtype), persistent=False)

    @property
    def device(self) -> torch.device:
        return self.nothing.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self.nothing.dtype  # type: ignore[return-value]

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise ModelError("images, video and sound are not trained here: this part of the model is only carried")


def keep_language(name: str, model: Any, folder: Path) -> Carried:
    """Empty every part of a loaded model but its language model; return what an export takes from `folder`.

    Raises ModelError where the base has no safetensors, or the language model's tensors would have other names.
    """
    base = tensors_of(name, folder)
    if not base:
        raise ModelError(
            f"model.name = {name!r} has no safetensors, and its other parts can be carried from these alone. Save it "
            "with save_pretrained of transformers and name that folder."
        )
    kept = {id(module) for part in _kept(name, model) for module in part.modules()}
    _empty(model, kept, model.dtype)
    blank = {weight: torch.empty_like(value, device="meta") for weight, value in model.state_dict().items()}
    aliases = model.get_expanded_tied_weights_keys(all_submodels=True)
    written = set(revert_weight_conversion(model, {n: v for n, v in blank.items() if n not in aliases}))
    if lost := written - base.keys():
        raise ModelError(
            f"model.name = {name!r} could be trained, but not exported under its own names: it has no "
            f"{name_few(lost)}. Load it with transformers, save it with save_pretrained, and name that folder."
        )
    tied = {}
    for one, other in aliases.items():
        if one in blank and other in blank:
            [stored] = revert_weight_conversion(model, {one: blank[one]})
            [source] = revert_weight_conversion(model, {other: blank[other]})
            if stored in base:
                tied[stored] = source
    others = {tensor: entry for tensor, entry in base.items() if tensor not in written and tensor not in tied}
    return Carried(folder, {n: {"dtype": e["dtype"], "shape": e["shape"]} for n, e in others.items()}, tied)


def _empty(module: nn.Module, kept: set[int], dtype: torch.dtype) -> None:
    """Empty what does not lead to a module that is `kept`, by id."""
    for parameter in list(module._parameters):
        module._parameters[parameter] = None
    for buffer in set(module._buffers) - module._non_persistent_buffers_set:
        module._buffers[buffer] = None
    for part, child in list(module.named_children()):
        if id(child) in kept:
            continue
        if any(id(inner) in kept for inner in child.modules()):
            _empty(child, kept, dtype)
        else:
            setattr(module, part, Elsewhere(dtype))


# -- the export ---------------------------------------------------------------------------------------


def processor_files(folder: Path) -> list[Path]:
    """List the files of a folder that say how images, video and sound are read."""
    return sorted({file for pattern in PROCESSOR_FILES for file in folder.glob(pattern) if file.is_file()})


def complete(folder: Path, carried: Carried) -> None:
    """Make the files of a whole checkpoint of those of its language model in `folder`: the base's, in its order.

    Raises ModelError where the base's files have changed since they were loaded.
    """
    own = folder / ".language"
    own.mkdir()
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        file.rename(own / file.name)
    trained, base = tensors_with_files("export", own), tensors_with_files("the base", carried.folder)
    taken: dict[Path, dict[str, tuple[Path, dict[str, Any]]]] = {}
    for name, (file, entry) in base.items():
        known = carried.tensors.get(name)
        if known is not None and known != {"dtype": entry["dtype"], "shape": entry["shape"]}:
            raise ModelError(f"{name} in {file} is another tensor now than when the model was loaded.")
        source = (file, entry) if known is not None else trained.get(carried.tied.get(name, name))
        if source is None:
            raise ModelError(f"{name} in {file} was not there when the model was loaded.")
        taken.setdefault(file, {})[name] = source
    if gone := carried.tensors.keys() - base.keys():
        raise ModelError(f"{carried.folder} no longer holds {name_few(gone)}.")
    total = sum(_write(folder / file.name, tensors) for file, tensors in taken.items())
    for index in carried.folder.glob("model.safetensors.index.json"):
        described = json.loads(index.read_text(encoding="utf-8"))
        described["metadata"] = {**(described.get("metadata") or {}), "total_size": total}
        (folder / index.name).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(own)


def _write(target: Path, tensors: Mapping[str, tuple[Path, dict[str, Any]]]) -> int:
    """Write a safetensors file of tensors that lie in other files, by name; return the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (_, entry) in tensors.items():
        begin, end = end, end + entry["data_offsets"][1] - entry["data_offsets"][0]
        header[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as made:
        made.write(len(text).to_bytes(8, "little") + text)
        for file, entry in tensors.values():
            _copy(file, entry["data_offsets"], made)
    return end


def _copy(file: Path, offsets: tuple[int, int], made: Any) -> None:
    begin, end = offsets
    with file.open("rb") as source:
        source.seek(8 + int.from_bytes(source.read(8), "little") + begin)
        while begin < end:
            made.write(piece := source.read(min(CHUNK, end - begin)))
            if not piece:
                raise ModelError(f"{file} ends too early.")
            begin += len(piece)
