"""Reading the user's own DeepSpeed JSON, and filling its "auto" values from the run's settings. No torch here.

Numbers that stand in the JSON are kept, also where a setting of ours says something else (the plan shows which of
the two counts). Two things are ours alone. Batch sizes and accumulation are, since the token budget decides how many
sequences fit a micro-batch, another number at each step. And clipping is always written down: DeepSpeed clips at 1.0
where its JSON is silent.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opd.backends.config import TrainConfig

READY = Path(__file__).resolve().parent
AUTO = "auto"
_MOST_CHARACTERS = 1_000_000

_OURS = {
    "train_batch_size": "train.tasks_per_step times rollout.group_size is the number of episodes in a step",
    "train_micro_batch_size_per_gpu": "train.tokens_per_microbatch bounds a micro-batch",
    "gradient_accumulation_steps": "a step has as many micro-batches as train.tokens_per_microbatch makes of it",
}
_REFUSED = {
    "tensor_parallel": "only data parallelism is supported",
    "sequence_parallel_size": "only data parallelism is supported",
    "pipeline": "only data parallelism is supported",
    "curriculum_learning": "tasks come from the environment",
    "data_efficiency": "tasks come from the environment",
    "managed_gradient_accumulation": "the run says itself where a step ends",
    "autotuning": "it would choose batch sizes",
}
_REFUSED_ZERO = {
    "mics_shard_size": "weights are cut over all ranks",
    "zenflow": "the teacher and the engine need every update when it is made",
}


def ready() -> dict[str, Path]:
    """The JSON files that come with the package, by the name that `deepspeed:` takes."""
    return {path.stem: path for path in sorted(READY.glob("*.json"))}


def read(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """Read the JSON from a path or a ready file's name, or take the object itself.

    Raises ValueError, with the mend, where it is none of these, or decides what only our settings decide.
    """
    if isinstance(value, str):
        value = _read_file(value)
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{value!r} is neither a JSON file's name nor an object; allowed are also {', '.join(ready())}"
        )
    given = {key: own for key, own in value.items() if own is not None}
    _check(given)
    return given


def _read_file(name: str) -> Mapping[str, Any]:
    path = ready().get(name) or Path(os.path.expanduser(name))
    try:
        if path.exists() and not path.is_file():  # a folder, or a device or pipe, which may never end
            raise ValueError(f"{name!r} is no file. Name a DeepSpeed JSON file, or one of {', '.join(ready())}")
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS)
    except OSError as error:
        raise ValueError(
            f"{name!r} cannot be read ({error.strerror}). Name a DeepSpeed JSON file, or one of {', '.join(ready())}"
        ) from error
    try:
        data = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name!r} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{name!r} holds {type(data).__name__}, but a DeepSpeed JSON holds an object")
    return data


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} stands there twice")
        found[key] = value
    return found


def _check(data: Mapping[str, Any]) -> None:
    for key, what in _OURS.items():
        if data.get(key, AUTO) != AUTO:
            raise ValueError(
                f'{key} = {data[key]!r} must be "auto" or absent: {what}. Remove it; lower train.tokens_per_microbatch '
                "if a micro-batch does not fit"
            )
    for section in ("zero_optimization", "optimizer", "scheduler", "bf16", "fp16"):
        if not isinstance(data.get(section, {}), Mapping):
            raise ValueError(f"{section} = {data[section]!r} must be an object")
    clip = data.get("gradient_clipping", AUTO)
    if clip != AUTO and not (isinstance(clip, int | float) and clip >= 0):
        raise ValueError(
            f'gradient_clipping = {_show(clip)} must be "auto", absent, or a number of at least 0 (0: off)'
        )
    if stage(data) not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage = {stage(data)!r} must be 0, 1, 2 or 3")
    _check_supported(data)
    for name, example in (("optimizer", "AdamW"), ("scheduler", "WarmupLR")):
        _check_made(name, data.get(name), example)
    for name in ("bf16", "fp16"):
        if _enabled(data, name) not in (True, False, AUTO):
            raise ValueError(f'{name}.enabled = {_enabled(data, name)!r} must be true, false or "auto"')
    if _enabled(data, "bf16") is True and _enabled(data, "fp16") is True:
        raise ValueError("bf16.enabled and fp16.enabled are both true; choose one")


def _check_supported(data: Mapping[str, Any]) -> None:
    zero = data.get("zero_optimization", {})
    for path, value, why in (
        *((key, data.get(key), why) for key, why in _REFUSED.items()),
        *((f"zero_optimization.{key}", zero.get(key), why) for key, why in _REFUSED_ZERO.items()),
    ):
        off = value in (None, False, -1) or (isinstance(value, Mapping) and value.get("enabled") is False)
        if not off:
            raise ValueError(f"{path} is not supported: {why}. Remove it")
    if zero.get("compute_grad_norm", True) is not True:
        raise ValueError(
            "zero_optimization.compute_grad_norm is not supported: without the norm nobody sees that a gradient is not "
            "finite. Remove it"
        )
    operation = data.get("gradient_allreduce_op", "average")
    if operation != "average":
        raise ValueError(
            f"gradient_allreduce_op = {operation!r} is not supported: the run undoes an average. Remove it"
        )


def _check_made(name: str, section: Mapping[str, Any] | None, example: str) -> None:
    """Check `optimizer` or `scheduler`, which DeepSpeed makes from a name and parameters."""
    if section is None:
        return
    if not isinstance(section.get("type"), str):
        raise ValueError(f'{name}.type = {_show(section.get("type"))} must be a name, such as "{example}"')
    if not isinstance(section.get("params", {}), Mapping):
        raise ValueError(f"{name}.params = {_show(section['params'])} must be an object")


def stage(data: Mapping[str, Any]) -> Any:
    """The ZeRO stage; 0 where the JSON does not say."""
    return data.get("zero_optimization", {}).get("stage", 0)


def _enabled(data: Mapping[str, Any], name: str) -> Any:
    return data.get(name, {}).get("enabled", AUTO)


def dtype(data: Mapping[str, Any]) -> str | None:
    """The type of the weights that the JSON asks for; None where it leaves that to `model.dtype`."""
    for name, result in (("bf16", "bfloat16"), ("fp16", "float16")):
        if _enabled(data, name) is True:
            return result
    return None


def offloads(data: Mapping[str, Any], what: str) -> str | None:
    """The place to which `optimizer` or `param` is offloaded: cpu, nvme, or None."""
    device = (data.get("zero_optimization", {}).get(f"offload_{what}") or {}).get("device")
    return device if device in ("cpu", "nvme") else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Facts of a run, beside its settings of training, from which an "auto" is filled."""

    total_steps: int
    """Optimiser updates of the whole run."""
    ranks: int
    dtype: str
    """The type of the weights, as the model is loaded."""
    hidden_size: int | None
    """The model's width, which gives the buckets of ZeRO-3, as in transformers; None where it is not known yet, so that
    DeepSpeed chooses them."""
    gpu: bool
    nvcc: bool = True
    """True if CUDA's compiler is there: DeepSpeed needs it for its own Adam on a GPU."""


@dataclass(slots=True)
class Filled:
    """A JSON that DeepSpeed takes, and notes of the decisions that led to it."""

    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """One text for each decision, such as `gradient_clipping = 1.0 (train.max_grad_norm)`."""

    def put(self, path: str, value: Any, why: str, *, absent: bool = False) -> None:
        """Fill in one value where it is "auto" (with `absent`, also where it is missing), and note it.

        A value of the user's that differs is kept, and noted as well.
        """
        *sections, key = path.split(".")
        place = self.settings
        for section in sections:
            place = place.setdefault(section, {})
        if place.get(key, AUTO if absent else None) == AUTO:
            place[key] = value
            self.notes.append(f"{path} = {_show(value)} ({why})")
        elif key in place and place[key] != value:
            self.notes.append(f"{path} = {_show(place[key])} (as your JSON says; {why}: {_show(value)} is not used)")


def fill(data: Mapping[str, Any], train: TrainConfig, facts: Facts) -> Filled:
    """Fill in every "auto", and what must always be said; touch nothing else.

    Raises ValueError for an "auto" whose value is not known.
    """
    filled = Filled(copy.deepcopy(dict(data)))
    settings = filled.settings
    settings |= {"train_batch_size": facts.ranks, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    filled.put("gradient_clipping", train.max_grad_norm, "train.max_grad_norm", absent=True)
    for section, own in (("bf16", "bfloat16"), ("fp16", "float16")):
        if section in settings or facts.dtype == own:
            filled.put(f"{section}.enabled", facts.dtype == own, f"weights are {facts.dtype}", absent=True)
    if facts.dtype == "bfloat16":
        # Without it DeepSpeed takes a step by a gradient that is not finite.
        settings["bf16"].setdefault("check_grad_overflow", True)
    _fill_optimizer(filled, train, facts)
    if "scheduler" in settings:
        _fill_scheduler(filled, train, facts.total_steps)
    _fill_buckets(filled, facts.hidden_size)
    if left := list(_autos(settings)):
        raise ValueError(f'{", ".join(left)} cannot be "auto": no setting of the run says what to put there')
    return filled


def _fill_optimizer(filled: Filled, train: TrainConfig, facts: Facts) -> None:
    own = "optimizer" not in filled.settings
    known = {"lr": train.lr, "betas": list(train.betas), "weight_decay": train.weight_decay}
    filled.settings.setdefault("optimizer", {"type": "AdamW"})
    for key, value in known.items():
        filled.put(f"optimizer.params.{key}", value, f"train.{key}", absent=own)
    filled.put("optimizer.params.eps", 1e-8, "as everywhere", absent=own)
    optimizer = filled.settings["optimizer"]
    # DeepSpeed's own must be compiled: without a GPU that gains nothing, with one it needs nvcc. Offloaded, it is a
    # third one, for the CPU beside the GPU.
    plain = not facts.gpu or (not facts.nvcc and not offloads(filled.settings, "optimizer"))
    if plain and str(optimizer.get("type", "")).lower() in ("adam", "adamw"):
        optimizer["params"].setdefault("torch_adam", True)


def _fill_scheduler(filled: Filled, train: TrainConfig, total_steps: int) -> None:
    filled.put("scheduler.params.warmup_min_lr", 0, "where a warm-up starts")
    filled.put("scheduler.params.warmup_max_lr", train.lr, "train.lr")
    # DeepSpeed knows no schedule without a warm-up.
    filled.put("scheduler.params.warmup_num_steps", max(1, train.warmup_steps), "train.warmup_steps")
    filled.put("scheduler.params.total_num_steps", total_steps, "train.steps")


def _fill_buckets(filled: Filled, hidden_size: int | None) -> None:
    zero = filled.settings.get("zero_optimization", {})
    square = (hidden_size or 0) ** 2
    sizes = {
        "reduce_bucket_size": square,
        "stage3_prefetch_bucket_size": int(0.9 * square),
        "stage3_param_persistence_threshold": 10 * (hidden_size or 0),
    }
    for key in [key for key in sizes if zero.get(key) == AUTO]:
        if hidden_size is None:
            del zero[key]
        else:
            filled.put(f"zero_optimization.{key}", sizes[key], f"the model is {hidden_size} wide")


def _autos(data: Any, path: str = "") -> Iterator[str]:
    """List the places of "auto"."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _autos(value, f"{path}.{key}" if path else str(key))
    elif data == AUTO:
        yield path


def _show(value: Any) -> str:
    return json.dumps(value)


def reading(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make settings without "auto" for a model that does not train, cut into slices as the one that trains."""
    zero = {key: value for key, value in settings["zero_optimization"].items() if key != "offload_optimizer"}
    kept = {key: settings[key] for key in ("bf16", "fp16") if key in settings}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **kept}
