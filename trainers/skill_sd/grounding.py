"""The Posterior Distillation Index: how well its episodes support a skill, before it is tried on anything.

Source: SPARK (arXiv 2605.09192) and its code. There an agent reflects after every attempt; here a skill is the
reflection, the episodes that it was made of are the attempt, and the task's last skill the reflection before:

    exec   share of the episodes' actions and feedback that the skill covers
    plan   likeness of its workflow to the last one's: inertia
    oss    half the likeness of what worked, half that of the mistakes: staleness
    PDI    (z(exec) - z(plan) - z(oss)) * min(1, n / 2), n the number of the task's skill

z is over the skills so far; the first skill has the raw difference instead. SPARK's z is over the few steps of one
episode, which is noise; here it is over the run. As a z-score says nothing where all are alike, `exec` has a floor of
its own (`skills.min_support`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from opd.trainers.skill_sd.skill import Lesson
from opd.trainers.skill_sd.text import coverage, jaccard, words

LEAST_SPREAD = 0.1
"""The least standard deviation that a z-score divides by: among skills all alike, a small difference means nothing."""


class Proxies(NamedTuple):
    """The parts of the index, each from 0 to 1."""

    exec: float
    plan: float
    oss: float


def proxies(lesson: Lesson, evidence: Sequence[str], last: Lesson | None) -> Proxies:
    """Compare a lesson with the actions and feedback that it was made of, and with the task's last lesson, if any."""
    own = set(words(lesson.text))
    exec = math.fsum(coverage(piece, own) for piece in evidence) / len(evidence) if evidence else 0.0
    if last is None:
        return Proxies(exec, 0.0, 0.0)
    stale = (jaccard(lesson.success, last.success) + jaccard(lesson.mistakes, last.mistakes)) / 2
    return Proxies(exec, jaccard(lesson.workflow, last.workflow), stale)


@dataclass
class Index:
    """The index over a run's skills: their count, and for each proxy its mean and its sum of squared differences."""

    count: int = 0
    means: list[float] = field(default_factory=lambda: [0.0] * 3)
    squares: list[float] = field(default_factory=lambda: [0.0] * 3)

    def add(self, proxies: Proxies, number: int) -> float:
        """Count a task's `number`-th skill (from 1) among those so far, and return its index."""
        self._count(proxies)
        exec, plan, oss = proxies if self.count < 2 else map(self._z, range(3), proxies)
        return (exec - plan - oss) * min(1.0, number / 2)

    def _count(self, values: Sequence[float]) -> None:
        """Update the means and squares by Welford's rule."""
        self.count += 1
        for n, value in enumerate(values):
            away = value - self.means[n]
            self.means[n] += away / self.count
            self.squares[n] += away * (value - self.means[n])

    def _z(self, n: int, value: float) -> float:
        return (value - self.means[n]) / max(math.sqrt(self.squares[n] / self.count), LEAST_SPREAD)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "means": self.means, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.means, self.squares = state["count"], list(state["means"]), list(state["squares"])
