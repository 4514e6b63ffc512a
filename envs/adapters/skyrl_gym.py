"""Adapts skyrl-gym's environments: `skyrl_gym:gsm8k_multi_turn`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np

from opd.envs.adapters.common import Session, Unprotected
from opd.envs.adapters.rows import Rows
from opd.envs.text_env import Reply, Start, TextEnv
from opd.errors import ConfigError, EnvError
from opd.sandbox import Grader, Ungraded
from opd.types import Message

logger = logging.getLogger(__name__)

_NEEDS = {
    "lcb": "runs the model's programs on this machine",
    "search": "asks a server",
    "searchcode": "asks a server, and runs the model's programs on this machine",
}
"""Environments that do not work without network or programs. Others may need these too; that shows at a step."""


class SkyRLGymEnv(TextEnv):
    """A row of a table begins an episode, and its columns are what skyrl-gym calls the `extras`.

    Every episode gets an environment of its own, as in SkyRL. Rewards and the end are the environment's.

    Args:
        name: an id that `skyrl_gym.make` takes.
        data: the rows: a file, one for each split, or a data set (see `opd/Dataset-v0`).
        config: what skyrl-gym calls `env_config`.
        prompt_column: the column of the prompt, text or messages.
        privileged_columns: which columns the teacher may see, under which names: `{solution: COLUMN}`.
        success_threshold: a total reward of at least this is a success.
        held_out: the share of prompts held out for eval, where no eval split is given.
        columns: the types of columns, `{age: int}` (see `opd/Dataset-v0`).
        time_limit: seconds for one step; `rollout.step_timeout` must be larger.
        unprotected: run the environment as it is, in the process of the episode, with all that this may do. Only
            for those that cannot do without (`search` asks a server; `searchcode` and `lcb` run what the model
            writes), and with `env.workers: processes`.

    Otherwise it runs where text can hurt nothing (`opd.sandbox.Grader`), without network, programs and writing: an
    action at which it hangs, dies, raises or is refused ends the episode without a reward, and the log says so.
    """

    def __init__(
        self,
        name: str,
        *,
        data: str | Mapping[str, str],
        config: Mapping[str, Any] | None = None,
        prompt_column: str = "prompt",
        privileged_columns: Mapping[str, str] | None = None,
        success_threshold: float = 1.0,
        held_out: float = 0.1,
        columns: Mapping[str, str] | None = None,
        time_limit: float = 10.0,
        unprotected: bool = False,
    ) -> None:
        super().__init__()
        _check(name, unprotected=unprotected)
        self._name = name
        self._rows = Rows(data, prompt_column, privileged_columns, held_out=held_out, columns=columns)
        self.success_threshold = success_threshold
        self.metadata = {**self.metadata, "tasks": self._rows.counts}
        make = partial(Episode, _spec(name), dict(config or {}))
        grader = Grader(make, name=f"skyrl_gym:{name}", time_limit=time_limit)
        if not unprotected:
            grader.start()
        self._open: Callable[[], Session] = (lambda: Unprotected(make())) if unprotected else grader.session
        self._session: Session | None = None
        self._total = 0.0

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        row = self._rows.pick(rng, split, index)
        self.close()
        self._session, self._total = self._open(), 0.0
        extras = {column: value for column, value in row.items() if column != self._rows.prompt_column}
        try:
            messages = self._session.call("begin", extras=extras, prompt=self._rows.prompt(row))
        except Ungraded as error:
            raise EnvError(f"skyrl_gym:{self._name} cannot begin with this row: {error}") from error
        return Start(prompt=messages, privileged=self._rows.privileged(row))

    def respond(self, action: str) -> Reply:
        if self._session is None:
            raise EnvError("the environment is closed; call reset first")
        try:
            messages, reward, done, metadata = self._session.call("step", action=action)
        except Ungraded as error:
            logger.warning("skyrl_gym:%s: the action %.200r ends the episode: %s", self._name, action[:200], error)
            self.close()
            return Reply(terminated=True, unreadable=True, feedback="The environment could not take that action.")
        self._total += reward
        success = done and self._total >= self.success_threshold - 1e-9  # rewards such as 0.2 / 5 do not add up exactly
        return Reply(messages=messages, reward=reward, terminated=done, success=success, notes=metadata)

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None


class Episode:
    """Runs an environment of skyrl-gym in a process of its own."""

    def __init__(self, spec: Any, config: Mapping[str, Any]) -> None:
        import skyrl_gym
        from skyrl_gym.envs.registration import load_env_creator

        if isinstance(spec.entry_point, str):
            load_env_creator(spec.entry_point)  # imported once for all episodes
        self._make = partial(skyrl_gym.make, spec)
        self._config = config
        self._env: Any = None

    def begin(self, extras: Mapping[str, Any], prompt: list[Message]) -> list[Message]:
        """Begin a row and return its first messages."""
        from omegaconf import OmegaConf

        self._env = self._make(env_config=OmegaConf.create(dict(self._config)), extras=dict(extras))
        messages, _ = self._env.init(prompt)
        return list(messages)

    def step(self, action: str) -> tuple[list[Message], float, bool, dict[str, Any]]:
        """Take an action; return the next messages, the reward, whether the episode is over, and the metadata."""
        output = self._env.step(action)
        metadata = {str(key): _plain(value) for key, value in (output.get("metadata") or {}).items()}
        return list(output["observations"]), float(output["reward"]), bool(output["done"]), metadata

    def close(self) -> None:
        if self._env is not None:
            self._env.close()


def _plain(value: Any) -> Any:
    """Return what JSON can hold: a value of metadata itself, or its text."""
    return value if isinstance(value, str | int | float | bool | None) and value == value else str(value)


def _spec(name: str) -> Any:
    from skyrl_gym.envs.registration import registry

    return registry[name]


def _check(name: str, *, unprotected: bool) -> None:
    """Raise ConfigError unless skyrl-gym has such an environment, and it can run like this."""
    from skyrl_gym.envs.registration import registry

    if name not in registry:
        near = get_close_matches(name, registry, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ConfigError(f"env.id: skyrl_gym has no environment {name!r}. It has: {', '.join(registry)}.{hint}")
    if not unprotected and (need := _NEEDS.get(name)):
        raise ConfigError(
            f"env.id: skyrl_gym:{name} {need}, which is refused where a model's text is kept from hurting anything. "
            "Write an environment with the sandbox's tools (docs/sandbox.md); or, on a machine that may be hurt, set "
            "env.kwargs.unprotected: true and env.workers: processes"
        )
