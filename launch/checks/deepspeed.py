"""Problems of the user's DeepSpeed JSON: what DeepSpeed would refuse or ignore, asked of DeepSpeed itself before a run.

Its own messages come when the model is loaded, from every rank, and seldom name a setting. What can be known without
DeepSpeed (batch sizes, values that are "auto") is in `opd.backends.deepspeed_json`.
"""

from __future__ import annotations

import inspect
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from pydantic import ValidationError

from opd.backends import deepspeed_json
from opd.errors import ConfigError
from opd.launch.settings.config import Config
from opd.launch.settings.problems import Problem, did_you_mean, nearest, report, show

Finding = tuple[str, str]
"""A dotted key of the JSON (empty: all of it), and the rest of a sentence that says what is wrong there."""

_MODELS: dict[str, tuple[str, Any]] = {
    "DeepSpeedZeroConfig": ("zero_optimization", DeepSpeedZeroConfig),
    "DeepSpeedZeroOffloadParamConfig": ("zero_optimization.offload_param", DeepSpeedZeroOffloadParamConfig),
    "DeepSpeedZeroOffloadOptimizerConfig": ("zero_optimization.offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
    "DeepSpeedFP16Config": ("fp16", DeepSpeedFP16Config),
    "DeepSpeedBF16Config": ("bf16", DeepSpeedBF16Config),
}
"""The sections that DeepSpeed checks by itself: the name in its errors, the key in the JSON, and the class."""
_LISTED = ("optimizer", "scheduler", "aio", "activation_checkpointing")
"""The sections that DeepSpeed does not check: a key in them that it never reads does nothing."""
_ADAM = {"torch_adam", "adam_w_mode", "fp32_optimizer_states", "foreach"}
"""The parameters that DeepSpeed takes for Adam and AdamW beside those of their classes."""


def check_deepspeed(config: Config, *, source: str = "config") -> None:
    """Raise ConfigError with a line for each problem that DeepSpeed would find. Nothing is written."""
    if config.deepspeed is None:
        return
    dtype = deepspeed_json.dtype(config.deepspeed) or config.model.dtype
    facts = deepspeed_json.Facts(total_steps=1, ranks=1, dtype=dtype, hidden_size=1, gpu=torch.cuda.is_available())
    settings = deepspeed_json.fill(config.deepspeed, config.train, facts).settings
    found = [
        *_reading_problems(settings),
        *_precision_problems(settings),
        *_optimizer_problems(settings),
        *_scheduler_problems(settings),
        *_offload_problems(settings),
    ]
    problems = [Problem(("deepspeed",), f"{f'deepspeed.{key}'.rstrip('.')} {text}") for key, text in found]
    if problems:
        raise ConfigError(report(problems, source))


class _Watched(dict[str, Any]):
    """A dict that remembers which of its keys were read."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__({k: _Watched(v) if k in _LISTED and isinstance(v, dict) else v for k, v in data.items()})
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


def _reading_problems(settings: dict[str, Any]) -> Iterator[Finding]:
    """Yield what DeepSpeed refuses when it reads the JSON; if it accepts all, yield the keys that it never read."""
    # How many ranks there are is not its to check.
    watched = _Watched({key: value for key, value in settings.items() if key != "train_batch_size"})
    level = logging.getLogger("DeepSpeed").level
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # the run will say it
    try:
        DeepSpeedConfig(watched)
    except ValidationError as error:
        yield from _validation_problems(error)
        return
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError, KeyError, AttributeError) as error:
        yield "", f"is refused by DeepSpeed {deepspeed.__version__}: {error}"
        return
    finally:
        logging.getLogger("DeepSpeed").setLevel(level)
    sections = [("", watched), *((f"{key}.", watched[key]) for key in _LISTED if key in settings)]
    for prefix, section in sections:
        for key in section.keys() - section.asked:
            if key[:1].isalpha():  # "_comment" is how people write remarks
                known = did_you_mean(nearest(key, section.asked))
                yield f"{prefix}{key}", f"is unknown to DeepSpeed {deepspeed.__version__}. Remove it.{known}"


def _validation_problems(error: ValidationError) -> Iterator[Finding]:
    section, _ = _MODELS.get(error.title, (error.title, None))
    names = {name for _, model in _MODELS.values() for name in model.model_fields}
    for problem in error.errors():
        key = ".".join([section, *map(str, problem["loc"])])
        if problem["type"] == "extra_forbidden":
            known = did_you_mean(nearest(str(problem["loc"][-1]), names))
            yield key, f"is unknown to DeepSpeed {deepspeed.__version__}. Remove it.{known}"
        else:
            yield key, f"= {show(problem['input'])} is not possible: {problem['msg']}"


def _precision_problems(settings: dict[str, Any]) -> Iterator[Finding]:
    device = get_accelerator()
    for name, supported in (("fp16", device.is_fp16_supported), ("bf16", device.is_bf16_supported)):
        if settings.get(name, {}).get("enabled") is True and not supported():
            other = "bf16, or float32" if name == "fp16" else "fp16, or float32"
            yield f"{name}.enabled", f"= true, but DeepSpeed has no {name} on this {device.device_name()}. Use {other}."


def _optimizer_problems(settings: dict[str, Any]) -> Iterator[Finding]:
    section = settings["optimizer"]
    name, params = section.get("type"), section.get("params") or {}
    own = {choice.lower() for choice in DEEPSPEED_OPTIMIZERS}
    torchs = {each.__name__: each for each in vars(torch.optim).values() if _makes_optimizers(each)}
    if str(name).lower() not in own and name not in torchs:
        known = did_you_mean(nearest(str(name), ["AdamW", "Adam", "Lamb", "Lion", "Adagrad", "Muon", *torchs]))
        yield "optimizer.type", f"= {show(name)} is neither DeepSpeed's nor torch.optim's.{known}"
        return
    if "lr" not in params:
        yield "optimizer.params.lr", 'is missing, and the default is not train.lr. Set "lr": "auto", or a number.'
    adam = str(name).lower() in ("adam", "adamw")
    if adam:
        classes = (torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam)
        allowed = _ADAM.union(*(inspect.signature(each).parameters for each in classes))
        for key in params.keys() - allowed:
            known = did_you_mean(nearest(key, allowed))
            yield f"optimizer.params.{key}", f"is unknown to {name}. Remove it.{known}"
        params = {key: value for key, value in params.items() if key in ("lr", "betas", "eps", "weight_decay")}
    if adam or str(name).lower() not in own:
        try:
            (torch.optim.AdamW if adam else torchs[name])([torch.zeros(1)], **params)
        except (TypeError, ValueError) as error:
            yield "optimizer.params", f"= {show(params)} is refused: {error}"


def _makes_optimizers(what: object) -> bool:
    return inspect.isclass(what) and issubclass(what, torch.optim.Optimizer)


def _scheduler_problems(settings: dict[str, Any]) -> Iterator[Finding]:
    if "scheduler" not in settings:
        return
    section = settings["scheduler"]
    name, params = section.get("type"), section.get("params") or {}
    own = lr_schedules.VALID_LR_SCHEDULES
    made: Any = getattr(lr_schedules if name in own else torch.optim.lr_scheduler, str(name), None)
    if not callable(made):
        yield (
            "scheduler.type",
            f"= {show(name)} is neither DeepSpeed's ({', '.join(own)}) nor torch's. Without a scheduler "
            f"train.lr_schedule counts.{did_you_mean(nearest(str(name), own))}",
        )
        return
    build: Any = made
    try:
        build(torch.optim.AdamW([torch.zeros(1)], lr=1.0), **params)
    except (TypeError, ValueError, AssertionError) as error:
        yield "scheduler.params", f"= {show(params)} is refused: {error}"


def _offload_problems(settings: dict[str, Any]) -> Iterator[Finding]:
    """Yield the problems of an offload: the ZeRO stage has none, a library is missing, a folder cannot be written."""
    zero = settings.get("zero_optimization") or {}
    stage = deepspeed_json.stage(settings)
    for what, stages in (("optimizer", (1, 2, 3)), ("param", (3,))):
        key, device = f"zero_optimization.offload_{what}", deepspeed_json.offloads(settings, what)
        if device and stage not in stages:
            allowed = "3" if what == "param" else "1, 2 or 3"
            yield key, f"has no effect with zero_optimization.stage = {stage}. Set that to {allowed}, or remove it."
        if device == "nvme":
            if stage != 3:
                yield f"{key}.device", f"= nvme needs zero_optimization.stage = 3, not {stage}. Use cpu."
            if not deepspeed.ops.__compatible_ops__.get("async_io"):
                yield (
                    f"{key}.device",
                    "= nvme needs libaio and its headers (Debian: apt install libaio-dev; elsewhere set CFLAGS and "
                    "LDFLAGS to where they are). Use cpu.",
                )
            if problem := _why_unwritable(zero[f"offload_{what}"].get("nvme_path")):
                yield f"{key}.nvme_path", problem


def _why_unwritable(path: str | None) -> str | None:
    """Say why nothing can be written below a path that may not exist yet; return None if it can."""
    if not path:
        return "is missing: it says on which disk. Set it to a folder."
    nearest_folder = next(folder for folder in [Path(path), *Path(path).absolute().parents] if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest_folder):
            return None
    except OSError as error:
        return f'= "{path}" cannot be written ({error.strerror}). Name a folder on a local disk.'
