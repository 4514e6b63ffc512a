"""reasoning-gym's generated data sets, scored by their own scorers: `reasoning_gym:chain_sum`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import numpy as np

from opd.envs.adapters.common import ALL_SPLITS, OwnRandom, draw
from opd.envs.text_env import Reply, Start, TextEnv
from opd.errors import ConfigError

logger = logging.getLogger(__name__)

SYSTEM = "Think first, then write your final answer between <answer> and </answer>."


class ReasoningGymEnv(TextEnv):
    """One question, one answer. The reward is the score, from 0 to 1, of the data set's own `score_answer`.

    The answer is what stands in the last pair of answer tags, or the whole text where there is none. Which split
    a question belongs to is decided by its text, so no question is in two of them. The privileged `solution` is
    the data set's answer; data sets without one (several answers are right, say) have none.

    Args:
        name: a data set of `reasoning_gym.factory.DATASETS`.
        config: its settings, such as `{min_terms: 2}`; `size` and `seed` say how many questions there are to draw
            from, and which (10,000 and 0 where they are not given).
        system: a system message, or none.
        success_threshold: a score of at least this is a success.
    """

    metadata: dict[str, Any] = {"render_modes": [], "tasks": dict(ALL_SPLITS)}  # noqa: RUF012  (gymnasium's own)

    def __init__(
        self,
        name: str,
        *,
        config: Mapping[str, Any] | None = None,
        system: str | None = SYSTEM,
        success_threshold: float = 1.0,
    ) -> None:
        super().__init__()
        self.system = system
        self.success_threshold = success_threshold
        self._data = _create(name, {"size": 10_000, "seed": 0, **(config or {})})
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
        from reasoning_gym.utils import extract_answer

        answer = extract_answer(action)
        answer = action.strip() if answer is None else answer
        try:
            return float(self._data.score_answer(answer, self._entry))
        except Exception:  # a scorer of theirs met an answer that it was not made for: that answer is wrong
            logger.warning("the scorer of reasoning-gym raised for the answer %.200r", answer, exc_info=True)
            return 0.0


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
