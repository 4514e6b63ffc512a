"""What trains the model of a run, and what samples from it."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opd.backends import deepspeed_json
from opd.backends.base import Backend
from opd.backends.config import TrainConfig
from opd.backends.idle import IdleBackend
from opd.backends.local import LocalBackend
from opd.engines.base import RolloutEngine
from opd.engines.transformers import TransformersEngine
from opd.errors import ConfigError
from opd.launch.run.models import is_in_slices
from opd.launch.settings.config import Config
from opd.models.causal import CausalModel
from opd.models.sharding import blank_copy, fill
from opd.ranks.ranks import Ranks


def make_backend(
    config: Config, train: TrainConfig, model: CausalModel, ranks: Ranks, opened: ExitStack, *, trains: bool
) -> tuple[Backend, RolloutEngine]:
    """Make what trains the model, and what samples: the model itself, a copy if it is cut into slices, or vLLM."""
    total_steps = train.steps * train.updates_per_step
    if config.deepspeed is None and not trains:
        return IdleBackend(model), _make_engine(config, model, ranks, opened)
    if config.deepspeed is None:
        return LocalBackend(model, train, total_steps=total_steps), _make_engine(config, model, ranks, opened)
    from opd.backends.zero import ZeroBackend

    copied = is_in_slices(config) and config.rollout.engine == "transformers"
    twin = blank_copy(model, _device()) if copied else model
    settings = filled_json(config, train, model, ranks)
    backend = ZeroBackend(model, train, settings, ranks, total_steps=total_steps)
    opened.callback(backend.close)
    if not copied:
        return backend, _make_engine(config, model, ranks, opened)
    fill(twin, model)
    return backend, TransformersEngine(twin, refresh=partial(fill, twin, model))


def _make_engine(config: Config, model: CausalModel, ranks: Ranks, opened: ExitStack) -> RolloutEngine:
    """Make what generates, for a model that is whole or an engine that keeps its own copy. vLLM is imported late."""
    engine: RolloutEngine
    if config.rollout.engine == "transformers":
        return TransformersEngine(model)
    if config.rollout.engine == "vllm_server":
        from opd.launch.run.servers import server_engine

        engine = server_engine(config, model, ranks)
    else:
        from opd.engines.vllm import VllmEngine

        engine = VllmEngine(model, config.rollout.vllm, config.rollout.limits)
    opened.callback(engine.close)
    return engine


def filled_json(config: Config, train: TrainConfig, model: CausalModel, ranks: Ranks) -> dict[str, Any]:
    """Return the DeepSpeed settings with every "auto" filled in. Raises ConfigError if that cannot be done."""
    assert config.deepspeed is not None
    facts = deepspeed_json.Facts(
        total_steps=train.steps * train.updates_per_step,
        ranks=ranks.world_size,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        hidden_size=getattr(model.config, "hidden_size", None),
        gpu=_device().type == "cuda",
        nvcc=_has_nvcc(),
    )
    try:
        return deepspeed_json.fill(config.deepspeed, train, facts).settings
    except ValueError as error:
        raise ConfigError(f"deepspeed: {error}") from error


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _has_nvcc() -> bool:
    """True: CUDA's compiler is where torch would look for it. False: it is missing, though the folder may be there."""
    if _device().type != "cuda":
        return False
    from torch.utils.cpp_extension import CUDA_HOME

    return CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").is_file()
