"""skyrl-gym's environments: `skyrl_gym:gsm8k_multi_turn`."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np

from opd.envs.adapters.rows import Rows
from opd.envs.tables import Row
from opd.envs.text_env import Reply, Start, TextEnv
from opd.errors import ConfigError


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
    ) -> None:
        super().__init__()
        _check(name)
        self._name, self._config = name, dict(config or {})
        self._rows = Rows(data, prompt_column=prompt_column, privileged_columns=privileged_columns, held_out=held_out)
        self.success_threshold = success_threshold
        self.metadata = {**self.metadata, "tasks": self._rows.counts}
        self._env: Any = None
        self._total = 0.0

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        row = self._rows.pick(rng, split, index)
        self.close()
        self._env, self._total = self._make(row), 0.0
        messages, _ = self._env.init(self._rows.prompt(row))
        return Start(prompt=list(messages), privileged=self._rows.privileged(row))

    def respond(self, action: str) -> Reply:
        output = self._env.step(action)
        reward, done = float(output["reward"]), bool(output["done"])
        self._total += reward
        success = done and self._total >= self.success_threshold - 1e-9  # rewards such as 0.2 / 5 do not add up exactly
        return Reply(messages=list(output["observations"]), reward=reward, terminated=done, success=success)

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None

    def _make(self, row: Row) -> Any:
        import skyrl_gym
        from omegaconf import OmegaConf

        extras = {column: value for column, value in row.items() if column != self._rows.prompt_column}
        return skyrl_gym.make(self._name, env_config=OmegaConf.create(self._config), extras=extras)


def _check(name: str) -> None:
    """Raise ConfigError unless skyrl-gym has such an environment."""
    from skyrl_gym.envs.registration import registry

    if name not in registry:
        near = get_close_matches(name, registry, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ConfigError(f"env.id: skyrl_gym has no environment {name!r}. It has: {', '.join(registry)}.{hint}")
