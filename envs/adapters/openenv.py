"""Adapts the environments that an OpenEnv server offers: `openenv:http://localhost:8000`.

This speaks OpenEnv's own WebSocket protocol, JSON messages of a `type` and `data`, so that a server in a container
and the trainer need not agree on the versions of a hundred packages. Source: `openenv.core.env_server.types`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from opd.envs.text_env import Reply, Start, TextEnv
from opd.errors import ConfigError, EnvError

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

_MOST_BYTES = 4_000_000
"""The largest message that is read; what a student may be told in one answer is shorter still."""
_RESERVED = ("done", "reward", "metadata")


class OpenEnv(TextEnv):
    """Plays in a session on a server. Its rewards and its `done` are taken as they come; a missing reward is 0.

    The model's text becomes the action's one field, or, with `action: json`, the action is the JSON object in it.
    An action that the server refuses is answered with its error text, and the episode goes on. A server that does
    not answer in time, or closes, fails the episode.

    Args:
        name: the address of the server, http(s):// or ws(s)://.
        config: what `reset` gets beside the seed.
        action: the field of the action that holds the model's text, or `json`.
        observation: the field of the observation that the student reads; by default all of them, as JSON.
        prompt: what the first message says before the first observation.
        reply_timeout: seconds that an answer may take; `rollout.step_timeout` must be larger.
        success_threshold: an episode that the server ends with at least this total reward is a success.
    """

    def __init__(
        self,
        name: str,
        *,
        config: Mapping[str, Any] | None = None,
        action: str = "message",
        observation: str | None = None,
        prompt: str | None = None,
        reply_timeout: float = 30.0,
        success_threshold: float = 1.0,
    ) -> None:
        super().__init__()
        self._url = _address(name)
        self._config = dict(config or {})
        self.action, self.observation, self.prompt = action, observation, prompt
        self.reply_timeout, self.success_threshold = reply_timeout, success_threshold
        self._connection = ExitStack()
        self._socket: ClientConnection | None = None
        self._total, self._rewarded = 0.0, False

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        if self._socket is None:
            self._socket = self._connect()
        self._total, self._rewarded = 0.0, False
        told = self._ask("reset", {**self._config, "seed": int(rng.integers(2**31))})
        if "error" in told:
            raise EnvError(f"the OpenEnv server cannot reset: {told['error']}")
        return Start(prompt="\n\n".join(filter(None, [self.prompt, self._text(told)])))

    def respond(self, action: str) -> Reply:
        wanted = {self.action: action} if self.action != "json" else _find_object(action)
        told = {"error": "write the action as a JSON object"} if wanted is None else self._ask("step", wanted)
        if "error" in told:
            text = f"Error: {told['error']}"
            return Reply(messages=[{"role": "user", "content": text}], feedback=text)
        given, done = told.get("reward"), bool(told.get("done", False))
        reward = float(given or 0.0)
        self._total += reward
        self._rewarded = self._rewarded or given is not None
        return Reply(
            messages=[{"role": "user", "content": self._text(told)}],
            reward=reward,
            terminated=done,
            success=done and self._rewarded and self._total >= self.success_threshold - 1e-9,
            unscored=done and not self._rewarded,
            notes=_metadata(told),
        )

    def close(self) -> None:
        self._connection.close()
        self._socket = None

    def _connect(self) -> ClientConnection:
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        try:
            return self._connection.enter_context(
                connect(self._url, open_timeout=self.reply_timeout, close_timeout=1, max_size=_MOST_BYTES, proxy=None)
            )
        except (OSError, WebSocketException) as error:
            raise EnvError(f"no OpenEnv server at {self._url}: {error}") from error

    def _ask(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the server's answer: `{observation, reward, done}`, or `{error}` in its words.

        Raises EnvError when it does not answer in time, or not in its own protocol.
        """
        from websockets.exceptions import WebSocketException

        if self._socket is None:
            raise EnvError("the connection to the OpenEnv server is closed; call reset first")
        try:
            self._socket.send(json.dumps({"type": kind, "data": data}))
            told = json.loads(self._socket.recv(timeout=self.reply_timeout))
            answer, payload = told["type"], told["data"]
        except (OSError, WebSocketException, ValueError, KeyError, TypeError) as error:
            self.close()  # a late answer must not be taken for that of the next question
            reason = str(error) or type(error).__name__
            raise EnvError(f"the OpenEnv server at {self._url} did not answer a {kind}: {reason}") from error
        if answer == "error":
            return {"error": str(payload.get("message", payload))[:500]}
        return dict(payload)

    def _text(self, told: Mapping[str, Any]) -> str:
        seen = {key: value for key, value in told.get("observation", {}).items() if key not in _RESERVED}
        if self.observation is None:
            return json.dumps(seen, ensure_ascii=False)
        if self.observation not in seen:
            raise EnvError(f"observation: the server tells no {self.observation!r}, but: {', '.join(seen)}")
        value = seen[self.observation]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _metadata(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a server says beside its observation."""
    metadata = told.get("observation", {}).get("metadata")
    return dict(metadata) if isinstance(metadata, dict) else {}


def _address(name: str) -> str:
    """Return the WebSocket address of a server. Raises ConfigError for anything but a URL."""
    parts = urlsplit(name)
    schemes = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
    if parts.scheme not in schemes or not parts.hostname:
        raise ConfigError(f"env.id: {name!r} is no address of a server; write openenv:http://HOST:PORT")
    return f"{schemes[parts.scheme]}://{parts.netloc}{parts.path.rstrip('/')}/ws"


def _find_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object between the first and the last brace of a text; None if it is none."""
    try:
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
