"""Problems of the backend: `backend`, `deepspeed`, `model.dtype` and the teacher's weights do not fit together."""

from __future__ import annotations

from typing import Any

from opd.backends import deepspeed_json
from opd.launch.checks.packages import is_installed
from opd.launch.settings.config import Config
from opd.launch.settings.problems import Problem


def check_backend(config: Config) -> list[Problem]:
    """Return the problems of `backend`, `deepspeed` and `model.dtype` together."""
    data = config.deepspeed
    if config.backend == "local":
        if data is None:
            return []
        text = "deepspeed has no effect with backend = local. Set backend: deepspeed, or remove it."
        return [Problem(("deepspeed", "backend"), text)]
    problems = []
    if not is_installed("deepspeed"):
        text = "backend = deepspeed needs DeepSpeed: pip install 'opd[deepspeed]'"
        problems.append(Problem(("backend",), text))
    if data is None:
        text = (
            f"backend = deepspeed needs your DeepSpeed JSON: deepspeed: FILE.json, or one of "
            f"{', '.join(deepspeed_json.ready())}."
        )
        return [*problems, Problem(("deepspeed", "backend"), text)]
    wanted, given = deepspeed_json.dtype(data), config.model.dtype
    if wanted is not None and given not in ("auto", wanted):
        section = {"bfloat16": "bf16", "float16": "fp16"}[wanted]
        text = f'model.dtype = {given}, but deepspeed.{section}.enabled is true. Set that to "auto", or change the one.'
        problems.append(Problem(("model.dtype", "deepspeed"), text))
    problems += _problems_of_auto(config, data) + _problems_of_own_weights(config, data)
    if given == "float64":
        text = "model.dtype = float64 is not known to DeepSpeed. Use float32, or backend: local."
        problems.append(Problem(("model.dtype", "backend"), text))
    return problems


def _problems_of_own_weights(config: Config, data: dict[str, Any]) -> list[Problem]:
    """Return a problem for each key of the JSON that forbids a teacher with weights of its own.

    Such a teacher's slices take the place of the student's, which cannot be done where these are on a disk, held twice
    or quantised.
    """
    teachers = [stage.teacher.weights for stage in config.stages if stage.listens]
    own = next((weights for weights in teachers if weights not in ("live", "external")), None)
    if own is None:
        return []
    zero = data.get("zero_optimization") or {}
    problems = []
    for key, bad in (
        ("offload_param.device = nvme", deepspeed_json.offloads(data, "param") == "nvme"),
        ("zero_hpz_partition_size", zero.get("zero_hpz_partition_size", 1) != 1),
        ("zero_quantized_weights", bool(zero.get("zero_quantized_weights"))),
    ):
        if bad:
            text = (
                f"deepspeed.zero_optimization.{key} works with a live teacher alone, but "
                f"{config.spec.name}.teacher.weights = {own}. Remove the one or change the other."
            )
            problems.append(Problem(("deepspeed", f"{config.spec.name}.teacher.weights"), text))
    return problems


def _problems_of_auto(config: Config, data: dict[str, Any]) -> list[Problem]:
    """Return a problem if an "auto" of the JSON cannot be filled in."""
    facts = deepspeed_json.Facts(total_steps=1, ranks=1, dtype="float32", hidden_size=1, gpu=True)
    try:
        deepspeed_json.fill(data, config.train, facts)
    except ValueError as error:
        return [Problem(("deepspeed",), f"deepspeed: {error}")]
    return []
