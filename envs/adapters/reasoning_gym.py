"""Adapts reasoning-gym's generated data sets, scored by their own scorers: `reasoning_gym:chain_sum`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np

from opd.envs.adapters.common import ALL_SPLITS, OwnRandom, draw
from opd.envs.text_env import Reply, Start, TextEnv
from opd.errors import ConfigError
from opd.rewards import last_tagged
from opd.sandbox import Grader

SYSTEM = "Think first, then write your final answer between <answer> and </answer>."


class ReasoningGymEnv(TextEnv):
    """Asks one question and takes one answer.

    The reward is the score, from 0 to 1, of the data set's own `score_answer`. The answer is what stands in the last
    pair of answer tags, or the whole text where there is none. Which split a question belongs to is decided by its
    text, so no question is in two of them. The privileged `solution` is the data set's answer; data sets without one
    (several answers are right, say) have none.

    Args:
        name: a data set of `reasoning_gym.factory.DATASETS`.
        config: its settings, such as `{min_terms: 2}`; `size` and `seed` say how many questions there are to draw
            from, and which (10,000 and 0 where they are not given).
        system: a system message, or none.
        success_threshold: a score of at least this is a success.
        time_limit: seconds for scoring one answer; `rollout.grading_timeout` must be larger.

    The scorers take answers for Python and for formulas of sympy, so they run where text can hurt nothing
    (`opd.sandbox.Grader`): an answer whose scoring hangs, dies, raises or is refused scores 0, and the log says so.
    """

    metadata: dict[str, Any] = {"render_modes": [], "tasks": dict(ALL_SPLITS)}  # noqa: RUF012  (gymnasium's own)

    def __init__(
        self,
        name: str,
        *,
        config: Mapping[str, Any] | None = None,
        system: str | None = SYSTEM,
        success_threshold: float = 1.0,
        time_limit: float = 10.0,
    ) -> None:
        super().__init__()
        self.system = system
        self.success_threshold = success_threshold
        settings = {"size": 10_000, "seed": 0, **(config or {})}
        self._data = _create(name, settings)
        self._grader = Grader(partial(Scorer, name, settings), name=f"reasoning_gym:{name}", time_limit=time_limit)
        self._grader.start()
        self._random = OwnRandom()
        self._entry: dict[str, Any] = {}

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        self._entry = draw(self._question, lambda entry: str(entry["question"]), rng, split)
        answer = self._entry["answer"]
        return Start(
            prompt=str(self._entry["question"]),
            system=self.system,
            privileged={} if answer is None else {"solution": str(answer)},
        )

    def respond(self, action: str) -> Reply:
        score = self._score(action)
        success = score >= self.success_threshold
        return Reply(
            reward=score,
            terminated=True,
            success=success,
            feedback=None if success else f"The answer scored {score:g} of 1.",
        )

    def _question(self, seed: int) -> dict[str, Any]:
        number = seed % len(self._data)
        with self._random(number):  # some generators draw from the global one, and then differ from run to run
            return dict(self._data[number])

    def _score(self, action: str) -> float:
        tagged = last_tagged(action, "answer")
        answer = action.strip() if tagged is None else tagged
        return self._grader.score("score", text=answer, answer=answer, entry=self._entry) or 0.0


class Scorer:
    """Runs a data set's `score_answer` in a process of its own.

    Of the data set only the settings count there, so it is made with a single question: some draw all at once.
    """

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._data = _create(name, {**config, "size": 1})
        with suppress(Exception):  # what scoring imports and remembers is there when the first answer comes
            entry = self._data[0]
            self._data.score_answer(entry["answer"], entry)

    def score(self, answer: str, entry: dict[str, Any]) -> float:
        """Score an answer to a question of the data set."""
        if _NAN.search(answer) and not _NAN.search(str(entry["answer"])):
            return 0.0  # min(1, nan) is 1 to some of them
        return float(self._data.score_answer(answer, entry))


_NAN = re.compile(r"(?<![^\W\d_])nan[ij]?(?![^\W\d_])", re.IGNORECASE)
"""What is not a number, as a word or as a part of a complex number."""


def _create(name: str, config: dict[str, Any]) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = get_close_matches(name, DATASETS, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        known = ", ".join(sorted(DATASETS))
        raise ConfigError(f"env.id: reasoning_gym has no data set {name!r}.{hint} It has: {known}")
    try:
        return reasoning_gym.create_dataset(name, **config)
    except (AssertionError, TypeError, ValueError) as error:  # its settings are checked with assert
        raise ConfigError(f"env.kwargs.config: reasoning_gym refuses {config} for {name}: {error}") from error
