"""Adapts textarena's games: `textarena:GuessTheNumber-v0`."""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np

from opd.envs.adapters.common import ALL_SPLITS, draw, resolve
from opd.envs.text_env import Reply, Start, TextEnv
from opd.errors import ConfigError, EnvError
from opd.sandbox import Grader, GraderSession, Ungraded

logger = logging.getLogger(__name__)


class TextArenaEnv(TextEnv):
    """Plays a game from seat 0. The reward comes at the end, as the game gives it; 1 or more is a success.

    The game's own observation wrappers are kept. Where they tell the whole story again at each turn, only what is
    new of it becomes the next message, without the echo of the model's own words: the conversation has these.
    The games draw from Python's global `random`; each episode is a process of its own, and so is its stream.

    Args:
        name: an id that `textarena.make` takes.
        config: arguments of `textarena.make`.
        players: seats; all but seat 0 are played by the `opponent`.
        opponent: a function `opponent(observation: str) -> str`, or its import path.
        privileged: what the teacher may see: names, and the keys of the game's state that they show, such as
            `{solution: secret_word}` for Wordle.
        varied: whether the first observation and the privileged texts tell tasks apart. Then tasks are held out by
            them; otherwise the splits differ in their seeds alone.
        time_limit: seconds for one move; `rollout.step_timeout` must be larger.

    The game itself runs where text can hurt nothing (`opd.sandbox.Grader`): a move at which it hangs, dies or raises
    ends the episode without a reward, and the log says so.
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
        time_limit: float = 10.0,
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
        _make(name, self._config)  # refuses what is wrong, and downloads the word lists that a game needs
        made = partial(Game, name, self._config, players)
        self._grader = Grader(made, name=f"textarena:{name}", time_limit=time_limit)
        self._grader.start()
        self._session: GraderSession | None = None
        self._told = self._seat = ""
        if varied:
            self.metadata = {**self.metadata, "tasks": dict(ALL_SPLITS)}

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        return draw(self._begin, lambda start: [start.prompt, start.privileged], rng, split if self.varied else None)

    def respond(self, action: str) -> Reply:
        echo = f"\n[{self._seat}] {action}"
        try:
            seen = self._call("step", action=action)
        except Ungraded as error:
            return self._end_unreadable(action, str(error))
        seen = self._play_others(seen)
        if "ending" in seen:
            return self._ending(**seen["ending"])
        return Reply(messages=[{"role": "user", "content": self._untold(seen["told"]).removeprefix(echo).lstrip("\n")}])

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def _begin(self, seed: int) -> Start:
        self.close()  # a game that has ended keeps parts of its story: each episode gets a new one
        self._session, self._told = self._grader.session(), ""
        try:
            begun = self._call("begin", seed=seed, wanted=list(self.privileged.values()))
            seen = self._play_others(begun["seen"])
        except Ungraded as error:
            raise EnvError(f"textarena:{self._name} cannot begin: {error}") from error
        if "ending" in seen:
            raise EnvError(f"textarena:{self._name} was over before the first move of seat 0")
        state = begun["state"]
        if missing := [key for key in self.privileged.values() if key not in state]:
            raise EnvError(
                f"privileged: the state of {self._name} has no {missing[0]!r}; it has: {', '.join(begun['keys'])}"
            )
        self._seat = begun["seat"]
        prompt = self._untold(seen["told"]).lstrip("\n")
        return Start(prompt=prompt, privileged={name: state[key] for name, key in self.privileged.items()})

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        if self._session is None:
            raise EnvError("the game is closed; call reset first")
        seen: dict[str, Any] = self._session.call(method, **arguments)
        return seen

    def _play_others(self, seen: dict[str, Any]) -> dict[str, Any]:
        """Let the other seats act until it is our turn or the game is over; return what is seen then."""
        while self._opponent is not None and seen.get("player", 0) != 0:
            try:
                seen = self._call("step", action=str(self._opponent(seen["told"])))
            except Ungraded as error:
                raise EnvError(f"textarena:{self._name} broke at the opponent's move: {error}") from error
        return seen

    def _untold(self, text: str) -> str:
        """Return the part of the text that seat 0 has not been told yet."""
        new = text.removeprefix(self._told) or text  # some games tell the present state alone, changed or not
        self._told = text
        return new

    def _end_unreadable(self, action: str, reason: str) -> Reply:
        """End a game that could not take the model's move. The game gave no verdict, so there is no reward."""
        logger.warning("textarena:%s: the move %.200r ends the game: %s", self._name, action[:200], reason)
        self.close()
        told = "The game could not read that move."
        messages = [{"role": "user", "content": told}]
        return Reply(messages=messages, terminated=True, unreadable=True, feedback=told)

    def _ending(self, reward: float, reason: str, *, invalid: bool) -> Reply:
        self.close()
        return Reply(
            messages=[{"role": "user", "content": reason}],
            reward=reward,
            terminated=True,
            unreadable=invalid,
            success=reward >= 1,
            feedback=None if reward >= 1 else reason,
        )


class Game:
    """Runs one game of textarena in a process of its own; all that it returns is plain data."""

    def __init__(self, name: str, config: Mapping[str, Any], players: int) -> None:
        self._game: Any = _make(name, config)
        self._players = players

    def begin(self, seed: int, wanted: Sequence[str]) -> dict[str, Any]:
        """Begin a game.

        Returns what is seen first, the name of seat 0, all keys of the game's state, and the wanted values.
        """
        random.seed(seed)  # games draw from the global generator, which is this game's alone
        self._game.reset(num_players=self._players, seed=seed)
        _mend_invalid_moves(self._game.state)
        seen = self._seen()
        state = self._game.state.game_state or {}
        return {
            "seen": seen,
            "seat": self._game.state.role_mapping.get(0, "Player 0"),
            "state": {key: str(state[key]) for key in wanted if key in state},
            "keys": [str(key) for key in state],
        }

    def step(self, action: str) -> dict[str, Any]:
        """Take an action; return what is seen next (`player`, and what it is `told`) or the `ending` of the game."""
        done, _ = self._game.step(action=action)
        return {"ending": self._ending()} if done else self._seen()

    def _seen(self) -> dict[str, Any]:
        player, observation = self._game.get_observation()
        if not isinstance(observation, str):
            names = self._game.state.role_mapping  # a game without observation wrappers tells tuples
            observation = "".join(f"\n[{names.get(sender, sender)}] {text}" for sender, text, _ in observation)
        return {"player": player, "told": observation}

    def _ending(self) -> dict[str, Any]:
        rewards, infos = self._game.close()
        return {
            "reward": float((rewards or {}).get(0, 0.0)),
            "reason": str((infos or {}).get(0, {}).get("reason") or "The game is over."),
            "invalid": bool((infos or {}).get(0, {}).get("invalid_move")),
        }


def _mend_invalid_moves(state: Any) -> None:
    """Let every game say what it makes of a second invalid move.

    Some hand the reason and the reward over in the wrong order (Countdown, Cryptarithm, Slitherlink, ThreeCardMonte):
    their "reward" is then a sentence. Others name a player, whom the state knows by itself.
    """
    theirs = state.set_invalid_move
    signature = inspect.signature(theirs)

    def set_invalid_move(*given: Any, **named: Any) -> Any:
        bound = signature.bind(*given, **{key: value for key, value in named.items() if key in signature.parameters})
        told = bound.arguments
        if isinstance(told.get("reward"), str) and isinstance(told.get("reason"), int | float):
            told["reward"], told["reason"] = told["reason"], told["reward"]
        return theirs(*bound.args, **bound.kwargs)

    state.set_invalid_move = set_invalid_move


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
