"""Problems of a model's config.json with the rest of a run, found before a weight is read: positions, attention."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.episodes.config import RolloutConfig
from opd.errors import ConfigError
from opd.launch.checks.models import is_local
from opd.launch.settings.config import Config
from opd.launch.settings.problems import Problem
from opd.models.config import ModelConfig
from opd.models.description import attention_of, positions_of
from opd.models.files import quantisation_of
from opd.models.gguf import positions_of_gguf
from opd.models.layers import NOT_EMBEDDED, USE_VLLM, reach_of

_HUB_SECONDS = 5.0
_PACKAGED = {"smollm2": {"max_position_embeddings": 8192}}
"""What is known of models that are converted only once they are loaded."""
_TAKES_NO_MASK = ("flash_attention_2", "flex_attention")
"""Implementations of attention that take no mask of the kind with which the embedded engine generates."""


def check_weights(config: Config, *, read: bool) -> list[Problem]:
    """Return the problems of the models' weights with the run; with `read`, of what their config.json says as well."""
    problems = _problems_of_engine(config)
    if not read:
        return problems
    for key, name in _models(config).items():
        if described := description_of(name):
            problems += problems_of_positions(config.rollout.max_length, key, name, described)
            problems += _problems_of_attention(config.model, key, name, described)
    return problems + _problems_of_layers(config)


def check_served(model: ModelConfig, rollout: RolloutConfig) -> list[Problem]:
    """Return the problems of a model that `opd serve` is to serve: episodes too long for it, and packed weights."""
    problems = []
    if described := description_of(model.name):
        problems = problems_of_positions(rollout.max_length, "model.name", model.name, described)
    for key in ("dequantize", "allow_missing"):
        if getattr(model, key):
            text = f"model.{key} has no effect on vLLM, which serves what it reads. Serve an export of the model."
            problems.append(Problem((f"model.{key}",), text))
    return problems


def settings_of(config: Config, name: str) -> ModelConfig:
    """Return the settings of the model under another name of the run: its own, another's, or that of an export.

    Only where it is quantised is it dequantised; where none of the run's models is, what loads it refuses the setting.
    Only the model of `model.name` may lack weights.
    """
    model = config.model
    changes: dict[str, Any] = {"name": name}
    if name != model.name:
        changes["allow_missing"] = []
    if model.dequantize and not is_quantised(name):
        changes["dequantize"] = not any(map(is_quantised, _models(config).values()))
    return model.model_copy(update=changes)


def is_quantised(name: str) -> bool:
    """True if the config.json of a model says that its weights are quantised."""
    described = description_of(name)
    return described is not None and quantisation_of(described) is not None


def _models(config: Config) -> dict[str, str]:
    """Return the names of the models that a run loads or asks, by the setting that names each."""
    others = {f"{config.spec.name}.{key}": name for key, name in config.inputs.models.items()}
    return {"model.name": config.model.name} | others


def description_of(name: str) -> Mapping[str, Any] | None:
    """Return what the config.json of a model says, fetched from the hub if need be; None where it cannot be read.

    Of a GGUF file it is how many positions the model knows.
    """
    if name in _PACKAGED:
        return _PACKAGED[name]
    if name.startswith("tiny:"):
        return None
    if name.endswith(".gguf"):
        found = positions_of_gguf(Path(name).expanduser())
        return None if found is None else {"max_position_embeddings": found[1]}
    try:
        file = Path(name).expanduser() / "config.json" if is_local(name) else _fetched(name)
        data = json.loads(file.read_text(encoding="utf-8"))
    except Exception:  # whatever the network throws; what is wrong with the file is said where the model is loaded
        return None
    return data if isinstance(data, dict) else None


def _fetched(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, "config.json", etag_timeout=_HUB_SECONDS))


def _problems_of_engine(config: Config) -> list[Problem]:
    attention = config.model.attention
    if config.rollout.engine != "transformers" or attention not in _TAKES_NO_MASK:
        return []
    return [
        Problem(
            ("model.attention", "rollout.engine"),
            f"model.attention = {attention} does not work with rollout.engine = transformers, which generates under "
            "a mask that it does not take. Choose auto, eager or sdpa, or rollout.engine: vllm.",
        )
    ]


def _problems_of_layers(config: Config) -> list[Problem]:
    """Return a problem where the embedded engine is to generate with layers that it cannot run row by row."""
    name = config.model.name
    if config.rollout.engine != "transformers" or not (described := description_of(name)):
        return []
    try:
        reach_of(described)
    except ValueError as error:
        text = f'{NOT_EMBEDDED} model.name = "{name}" (config.json): {error}. {USE_VLLM}'
        return [Problem(("rollout.engine", "model.name"), text)]
    return []


def problems_of_positions(longest: int, key: str, name: str, described: Mapping[str, Any]) -> list[Problem]:
    """Return a problem where rollout.max_length, `longest`, is more than the positions that a model knows."""
    found = positions_of(described)
    if found is None or longest <= found[1]:
        return []
    where = f"config.json: {found[0]}" if not name.endswith(".gguf") else "context_length of its header"
    return [
        Problem(
            ("rollout.max_length", key),
            f'rollout.max_length = {longest} is more than the {found[1]} positions of {key} = "{name}" ({where}). '
            f"Set rollout.max_length to {found[1]} or less, or choose a model for longer texts.",
        )
    ]


def _problems_of_attention(model: ModelConfig, key: str, name: str, described: Mapping[str, Any]) -> list[Problem]:
    try:
        attention_of(name, described, model.attention)
    except ConfigError as error:
        return [Problem(("model.attention", key), str(error))]
    return []
