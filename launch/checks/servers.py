"""Problems of servers, found by asking them before a model loads, and of the port of a new one."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx

from opd.episodes.config import RolloutConfig
from opd.errors import ConfigError
from opd.teachers.config import TeacherConfig

PROBE_SECONDS = 10.0


def check_servers(rollout: RolloutConfig) -> None:
    """Raise ConfigError for the first of `rollout.vllm.servers` that a run could not use."""
    if rollout.engine == "vllm_server":
        for url in rollout.vllm.servers:
            name = f"rollout.vllm.servers: {url}"
            key = _Key(rollout.vllm.api_key_env, "rollout.vllm.api_key_env")
            held, models = _answers(url, name, key, ("/weight_info", "/v1/models"), start="opd serve FILE --port N")
            if held.status_code != httpx.codes.OK:
                raise ConfigError(
                    f"{name} is not a server that takes weights (/weight_info: status {held.status_code}). "
                    "Start it with `opd serve FILE --port N`."
                )
            longest = _longest(models)
            if longest is not None and longest < rollout.max_length:
                raise ConfigError(
                    f"{name} takes sequences of at most {longest} ids, but rollout.max_length = {rollout.max_length}. "
                    f"Start it with `opd serve FILE --rollout.max_length {rollout.max_length}`, or lower it here."
                )


def check_teaching_servers(teacher: TeacherConfig, max_length: int, section: str) -> None:
    """Raise ConfigError for the first of the servers that cannot be asked about `max_length` ids.

    `section` is where the teacher's settings stand, for messages.

    To score a sequence vLLM samples one id more. A teacher that sees more than the student may need a longer one yet.
    """
    for url in teacher.servers:
        name, start = f"{section}.servers: {url}", f"opd serve FILE --model {teacher.model}"
        key = _Key(teacher.api_key_env, f"{section}.api_key_env")
        [models] = _answers(url, name, key, ("/v1/models",), start=f"{start} --port N")
        if models.status_code != httpx.codes.OK or not _names_model(models):
            raise ConfigError(
                f"{name} is no vLLM server: /v1/models names no model (status {models.status_code}). Start one with "
                f"`{start} --port N`."
            )
        longest = _longest(models)
        if longest is not None and longest <= max_length:
            raise ConfigError(
                f"{name} takes sequences of at most {longest} ids, but one of rollout.max_length = {max_length} and "
                f"the id that it has to sample are more. Start it with `{start} --rollout.max_length "
                f"{max_length + 1}` or more, or lower it here."
            )


class _Key(NamedTuple):
    """The environment variable that holds a server's key, and the setting that names the variable."""

    variable: str
    setting: str


def _answers(url: str, name: str, key: _Key, paths: Sequence[str], *, start: str) -> list[httpx.Response]:
    """Return a server's answers at these paths. Raises ConfigError if it is not up, or does not take the key."""
    value = os.environ.get(key.variable)
    if value is not None and not (value.isascii() and value.isprintable()):
        raise ConfigError(
            f"the environment variable {key.variable} ({key.setting}) holds what no key can: {value!r:.20}"
        )
    headers = {"Authorization": f"Bearer {value}"} if value else {}
    with httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=PROBE_SECONDS, trust_env=False) as client:
        try:
            health, *answers = [client.get(path) for path in ("/health", *paths)]
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise ConfigError(
                f"{name} does not answer ({error or type(error).__name__}). Start it with `{start}`, "
                f"and wait until it is up: until curl -sf {url.rstrip('/')}/health; do sleep 1; done"
            ) from error
    if any(answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN) for answer in answers):
        raise ConfigError(
            f"{name} does not take {'the key of' if value else 'requests without a key, and there is none in'} the "
            f"environment variable {key.variable} ({key.setting}). Set it to the server's."
        )
    if health.status_code != httpx.codes.OK:
        raise ConfigError(f"{name} is not up (/health: status {health.status_code}). Start it with `{start}`.")
    return answers


def _names_model(models: httpx.Response) -> bool:
    """True: the server names a model that it holds. False: it names none, or answers in another form."""
    try:
        return isinstance(models.json()["data"][0]["id"], str)
    except (ValueError, KeyError, IndexError, TypeError):
        return False


def _longest(models: httpx.Response) -> int | None:
    """Return the longest sequence, in ids, that a server takes; None if it does not say so."""
    try:
        told: Any = models.json()["data"][0]["max_model_len"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return told if isinstance(told, int) else None


def check_port(host: str, port: int) -> None:
    """Raise ConfigError if no server can listen there."""
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
