"""Writes a model as a Hugging Face folder, and reads it back: what was trained, and beside it what the base held.

The generation settings and the tokenizer are the base's own files, byte for byte: written anew, they differ in what
`generate()` does and in how text is cut. The dropout that is off while training stands in the config as in the base's.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from opd.errors import ModelError
from opd.models.bars import no_bars
from opd.models.description import with_dropouts
from opd.models.files import name_few, tensors_of
from opd.models.multimodal import Carried, attention_option, complete, processor_files
from opd.models.sharding import is_sharded
from opd.models.tokenizers import read_tokenizer
from opd.models.whole import load_whole

logger = logging.getLogger(__name__)

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.tiktoken", "spiece.model", "sentencepiece*.model", "tekken.json", "chat_template*",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
"""Patterns of the files by which a tokenizer and its chat templates are described."""
MOST_BYTES = 4 * 2**30
"""A larger model is not loaded a second time beside itself."""
TEXT = "The quick brown fox jumps over 13 lazy dogs,\n\tand «naïve» 東京 follows.  "
TOLERANCE = 1e-4
"""Nats by which a log-prob of the export may differ from the model's."""
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "U8": "uint8",
          "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Base:
    """What a model was loaded from, as far as its export has to hold it again."""

    folder: Path | None = None
    """Where the files of a folder or a hub's snapshot lie; None: there are none (GGUF)."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """The tokenizer that was read from there."""
    dropouts: Mapping[str, float] = field(default_factory=dict)
    """The dropout of its config, which is off while training."""
    trust_remote_code: bool = False
    carried: Carried | None = None
    """What a composite checkpoint holds beside its language model; None for a plain language model."""


def write_export(model: Any, tokenizer: PreTrainedTokenizerBase, base: Base, folder: Path) -> None:
    """Write a transformers model with its tokenizer into `folder`, or where that links to, and load it back.

    Adapters are merged into a copy. What stood there before stays until the new export is whole.

    Raises ModelError where what was written is not the model.
    """
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    folder = Path(os.path.realpath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    saved = copy.copy(model)  # its weights are the model's own
    saved.generation_config = GenerationConfig()  # valid, while transformers refuses to write what many bases hold
    try:
        with no_bars():
            saved.save_pretrained(aside)
        (aside / GENERATION).unlink(missing_ok=True)
        if base.carried is not None:
            complete(aside, base.carried)
        _write_beside(model, tokenizer, base, aside)
        check_written(model, tokenizer, base, aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # it may have filled the disk
        raise
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def try_export(name: str, model: Any, tokenizer: PreTrainedTokenizerBase, base: Base) -> None:
    """Write all of an export but its weights, and read it back: what fails there would fail after hours of training.

    Args:
        name: what messages call the model: the value of model.name.

    Raises:
        ModelError: it cannot be written, or its tokenizer is another one when it is read.
    """
    with tempfile.TemporaryDirectory(prefix="opd-export-") as made:
        try:
            model.config.save_pretrained(made)
            _write_beside(model, tokenizer, base, Path(made))
            AutoConfig.from_pretrained(made, trust_remote_code=base.trust_remote_code)
            _check_tokenizer(tokenizer, base, Path(made))
        except Exception as error:  # whatever transformers, a tokenizer or a model's own code raises
            raise ModelError(
                f"model.name = {name!r} could be trained, but not exported: {error}. Mend its config.json or its "
                "tokenizer, or name another model."
            ) from error


def _write_beside(model: Any, tokenizer: PreTrainedTokenizerBase, base: Base, folder: Path) -> None:
    """Write what stands beside the weights: generation settings, tokenizer, and the dropout into the config."""
    own = None if base.folder is None else base.folder / GENERATION
    if own is not None and own.is_file():
        shutil.copyfile(own, folder / GENERATION)
    elif getattr(model, "generation_config", None) is not None:
        model.generation_config.to_json_file(folder / GENERATION)  # unlike `save_pretrained`, it refuses nothing
    if files := _tokenizer_files(tokenizer, base):
        for file in files:
            target = folder / file.relative_to(base.folder or "")
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    else:
        tokenizer.save_pretrained(folder)
    for file in processor_files(base.carried.folder) if base.carried is not None else ():
        shutil.copyfile(file, folder / file.name)
    if base.dropouts:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with_dropouts(config, base.dropouts)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tokenizer_files(tokenizer: PreTrainedTokenizerBase, base: Base) -> list[Path]:
    """Return the base's files of its tokenizer; none where it has no folder, or another tokenizer took its place."""
    if base.folder is None or base.tokenizer is not tokenizer:
        return []
    found = {file for pattern in TOKENIZER_FILES for file in base.folder.glob(pattern) if file.is_file()}
    settings = base.folder / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in json.loads(settings.read_text(encoding="utf-8")):
        found |= set(base.folder.glob("*.py"))  # the tokenizer is code, which may import more of it
    return sorted(found)


# -- reading it back ----------------------------------------------------------------------------------


def check_written(model: Any, tokenizer: PreTrainedTokenizerBase, base: Base, folder: Path) -> None:
    """Compare an export with its model: each tensor's name, shape and type, the tokenizer, and some log-probs.

    Raises ModelError that names what differs.
    """
    try:
        _check_tensors(model, base, folder)
        _check_tokenizer(tokenizer, base, folder)
        _check_log_probs(model, tokenizer, base, folder)
    except ModelError as error:
        raise ModelError(
            f"what was exported is not the model that was trained: {error} It lies in {folder}; the weights are also "
            "in the run's checkpoints."
        ) from error


def _check_tensors(model: Any, base: Base, folder: Path) -> None:
    """Compare the headers of an export's files with the model's weights, as transformers names them on disk, and with
    what was carried."""
    written = {
        name: (str(DTYPES.get(e["dtype"])), tuple(e["shape"])) for name, e in tensors_of("export", folder).items()
    }
    blank = {name: torch.empty_like(weight, device="meta") for name, weight in model.state_dict().items()}
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    kept = {name: weight for name, weight in blank.items() if name not in tied and name not in ignored}
    wanted = {
        name: (str(weight.dtype).removeprefix("torch."), tuple(weight.shape))
        for name, weight in revert_weight_conversion(model, kept).items()
    }
    if base.carried is not None:
        for tensor, entry in base.carried.tensors.items():
            wanted[tensor] = (str(DTYPES.get(entry["dtype"])), tuple(entry["shape"]))
        wanted |= {one: wanted[other] for one, other in base.carried.tied.items()}
    for what, names in (
        ("lacks", wanted.keys() - written.keys()),
        ("has too much", written.keys() - wanted.keys()),
        ("has another shape or type of", {n for n in wanted.keys() & written.keys() if wanted[n] != written[n]}),
    ):
        if names:
            raise ModelError(f"it {what} {name_few(names)}.")


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, base: Base, folder: Path) -> None:
    again = read_tokenizer(str(folder), trust_remote_code=base.trust_remote_code)
    if len(again) != len(tokenizer) or _ids(again) != _ids(tokenizer):
        raise ModelError("its tokenizer cuts text in another way.")
    if again.chat_template != tokenizer.chat_template:
        raise ModelError("its tokenizer has another chat template.")


def _check_log_probs(model: Any, tokenizer: PreTrainedTokenizerBase, base: Base, folder: Path) -> None:
    """Load an export beside its model, where there is room, and compare the log-probs of a short text."""
    if why := _no_room(model):
        logger.info("the export's log-probs are not compared with the model's: %s", why)
        return
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    options: dict[str, Any] = {
        "trust_remote_code": base.trust_remote_code,
        "attn_implementation": attention_option(model.config, attention),
    }
    kind = AutoModelForCausalLM if base.carried is None else type(model)
    with torch.random.fork_rng(devices=[]):
        again = load_whole("export", str(folder), model.dtype, options, folder, kind).to(model.device).eval()
    ids = torch.tensor([_ids(tokenizer)[:32] or [0]], device=model.device)
    found, wanted = _log_probs(again, ids), _log_probs(model, ids)
    same = (found == wanted) | (found.isnan() & wanted.isnan())  # what diverged is exported as it is
    gap = (found - wanted).masked_fill(same, 0.0).abs().max().item()
    if not gap <= TOLERANCE:
        raise ModelError(f"loaded again, its log-probs of a short text differ by {gap:.3g} nats.")


def _no_room(model: Any) -> str | None:
    """Say why a model is not loaded a second time; None where it can be."""
    weights = list(model.parameters())
    if any(is_sharded(weight) or weight.is_meta for weight in weights):
        return "no rank holds it whole"
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    room = MOST_BYTES
    if model.device.type == "cuda":
        room = min(room, torch.cuda.mem_get_info(model.device)[0] // 2)
    return f"it has {size} bytes, and there is room for {room}" if size > room else None


@torch.no_grad()
def _log_probs(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)  # type: ignore[no-any-return]


def _ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer.encode(TEXT))
