"""Puts any gymnasium environment of discrete actions into words: `gymnasium:FrozenLake-v1`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import gymnasium
import numpy as np
from numpy.typing import NDArray

from opd.envs.adapters.common import ALL_SPLITS, draw, resolve
from opd.envs.adapters.planning import Process, optimal_policy, plan, process_of
from opd.envs.adapters.toy_text import WORDS, Words
from opd.envs.text_env import Reply, Start, TextEnv
from opd.errors import ConfigError


class DiscreteEnv(TextEnv):
    """Wraps a gymnasium environment whose actions have names. The last name in the model's text is the action.

    A text that names no action does not reach the environment: the turn is used up and the model reminded.
    Where the environment publishes its transition probabilities, the best plan is the privileged `solution`.

    Args:
        name: an id that `gymnasium.make` takes.
        config: arguments of `gymnasium.make`.
        describe: a function `describe(env, observation) -> str`, or its import path. Built in for FrozenLake,
            CliffWalking, Taxi and Blackjack, as are the three below.
        actions: the names of the actions, in their order; by default their numbers.
        rules: what the first prompt says, before the first observation.
        success: which end is a success: `reward`, one with a positive total; `end`, any that the environment itself
            ends (`terminated`).
        varied: whether the first observation tells tasks apart. Then tasks are held out by it; otherwise the splits
            differ in their seeds alone.
    """

    def __init__(
        self,
        name: str,
        *,
        config: Mapping[str, Any] | None = None,
        describe: Callable[[Any, Any], str] | str | None = None,
        actions: Sequence[str] | None = None,
        rules: str | None = None,
        success: Literal["reward", "end"] | None = None,
        varied: bool | None = None,
    ) -> None:
        super().__init__()
        self._env = _make(name, config or {})
        self._first = int(self._env.action_space.start)  # type: ignore[attr-defined]  # a Discrete space, as checked
        given: dict[str, Any] = {"actions": actions, "rules": rules, "success": success, "varied": varied}
        given["describe"] = None if describe is None else resolve(describe, setting="describe")
        self._words = _choose_words(name, self._env, {key: value for key, value in given.items() if value is not None})
        # `dropoff` is no `drop`, and names may hold anything: whole words, longest first.
        names = "|".join(re.escape(action) for action in sorted(self._words.actions, key=len, reverse=True))
        self._named = re.compile(rf"(?<!\w)(?:{names})(?!\w)", re.IGNORECASE)
        self._number = {action.lower(): n for n, action in enumerate(self._words.actions)}
        self._total = 0.0
        if self._words.varied:
            self.metadata = {**self.metadata, "tasks": dict(ALL_SPLITS)}

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        first = draw(self._begin, lambda text: text, rng, split if self._words.varied else None)
        self._total = 0.0
        return Start(prompt="\n\n".join(filter(None, [self._words.rules, first])), privileged=self._privileged())

    def respond(self, action: str) -> Reply:
        named = self._named.findall(action)
        if not named:
            text = f"Say one of: {', '.join(self._words.actions)}."
            return Reply(messages=[{"role": "user", "content": text}], feedback=text)
        observation, reward, terminated, truncated, _ = self._env.step(self._first + self._number[named[-1].lower()])
        self._total += float(reward)
        return Reply(
            messages=[{"role": "user", "content": self._words.describe(self._env, observation)}],
            reward=float(reward),
            terminated=bool(terminated),
            truncated=bool(truncated),
            success=bool(terminated) and (self._words.success == "end" or self._total > 0),
        )

    def close(self) -> None:
        self._env.close()

    def _begin(self, seed: int) -> str:
        observation, _ = self._env.reset(seed=seed)
        return self._words.describe(self._env, observation)

    def _privileged(self) -> dict[str, str]:
        if self._policy is None:
            best = self._words.hidden(self._env)
        else:
            process, policy = self._policy
            state = int(self._env.unwrapped.s)  # type: ignore[attr-defined]  # as process_of checked
            best = plan(process, policy, state, self._words.actions, lambda s: self._words.place(self._env, s))
        return {} if best is None else {"solution": best}

    @cached_property
    def _policy(self) -> tuple[Process, NDArray[np.int64]] | None:
        """Return the environment's process and best policy, the same for every episode. None: it publishes none."""
        process = process_of(self._env)
        return None if process is None else (process, optimal_policy(process))


def _make(name: str, config: Mapping[str, Any]) -> gymnasium.Env[Any, Any]:
    """Make the environment itself.

    Raises ConfigError when there is none of this name or its actions are not discrete.
    """
    try:
        env = gymnasium.make(name, disable_env_checker=True, **config)
    except (gymnasium.error.Error, ImportError, TypeError) as error:
        raise ConfigError(f"env.id: gymnasium cannot make {name!r}: {error}") from error
    if not isinstance(env.action_space, gymnasium.spaces.Discrete):
        raise ConfigError(f"env.id: {name!r} has the action space {env.action_space}; only Discrete ones have names")
    return env


def _choose_words(name: str, env: gymnasium.Env[Any, Any], given: dict[str, Any]) -> Words:
    """Take the words built in for this environment and replace those that the user gave."""
    built_in = WORDS.get(type(env.unwrapped).__name__)
    count = int(env.action_space.n)  # type: ignore[attr-defined]  # a Discrete space
    if built_in is None:
        if "describe" not in given:
            raise ConfigError(
                f"env.kwargs.describe is missing: nothing is known of how {name!r} is told in words. Give the import "
                "path of a function describe(env, observation) -> str"
            )
        built_in = Words(
            rules="",
            actions=tuple(str(n) for n in range(count)),
            describe=given["describe"],
            place=lambda env, state: f"state {state}",
        )
    words = replace(built_in, **given)
    if len(words.actions) != count or len({action.lower() for action in words.actions}) != count:
        raise ConfigError(
            f"env.kwargs.actions = {list(words.actions)} must be {count} different names: {name!r} has {count} actions"
        )
    return words
