"""Loading a transformers model whole: each weight comes from the checkpoint, which holds nothing else.

transformers fills what a checkpoint lacks with random numbers, drops what it has no place for, and says so on the
console alone. Here that is a ModelError; `opd.models.files` words it, and checks the files beforehand. What
their headers tell is compared in the same way before anything is loaded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from opd.errors import ModelError
from opd.models.bars import no_bars
from opd.models.files import FORMER_BUFFERS, allowed_of, check_taken, check_weights, name_few
from opd.models.quantised import ask_for_floats, moved_into_plain, unwarned

logger = logging.getLogger(__name__)


def load_whole(
    name: str,
    source: str,
    dtype: torch.dtype,
    options: dict[str, Any],
    folder: Path | None = None,
    kind: Any = AutoModelForCausalLM,
    *,
    dequantize: bool = False,
    allow_missing: Sequence[str] = (),
) -> Any:
    """Load the model of a folder or hub id, on the CPU, with weights of type `dtype`.

    Args:
        name: what messages call it: the value of model.name.
        options: of `from_pretrained`; a `gguf_file` is dequantised.
        folder: where its safetensors lie once it is loaded; None for other formats.
        kind: the class of transformers to load it as.
        dequantize: its weights are quantised, and are to be plain floats; `options` hold its config.
        allow_missing: names or patterns of weights that may be missing, and begin at random, by torch's last seed.

    Raises ModelError: it cannot be read, or weights are missing, of another size, dropped, or not those it will use.
    """
    if "gguf_file" in options and hasattr(transformers, "GgufConfig"):
        # Where the `kernels` package is installed, its weights would stay packed on a GPU.
        options = options | {"quantization_config": transformers.GgufConfig(dequantize=True)}
    reader = _read_floats if dequantize else _read_plain
    with _reproducible() if allow_missing else nullcontext():
        model, found = _read(name, lambda: reader(kind, source, dtype, options))
    if "gguf_file" in options:
        _check_gguf(model, Path(source) / options["gguf_file"], found)
    former = _check_found(name, type(model).__name__, found, allow_missing)
    _check_ties(name, model)
    _log_left_out(name, model, {*former, *(check_weights(name, folder, dequantize=dequantize) if folder else ())})
    _forget_quantization(model)
    return model


def compare_whole(
    name: str,
    config: Any,
    tensors: Mapping[str, Mapping[str, Any]],
    composite: Any = None,
    *,
    allow_missing: Sequence[str] = (),
) -> str | None:
    """Compare the tensors of a checkpoint with the model of a config, as loading does, without reading a weight.

    Args:
        config: of transformers, as AutoConfig reads it.
        tensors: type and shape of each tensor by name, as `opd.models.files.tensors_of` returns them.
        composite: the class of a model of several parts; None for a plain language model.

    Returns:
        The class of the model; None where only loading can tell, since a repository's own code makes it.

    Raises ModelError as `load_whole` would.
    """
    if composite is None and type(config) not in AutoModelForCausalLM._model_mapping:
        return None
    kind: Any = composite or AutoModelForCausalLM._model_mapping[type(config)]
    blank = {tensor: torch.empty(tuple(entry["shape"]), device="meta") for tensor, entry in tensors.items()}

    def read() -> tuple[Any, dict[str, set[Any]]]:
        return kind.from_pretrained(  # type: ignore[no-any-return]
            None,
            config=config,
            state_dict=blank,
            dtype=torch.float32,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )

    _, found = _read(name, read)
    _check_found(name, kind.__name__, found, allow_missing, tell=False)
    return str(kind.__name__)


def _read(name: str, read: Callable[[], tuple[Any, dict[str, set[Any]]]]) -> tuple[Any, dict[str, set[Any]]]:
    """Return a model and what transformers found about its tensors. Raises ModelError for whatever goes wrong."""
    with no_bars(), _hide_report() as report:
        try:
            return read()
        except Exception as error:  # whatever the readers of damaged files raise
            rows = "".join(f"\n  {row}" for row in report[:20])
            raise ModelError(f"model.name = {name!r} cannot be loaded: {error}{rows}") from error


def _read_plain(kind: Any, source: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, dict[str, set[Any]]]:
    return kind.from_pretrained(  # type: ignore[no-any-return]
        source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )


def _read_floats(
    kind: Any, source: str, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[Any, dict[str, set[Any]]]:
    """Read quantised weights as plain floats, unless they are not whole."""
    ask_for_floats(options["config"])
    with unwarned():
        model, found = _read_plain(kind, source, dtype, options)
        if found["unexpected_keys"] or found["mismatched_keys"]:
            return model, found
        plain, left = moved_into_plain(model, dtype, options)
    return plain, {key: found[key] | left[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}


def _check_found(
    name: str, kind: str, found: Mapping[str, set[Any]], allow_missing: Sequence[str], *, tell: bool = True
) -> list[str]:
    """Check what transformers found; return the tensors that are left out, as `check_taken` does."""
    allowed = allowed_of(name, found["missing_keys"], allow_missing)
    former = check_taken(
        name,
        kind,
        missing=set(found["missing_keys"]) - allowed,
        unexpected=found["unexpected_keys"],
        missized=found["mismatched_keys"],
    )
    if allowed and tell:
        logger.warning("model.name = %r: random, as model.allow_missing has it: %s", name, name_few(allowed))
    return former


@contextmanager
def _reproducible() -> Iterator[None]:
    """Draw random weights by the seed that was set last, whatever was drawn since, and leave the generator as it is."""
    seed = torch.initial_seed()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def not_finite(model: Any) -> list[str]:
    """Name the weights that hold nan or infinity, in the order of the model."""
    return [
        weight
        for weight, values in model.named_parameters()
        if values.numel() and not torch.stack(values.detach().aminmax()).isfinite().all()
    ]


def check_finite(name: str, model: Any) -> None:
    """Raise ModelError where a weight is nan or infinite: training from it would give no numbers."""
    if bad := not_finite(model):
        dtype = str(model.dtype).removeprefix("torch.")
        raise ModelError(
            f"model.name = {name!r}: {name_few(bad)} hold nan or infinity. The run that saved them diverged, the file "
            f"is damaged, or they are too large for model.dtype = {dtype}. Name another checkpoint, or a wider type."
        )


def holding_none(bad: Sequence[str]) -> str:
    """Say of these weights, at least one, that they hold nan or infinity."""
    more = f" and {len(bad) - 1} more weights hold" if len(bad) > 1 else " holds"
    return f"{bad[0]}{more} nan or infinity"


def why_not_finite(who: str, model: Any, version: int) -> str:
    """Say why `who` gives no finite numbers with the weights that have seen `version` steps, and what helps."""
    bad = not_finite(model)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    cause = holding_none(bad) if bad else f"all its weights are finite, so that {dtype} overflows"
    when = f"after step {version}" if version else "as it was loaded"
    mends = [*(["a lower train.lr"] if version else []), *(["model.dtype: float32"] if dtype != "float32" else [])]
    return (
        f"{who} gives no finite log-probs {when}: {cause}. Nothing can be sampled or learned from that. What may help: "
        f"{', '.join([*mends, 'another checkpoint'])}"
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
