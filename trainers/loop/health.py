"""The health of a run: warnings while it may not learn, and its end once it cannot."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from opd.errors import HealthError
from opd.trainers.loop.symptoms import SYMPTOMS
from opd.types import TrajectoryGroup

_STAYS = (3, 30, 300)
"""Steps in a row after which a symptom is told: it may pass."""
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Health:
    """Counts how often in a row things went wrong. Every rank sees the same, so that all end a run together."""

    give_up_after: int = 3
    """Rounds without a usable episode, or updates that are not finite, after which the run ends; 0: never."""
    streaks: Counter[str] = field(default_factory=Counter)
    first_failure: str | None = None
    """The failure of the first episode of the rounds in a row without a usable one."""

    def played(self, groups: Sequence[TrajectoryGroup]) -> None:
        """Take note of a round of episodes, of all ranks.

        Raises HealthError with the first failure after too many rounds of which no episode can be used: each broke,
        or ended before anything was sampled. An episode from which nothing can be learned is none of these.
        """
        if not groups:
            return
        if any(group.usable for group in groups):
            self.streaks["unusable"], self.first_failure = 0, None
            return
        self.streaks["unusable"] += 1
        self.first_failure = self.first_failure or _first_failure(groups)
        if 0 < self.give_up_after <= self.streaks["unusable"]:
            raise _nothing_usable(
                f"not one episode of the last {self.give_up_after} rounds can be used", self.first_failure
            )

    def ended(self, *, steps: int, updates: int) -> None:
        """A stage of so many steps and updates is over. Raises HealthError where none of its rounds had a usable
        episode, or none of its updates was finite, though they were fewer than it takes to end a run."""
        if not self.give_up_after or steps < 1:
            return
        if self.streaks["unusable"] >= steps:
            raise _nothing_usable(f"not one episode of the stage's {steps} steps can be used", self.first_failure)
        if self.streaks["not finite"] >= updates:
            raise _not_finite(f"not one of the stage's {updates} updates is finite")

    def updated(self, losses: Iterable[float], norms: Iterable[float]) -> HealthError | None:
        """Take note of a step's updates: the loss and the gradient norm of each, in their order.

        Returns what ends the run after too many in a row of which either is not finite.
        """
        for loss, norm in zip(losses, norms, strict=True):
            finite = math.isfinite(loss) and math.isfinite(norm)
            self.streaks["not finite"] = 0 if finite else self.streaks["not finite"] + 1
            if not finite and 0 < self.give_up_after <= self.streaks["not finite"]:
                return _not_finite(
                    f"the last {self.give_up_after} updates are not finite (loss {loss:.3g}, gradient norm {norm:.3g})"
                )
        return None

    def warn(self, number: int, row: Mapping[str, float]) -> None:
        """Warn of what the finished row of step `number` (from 0) shows. Of several ranks, the first one knows it."""
        self._warn_of_silence(number, row)
        self._warn_of_unscored(number, row)
        self._warn_of_graders(number, row)
        self._warn_of_unread(number, row)
        for symptom in SYMPTOMS:
            said = symptom.says(row)
            if self._again(symptom.name, said is not None, at=_STAYS):
                logger.warning("step %d (%d in a row): %s", number + 1, self.streaks[symptom.name], said)

    def _warn_of_silence(self, number: int, row: Mapping[str, float]) -> None:
        """Warn of a step from which nothing could be learned."""
        if self._again("silent", "tokens/trained" in row and row.get("signal/zero", 1.0) == 1):
            logger.warning(
                "step %d: nothing teaches (%d in a row): no token has a weight and an advantage, or a weight and a "
                "teacher that is shown something; solved episodes: %.0f%%. More episodes a task (rollout.group_size), "
                "easier tasks, or an environment that gives feedback would help",
                number + 1,
                self.streaks["silent"],
                100 * row.get("reward/success", 0.0),
            )

    def _warn_of_unscored(self, number: int, row: Mapping[str, float]) -> None:
        """Warn of a step with episodes that have no reward."""
        unscored = row.get("rollout/unscored", 0.0)
        if self._again("unscored", unscored > 0):
            logger.warning(
                "step %d: %d of %d episodes have no reward (%d such steps in a row): every reward function returned "
                "None. They are compared with no other; mend the functions, or the rows that they cannot score",
                number + 1,
                unscored,
                row.get("rollout/episodes", 0.0),
                self.streaks["unscored"],
            )

    def _warn_of_graders(self, number: int, row: Mapping[str, float]) -> None:
        """Warn of a step whose graders failed."""
        failed = row.get("failures/grading", 0.0)
        if self._again("ungraded", failed > 0):
            logger.warning(
                "step %d: graders hung, died or raised at %d texts (%d such steps in a row), which scored 0 or ended "
                "their episodes; rollouts.jsonl says why under `ungraded`",
                number + 1,
                failed,
                self.streaks["ungraded"],
            )

    def _warn_of_unread(self, number: int, row: Mapping[str, float]) -> None:
        """Warn of a step whose teacher would have read more than it may of all that it was to correct."""
        unread = row.get("route/too_long", 0.0)
        if self._again("unread", unread > 0 and "route/distill" not in row):
            logger.warning(
                "step %d: nothing is distilled (%d in a row): a teacher would read more than max_teacher_tokens of "
                "each of the %d sequences that it has something to say about; raise that",
                number + 1,
                self.streaks["unread"],
                unread,
            )

    def _again(self, what: str, holds: bool, *, at: Sequence[int] = (1, 10, 100)) -> bool:
        """Count a step for which something `holds`; True where so many `at` are in a row."""
        self.streaks[what] = self.streaks[what] + 1 if holds else 0
        return self.streaks[what] in at


def check_collected(failures: Sequence[str | None], give_up_after: int) -> None:
    """Check a collection that is over. Raises HealthError if every episode failed and `give_up_after` is not 0.

    Args:
        failures: why each episode failed, or None.
        give_up_after: as in `Health`.
    """
    if give_up_after and failures and None not in failures:
        raise _nothing_usable(f"not one of the {len(failures)} episodes that were collected can be used", failures[0])


def _nothing_usable(what: str, first_failure: str | None) -> HealthError:
    return HealthError(
        f"{what}, so nothing is learned. The first failure: {first_failure}. Mend the environment "
        "(`opd envs check ID`), or set train.give_up_after to wait longer (0: for ever)."
    )


def _not_finite(what: str) -> HealthError:
    return HealthError(
        f"{what}, so nothing is learned. A lower train.lr, or model.dtype: float32, may help; train.give_up_after sets "
        "after how many a run ends (0: never)."
    )


def _first_failure(groups: Sequence[TrajectoryGroup]) -> str:
    episodes = [t for group in groups for t in group.attempts]
    failed = next((t for t in episodes if t.failed is not None), None)
    if failed is not None:
        return f"{failed.task.id} at {failed.failed}"
    return (
        f"{episodes[0].task.id} has no room for a completion: its first prompt fills rollout.max_length, or "
        "rollout.episode_timeout is over"
    )
