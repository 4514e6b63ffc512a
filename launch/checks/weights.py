"""Problems of a model's config.json with the rest of a run, found before a weight is read: positions, attention."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.errors import ConfigError
from opd.launch.checks.models import is_local
from opd.launch.settings.config import Config
from opd.launch.settings.problems import Problem
from opd.models.config import ModelConfig
from opd.models.description import attention_of, positions_of

_HUB_SECONDS = 5.0
_PACKAGED = {"smollm2": {"max_position_embeddings": 8192}}
"""What is known of models that are converted only once they are loaded."""
_TINY = {"model_type": "llama", "max_position_embeddings": 1024, "hidden_size": 128, "num_hidden_layers": 3}
"""The models of `tiny:` and what is trained from them. Their number is no bound: they never saw so many positions."""
_TAKES_NO_MASK = ("flash_attention_2", "flex_attention")
"""Implementations of attention that take no mask of the kind with which the embedded engine generates."""


def check_weights(config: Config, *, read: bool) -> list[Problem]:
    """Return the problems of the models' weights with the run; with `read`, of what their config.json says as well."""
    problems = _problems_of_engine(config)
    if not read:
        return problems
    others = {f"{config.spec.name}.{key}": name for key, name in config.inputs.models.items()}
    for key, name in ({"model.name": config.model.name} | others).items():
        if described := description_of(name):
            problems += _problems_of_positions(config, key, name, described)
            problems += _problems_of_attention(config.model, key, name, described)
    return problems


def description_of(name: str) -> Mapping[str, Any] | None:
    """Return what the config.json of a model says, fetched from the hub if need be; None where it cannot be read."""
    if name in _PACKAGED:
        return _PACKAGED[name]
    if name.startswith("tiny:") or name.endswith(".gguf"):
        return None
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


def _problems_of_positions(config: Config, key: str, name: str, described: Mapping[str, Any]) -> list[Problem]:
    """Return a problem where an episode may be longer than the positions that a model knows."""
    found, longest = positions_of(described), config.rollout.max_length
    if found is None or longest <= found[1] or described.items() >= _TINY.items():
        return []
    return [
        Problem(
            ("rollout.max_length", key),
            f'rollout.max_length = {longest} is more than the {found[1]} positions of {key} = "{name}" (config.json: '
            f"{found[0]}). Set rollout.max_length to {found[1]} or less, or choose a model for longer texts.",
        )
    ]


def _problems_of_attention(model: ModelConfig, key: str, name: str, described: Mapping[str, Any]) -> list[Problem]:
    try:
        attention_of(name, described, model.attention)
    except ConfigError as error:
        return [Problem(("model.attention", key), str(error))]
    return []
