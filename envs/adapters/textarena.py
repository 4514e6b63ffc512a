"""textarena's games: `textarena:GuessTheNumber-v0`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np

from opd.envs.adapters.common import ALL_SPLITS, OwnRandom, draw, resolve
from opd.envs.text_env import Reply, Start, TextEnv
from opd.errors import ConfigError, EnvError


class TextArenaEnv(TextEnv):
    """A game, played from seat 0. The reward comes at the end, as the game gives it; 1 or more is a success.

    The game's own observation wrappers are kept. Where they tell the whole story again at each turn, only what is
    new of it becomes the next message, without the echo of the model's own words: the conversation has these.
    The games draw from Python's global `random`; each episode gets a stream of its own.

    Args:
        name: an id that `textarena.make` takes.
        config: arguments of `textarena.make`.
        players: seats; all but seat 0 are played by the `opponent`.
        opponent: a function `opponent(observation: str) -> str`, or its import path.
        privileged: what the teacher may see: names, and the keys of the game's state that they show, such as
            `{solution: secret_word}` for Wordle.
        varied: whether the first observation and the privileged texts tell tasks apart. Then tasks are held out by
            them; otherwise the splits differ in their seeds alone.
    """

    def __init__(
        self,
        name: str,
        *,
        config: Mapping[str, Any] | None = None,
        players: int = 1,
        opponent: Callable[[str], str] | str | None = None,
        privileged: Mapping[str, str] | None = None,
        varied: bool = False,
    ) -> None:
        super().__init__()
        if (opponent is None) != (players == 1):
            raise ConfigError(
                f"env.kwargs.opponent: {players} players need {'no' if players == 1 else 'an'} opponent; give the "
                "import path of a function from an observation to an action, or set players: 1"
            )
        self.players = players
        self.privileged = dict(privileged or {})
        self.varied = varied
        self._opponent = None if opponent is None else resolve(opponent, setting="opponent")
        self._name, self._config = name, dict(config or {})
        self._random = OwnRandom()
        self._game: Any = _make(name, self._config)
        self._told = ""
        if varied:
            self.metadata = {**self.metadata, "tasks": dict(ALL_SPLITS)}

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        return draw(self._begin, lambda start: [start.prompt, start.privileged], rng, split if self.varied else None)

    def respond(self, action: str) -> Reply:
        echo = f"\n[{self._game.state.role_mapping.get(0, 'Player 0')}] {action}"
        done = self._step(action) or self._others_play()
        messages = [] if done else [{"role": "user", "content": self._observation().removeprefix(echo).lstrip("\n")}]
        return self._ending() if done else Reply(messages=messages)

    def _begin(self, seed: int) -> Start:
        # A game that has ended keeps parts of its story in its wrappers: each episode gets a new one.
        self._game, self._told = _make(self._name, self._config), ""
        with self._random(seed):
            self._game.reset(num_players=self.players, seed=seed)
        self._others_play()
        prompt = self._observation().lstrip("\n")
        state = self._game.state.game_state or {}
        if missing := [key for key in self.privileged.values() if key not in state]:
            raise EnvError(f"privileged: the state of {self._name} has no {missing[0]!r}; it has: {', '.join(state)}")
        return Start(prompt=prompt, privileged={name: str(state[key]) for name, key in self.privileged.items()})

    def _step(self, action: str) -> bool:
        with self._random():
            done, _ = self._game.step(action=action)
        return bool(done)

    def _others_play(self) -> bool:
        """Let the other seats act until it is our turn; whether the game is over."""
        while self._opponent is not None and self._game.state.current_player_id != 0:
            _, observation = self._look()
            if self._step(str(self._opponent(observation))):
                return True
        return False

    def _observation(self) -> str:
        """What seat 0 has not been told yet."""
        _, text = self._look()
        new = text.removeprefix(self._told) or text  # some games tell the present state alone, changed or not
        self._told = text
        return new

    def _look(self) -> tuple[int, str]:
        with self._random():
            player, observation = self._game.get_observation()
        if isinstance(observation, str):
            return player, observation
        names = self._game.state.role_mapping  # a game without observation wrappers tells tuples
        return player, "".join(f"\n[{names.get(sender, sender)}] {text}" for sender, text, _ in observation)

    def _ending(self) -> Reply:
        rewards, infos = self._game.close()
        reward = float((rewards or {}).get(0, 0.0))
        reason = str((infos or {}).get(0, {}).get("reason") or "The game is over.")
        return Reply(
            messages=[{"role": "user", "content": reason}],
            reward=reward,
            terminated=True,
            success=reward >= 1,
            feedback=None if reward >= 1 else reason,
        )


def _make(name: str, config: Mapping[str, Any]) -> Any:
    import textarena

    if name not in textarena.envs.registration.ENV_REGISTRY:
        near = get_close_matches(name, textarena.envs.registration.ENV_REGISTRY, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ConfigError(f"env.id: textarena has no game {name!r}.{hint}")
    try:
        return textarena.make(name, **config)
    except TypeError as error:
        raise ConfigError(f"env.kwargs.config: textarena refuses {dict(config)} for {name}: {error}") from error
