"""Loading a transformers model whole: each weight comes from the checkpoint, which holds nothing else.

transformers fills what a checkpoint lacks with random numbers, drops what it has no place for, and says so on the
console alone. Here that is a ModelError; `opd.models.files` words it, and checks the files beforehand.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from opd.errors import ModelError
from opd.models.files import FORMER_BUFFERS, check_taken, check_weights, name_few

logger = logging.getLogger(__name__)


def load_whole(
    name: str,
    source: str,
    dtype: torch.dtype,
    options: dict[str, Any],
    folder: Path | None = None,
    kind: Any = AutoModelForCausalLM,
) -> Any:
    """Load the model of a folder or hub id, on the CPU, with weights of type `dtype`.

    Args:
        name: what messages call it: the value of model.name.
        options: of `from_pretrained`; a `gguf_file` is dequantised.
        folder: where its safetensors lie once it is loaded; None for other formats.
        kind: the class of transformers to load it as.

    Raises:
        ModelError: it cannot be read, or weights are missing, of another size, dropped, or not the ones it will use.
    """
    if "gguf_file" in options and hasattr(transformers, "GgufConfig"):
        # Where the `kernels` package is installed, its weights would stay packed on a GPU.
        options = options | {"quantization_config": transformers.GgufConfig(dequantize=True)}
    with _hide_report() as report:
        try:
            model, found = kind.from_pretrained(
                source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except Exception as error:  # whatever the readers of damaged files raise
            rows = "".join(f"\n  {row}" for row in report[:20])
            raise ModelError(f"model.name = {name!r} cannot be loaded: {error}{rows}") from error
    if "gguf_file" in options:
        _check_gguf(model, Path(source) / options["gguf_file"], found)
    names = {key: found[f"{key}_keys"] for key in ("missing", "unexpected")}
    former = check_taken(name, type(model).__name__, **names, missized=found["mismatched_keys"])
    _check_ties(name, model)
    _log_left_out(name, model, set(former).union(check_weights(name, folder) if folder else ()))
    _forget_quantization(model)
    return model


def check_finite(name: str, model: Any) -> None:
    """Raise ModelError where a weight is nan or infinite: training from it would give no numbers."""
    bad = [
        weight
        for weight, values in model.named_parameters()
        if values.numel() and not torch.stack(values.detach().aminmax()).isfinite().all()
    ]
    if bad:
        dtype = str(model.dtype).removeprefix("torch.")
        raise ModelError(
            f"model.name = {name!r}: {name_few(bad)} hold nan or infinity. The run that saved them diverged, the file "
            f"is damaged, or they are too large for model.dtype = {dtype}. Name another checkpoint, or a wider type."
        )


@contextmanager
def _hide_report() -> Iterator[list[str]]:
    """Keep transformers' report of missing and unused tensors off the console; yield its rows."""
    rows: list[str] = []

    def passes(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "LOAD REPORT" in text:
            rows.extend(re.sub(r"\s+", " ", line) for line in text.splitlines()[2:] if re.match(r"\S+ +\||Error", line))
        return "LOAD REPORT" not in text and "tied weights mapping" not in text

    source = logging.getLogger("transformers.modeling_utils")
    source.addFilter(passes)
    try:
        yield rows
    finally:
        source.removeFilter(passes)


def _check_gguf(model: Any, file: Path, found: dict[str, set[Any]]) -> None:
    """Add to `found` what transformers does not check in a GGUF file: other sizes, and biases that nothing takes."""
    with torch.device("meta"):
        wanted = {weight: tuple(values.shape) for weight, values in type(model)(model.config).named_parameters()}
    shapes = {weight: tuple(values.shape) for weight, values in model.named_parameters()}
    found["mismatched_keys"] |= {(w, shape, wanted[w]) for w, shape in shapes.items() if shape != wanted.get(w, shape)}
    if file.is_file() and not any(weight.endswith(".bias") for weight in shapes):
        from gguf import GGUFReader  # late: an extra, without which no such file can be read

        found["unexpected_keys"] |= {t.name for t in GGUFReader(file).tensors if t.name.endswith(".bias")}


def _check_ties(name: str, model: Any) -> None:
    """Raise ModelError where the config ties two weights that differ in the checkpoint.

    transformers would use both, while vLLM, which goes by the config, would use one.
    """
    for one, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(one) is not model.get_parameter_or_buffer(other):
            raise ModelError(
                f"model.name = {name!r}: by its config.json (tie_word_embeddings) {one} is {other}, but the checkpoint "
                "holds both, and they differ. Set tie_word_embeddings: false there to use both, or delete the one."
            )


def _log_left_out(name: str, model: Any, stored: set[str]) -> None:
    """Log the tensors that the model's own class leaves out, and the weights that it allows to be missing."""
    kind, base, taken = type(model).__name__, f"{model.base_model_prefix}.", set(model.state_dict())
    vain, free = model._keys_to_ignore_on_load_unexpected, model._keys_to_ignore_on_load_missing
    others = [t for t in stored if taken.isdisjoint((t, base + t, t.removeprefix(base)))]
    if left := [tensor for tensor in others if FORMER_BUFFERS.search(tensor) or _matches(vain, tensor)]:
        level = logging.INFO if all(map(FORMER_BUFFERS.search, left)) else logging.WARNING
        logger.log(level, "model.name = %r: left out, as no part of %s: %s", name, kind, name_few(left))
    if lacking := [weight for weight in taken - stored if _matches(free, weight)]:
        logger.warning(
            "model.name = %r: by the code of %s a checkpoint need not hold %s", name, kind, name_few(lacking)
        )


def _matches(patterns: Iterable[str] | None, tensor: str) -> bool:
    return any(re.search(pattern, tensor) for pattern in patterns or ())


def _forget_quantization(model: Any) -> None:
    """Remove the mark of quantisation: a GGUF file is dequantised on loading, but its model keeps the mark."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
