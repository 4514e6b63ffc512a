"""Checks of a checkpoint's files before a weight is read, and of what a loader then did with its tensors.

A model is loaded whole or refused by name: weights that are random, packed, dropped or cut short would train without
a word. `opd.models.loading` does the loading. No torch here, so that a folder can be judged in a moment.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from opd.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
QUANTISED = ("quantization_config", "compression_config", "quantization")
"""Keys of a `config.json`, or of a part of it, under which packages write how they packed the weights."""
QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files in which older GPTQ and AWQ checkpoints and those of ModelOpt write the same."""
POINTER = b"version "
"""The first bytes of a file that Git LFS has not fetched yet."""
MOST_HEADER = 100_000_000
"""The most bytes that the format allows a header of safetensors."""
FLOATS = ("F64", "F32", "F16", "BF16")
FORMER_BUFFERS = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|causal_mask|inv_freq|position_ids|version)$")
"""Masks, positions and marks that older versions of a model stored; today's versions compute them."""
DEQUANTISED = {
    "fp8": "accelerate",
    "mxfp8": "accelerate",
    "mxfp4": "accelerate",
    "compressed-tensors": "compressed_tensors",
    "bitsandbytes": "bitsandbytes",
}
"""The values of `quantization_config.quant_method` of which plain floats can be made, and the package that it takes."""
UNQUANTISED = "Name the checkpoint that it was made from, or a dequantised copy"
MENDS = (
    (r"(^|\.)_orig_mod\.", "It was saved from inside torch.compile: save `model._orig_mod`"),
    (r"^module\.", "It was saved from inside a wrapper (DDP, DeepSpeed): save `model.module`"),
    (r"_fsdp_wrapped_module|_flat_param", "It was saved from inside FSDP: gather the full state dict first"),
    (r"lora_|\.base_layer\.|^base_model\.model\.", "Its adapters are not merged: peft's merge_and_unload(), then save"),
    (r"\.(qweight|qzeros|weight_packed|weight_scale\w*|SCB|absmax|scales)$", f"It is quantised. {UNQUANTISED}"),
    (r"(^|\.)(score|classifier|qa_outputs|v_head)\.", "It is a classifier, or has a value head: name a language model"),
)
"""Patterns in the names of tensors that give a kind of checkpoint away, and the mend for each."""


def check_description(name: str, folder: Path, *, dequantize: bool = False) -> str | None:
    """Read how a folder describes its weights; return how they are quantised, None where they are plain.

    Raises ModelError for adapters, for quantised weights that are not to be, or cannot be, dequantised, and for plain
    ones that are to be.
    """
    if (folder / "adapter_config.json").is_file():
        raise adapters_error(name)
    config = read_description(name, folder)
    how = quantisation_of(config) or next((file for file in QUANTISED_FILES if (folder / file).is_file()), None)
    if how is None:
        if dequantize:
            raise ModelError(f"model.name = {name!r} is not quantised: remove model.dequantize, which has no effect.")
        return None
    mend = _mend_of_quantisation(config, dequantize=dequantize)
    if mend is not None:
        raise ModelError(f"model.name = {name!r} is quantised ({how}), and such weights do not train. {mend}.")
    return how


def read_description(name: str, folder: Path) -> dict[str, Any]:
    """Return what a folder's config.json holds. Raises ModelError where that is nothing."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.name = {name!r} cannot be loaded: its config.json: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"model.name = {name!r} cannot be loaded: its config.json holds no settings")
    return config


def _mend_of_quantisation(config: Mapping[str, Any], *, dequantize: bool) -> str | None:
    """Say what is to be done about quantised weights; None where they are to be, and can be, dequantised."""
    inner = config.get("text_config")
    parts = [config.get("quantization_config"), inner.get("quantization_config") if isinstance(inner, dict) else None]
    methods = [part.get("quant_method") for part in parts if isinstance(part, dict)]
    package = next((DEQUANTISED[method] for method in methods if method in DEQUANTISED), None)
    if package is None:
        return f"model.dequantize cannot undo this kind. {UNQUANTISED}" if dequantize else UNQUANTISED
    if importlib.util.find_spec(package) is None:
        return f"model.dequantize: true undoes it, with a package: pip install {package.replace('_', '-')}"
    return None if dequantize else "Set model.dequantize: true, or name the checkpoint that it was made from"


def check_weights(name: str, folder: Path, *, dequantize: bool = False) -> list[str]:
    """Check the safetensors of a folder, if there are any, without reading a weight; return their tensors' names.

    Raises ModelError for files that are missing, ambiguous or damaged, and, unless they are to be dequantised, for
    weights that are no plain floats.
    """
    files = _weight_files(name, folder)
    for file in [] if files else folder.glob("pytorch_model*.bin"):
        if _starts_as_pointer(file):
            raise ModelError(f"model.name = {name!r}: {file.name} is a pointer of Git LFS. Fetch it: git lfs pull.")
    tensors = _entries(name, files)
    packed = (
        []
        if dequantize
        else [
            f"{tensor} ({entry['dtype']})"
            for tensor, entry in tensors.items()
            if tensor.endswith((".weight", "_proj")) and entry["dtype"] not in FLOATS
        ]
    )
    if dequantize:
        _check_blocks(name, read_description(name, folder), tensors)
    if packed:
        raise ModelError(f"model.name = {name!r} is quantised, no plain floats: {name_few(packed)}. {UNQUANTISED}.")
    return list(tensors)


def _check_blocks(name: str, config: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ModelError for FP8 blocks that do not cut a weight evenly: transformers would spread the scales wrongly."""
    for part in (config, config.get("text_config")):
        told = part.get("quantization_config") if isinstance(part, dict) else None
        block = told.get("weight_block_size") if isinstance(told, dict) else None
        if not isinstance(block, list) or len(block) != 2:
            continue
        uneven = []
        for scale, entry in tensors.items():
            weight = tensors.get(scale.removesuffix("_scale_inv"), entry)
            if weight is entry or not weight["dtype"].startswith("F8") or len(entry["shape"]) != 2:
                continue
            parts = zip(weight["shape"], entry["shape"], block, strict=True)
            if any(count != 1 and size != count * long for size, count, long in parts):
                uneven.append(scale.removesuffix("_scale_inv"))
        if uneven:
            raise ModelError(
                f"model.name = {name!r}: its blocks of {block[0]} rows and {block[1]} columns do not cut "
                f"{name_few(uneven)} evenly, and model.dequantize cannot undo that. {UNQUANTISED}."
            )


def tensors_of(name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Return type, shape and place of each tensor in the safetensors of a folder. Raises ModelError as above."""
    return {tensor: entry for tensor, (_, entry) in tensors_with_files(name, folder).items()}


def tensors_with_files(name: str, folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return the same, each behind the file that holds it."""
    return {t: (file, e) for file in _weight_files(name, folder) for t, e in _header(name, file).items()}


def _entries(name: str, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    return {tensor: entry for file in files for tensor, entry in _header(name, file).items()}


def adapters_error(name: str) -> ModelError:
    """The error to raise for a folder, or a hub's repository, of adapters."""
    return ModelError(
        f"model.name = {name!r} holds adapters (adapter_config.json), and an export would lack what they are laid "
        "over. Merge them (peft's merge_and_unload()), save the result in a folder of its own, and name that."
    )


def check_taken(
    name: str,
    kind: str,
    *,
    missing: Collection[str],
    unexpected: Collection[str],
    missized: Collection[tuple[str, Iterable[int], Iterable[int]]] = (),
) -> list[str]:
    """Compare what a loader found with the whole model of class `kind`. Raises ModelError that names the tensors.

    Returns the unexpected tensors that it lets through: buffers of older versions, which are computed today.

    Args:
        missing: weights of the model that the checkpoint lacks.
        unexpected: tensors of the checkpoint that no weight took.
        missized: the weight, its shape in the checkpoint, and its shape by the config.
    """
    left = [tensor for tensor in unexpected if not FORMER_BUFFERS.search(tensor)]
    sizes = [f"{tensor} {list(found)} in place of {list(wanted)}" for tensor, found, wanted in missized]
    parts = []
    if missing:
        parts.append(f"Missing, and would be random: {name_few(missing)}.")
    if sizes:
        parts.append(f"Of another size than config.json says: {name_few(sizes)}.")
    if left:
        parts.append(f"In the checkpoint, but taken by nothing: {name_few(left)}.")
    if parts:
        mend = f"{_mend([*missing, *left])}."
        mend += " To begin with random values there, name them in model.allow_missing." if missing else ""
        raise ModelError(f"model.name = {name!r} cannot be loaded whole as {kind}. {' '.join(parts)} {mend}")
    return [tensor for tensor in unexpected if tensor not in left]


def allowed_of(name: str, missing: Collection[str], patterns: Iterable[str]) -> set[str]:
    """Return those of the missing weights that model.allow_missing names, by exact names or by patterns as of files.

    Raises ModelError for an entry that names none of them: it is misspelt, or the checkpoint holds what it names.
    """
    found: set[str] = set()
    for pattern in patterns:
        named = {weight for weight in missing if weight == pattern or fnmatch.fnmatchcase(weight, pattern)}
        if not named:
            lacks = f"It lacks {name_few(missing)}" if missing else "It lacks nothing"
            raise ModelError(
                f"model.allow_missing names {pattern!r}, which model.name = {name!r} does not lack. {lacks}."
            )
        found |= named
    return found


def _mend(tensors: Collection[str]) -> str:
    for pattern, mend in MENDS:
        if any(re.search(pattern, tensor) for tensor in tensors):
            return mend
    if set(tensors) == {"lm_head.weight"}:
        return (
            "It was saved without its head (AutoModel): save it from AutoModelForCausalLM; if its head is the "
            "embeddings, set tie_word_embeddings: true in its config.json"
        )
    return "Its config.json and its weights do not belong together, or it was not saved whole: save or download it anew"


def name_few(tensors: Iterable[str], most: int = 4) -> str:
    """Name the first few, in order, with their number: `3 tensors (a, b, c)`."""
    names = sorted(tensors, key=lambda tensor: [(int(p) if p.isdigit() else -1, p) for p in tensor.split(".")])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({', '.join(names[:most])}{more})"


def quantisation_of(config: Mapping[str, Any], path: str = "config.json: ") -> str | None:
    """Find where a config, or one inside it, says that the weights are quantised, and how."""
    for key in QUANTISED:
        if method := config.get(key):
            for name in ("quant_method", "quant_algo", "bits"):
                if isinstance(method, dict) and name in method:
                    return f"{path}{key}.{name} = {method[name]!r}"
            return f"{path}{key}"
    inner = ((key, value) for key, value in config.items() if isinstance(value, dict))
    return next((method for key, value in inner if (method := quantisation_of(value, f"{path}{key}."))), None)


def _weight_files(name: str, folder: Path) -> list[Path]:
    """List the safetensors that a loader reads; none where the weights are elsewhere or in another format."""
    single, index = folder / SINGLE, folder / INDEX
    if not index.is_file():
        return [single] if single.is_file() else []
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"model.name = {name!r}: {INDEX} is damaged ({error!r}). Download or save it anew.") from error
    if single.is_file() and files != [SINGLE]:
        raise ModelError(
            f"model.name = {name!r} holds two checkpoints, {SINGLE} and the files of {INDEX}, and programs differ in "
            "which they read. Delete the one that is not meant."
        )
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise ModelError(
            f"model.name = {name!r}: {INDEX} names {len(files)} files, of which {len(absent)} are missing: "
            f"{', '.join(absent[:4])}. Download or save them anew."
        )
    return [folder / file for file in files]


def _header(name: str, file: Path) -> dict[str, dict[str, Any]]:
    """Read type, shape and place of each tensor of a safetensors file; check that the file is as long as it says."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(min(length, MOST_HEADER)))
            header.pop("__metadata__", None)
            wanted = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            why = f"it has {size} bytes, and its header speaks of {wanted}" if wanted != size else ""
        except (ValueError, KeyError, TypeError, AttributeError):
            header, why = {}, "it is a pointer of Git LFS" if _starts_as_pointer(file) else "its header cannot be read"
    if why:
        raise ModelError(f"model.name = {name!r}: {file.name} is no whole safetensors file ({why}). Fetch it anew.")
    return dict(header)


def _starts_as_pointer(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(POINTER)) == POINTER
