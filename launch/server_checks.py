"""What can be known to fail about vLLM before a model loads: its arguments, its servers, the port of a new one.

vLLM itself is not imported: that takes seconds, and a wrong setting should not.
"""

from __future__ import annotations

import ast
import errno
import importlib.util
import os
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from opd.config import RolloutConfig
from opd.errors import ConfigError
from opd.launch.problems import Problem, did_you_mean, nearest

PROBE_SECONDS = 10.0


def check_engine_args(rollout: RolloutConfig) -> list[Problem]:
    """Whether vLLM knows the arguments of `rollout.vllm.engine_args`, as far as its source is here."""
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
    """The fields of vLLM's `EngineArgs`, read from its source; empty where they are not found."""
    found = importlib.util.find_spec("vllm")
    for root in (found and found.submodule_search_locations) or ():
        source = Path(root) / "engine" / "arg_utils.py"
        if source.is_file():
            return frozenset(_fields(ast.parse(source.read_text()), "EngineArgs"))
    return frozenset()


def _fields(module: ast.Module, name: str) -> Iterator[str]:
    """The annotated fields of a class."""
    for found in module.body:
        if isinstance(found, ast.ClassDef) and found.name == name:
            for line in found.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    yield line.target.id


def check_servers(rollout: RolloutConfig) -> None:
    """Raises ConfigError for the first of `rollout.vllm.servers` that a run could not use."""
    if rollout.engine == "vllm_server":
        for url in rollout.vllm.servers:
            _check_server(url.rstrip("/"), rollout)


def _check_server(url: str, rollout: RolloutConfig) -> None:
    vllm = rollout.vllm
    key = os.environ.get(vllm.api_key_env)
    where = f"rollout.vllm.servers: {url}"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=PROBE_SECONDS, trust_env=False) as client:
        try:
            up = client.get("/health").status_code == httpx.codes.OK
            held = client.get("/weight_info")
            models = client.get("/v1/models")
        except httpx.HTTPError as error:
            raise ConfigError(
                f"{where} does not answer ({error or type(error).__name__}). Start it with `opd serve FILE --port N`, "
                f"and wait until it is up: until curl -sf {url}/health; do sleep 1; done"
            ) from error
    if held.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise ConfigError(
            f"{where} does not take {'the key of' if key else 'requests without a key, and there is none in'} the "
            f"environment variable {vllm.api_key_env} (rollout.vllm.api_key_env). Set it to the server's."
        )
    if not up or held.status_code != httpx.codes.OK:
        raise ConfigError(
            f"{where} is not a server that takes weights (/health, /weight_info: status {held.status_code}). "
            "Start it with `opd serve FILE --port N`."
        )
    longest = _longest(models)
    if longest is not None and longest < rollout.max_length:
        raise ConfigError(
            f"{where} takes sequences of at most {longest} ids, but rollout.max_length = {rollout.max_length}. "
            f"Start it with `opd serve FILE --rollout.max_length {rollout.max_length}`, or lower it here."
        )


def _longest(models: httpx.Response) -> int | None:
    """The longest sequence that a server takes, if it says so."""
    try:
        told: Any = models.json()["data"][0]["max_model_len"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return told if isinstance(told, int) else None


def check_port(host: str, port: int) -> None:
    """Raises ConfigError where nobody can listen there."""
    if port > 65535:
        raise ConfigError(f"--port {port} is beyond 65535. Choose another.")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"--port {port} is in use on {host}. Choose another, or end what listens there."
            ) from error
        raise ConfigError(f"--host {host} --port {port}: nobody can listen there: {error.strerror}") from error
