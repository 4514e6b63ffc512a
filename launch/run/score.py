"""How well a model solves held-out tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from opd.tracking.intervals import paired_difference, wilson
from opd.types import TrajectoryGroup


@dataclass(frozen=True, slots=True, repr=False)
class Score:
    """Success on held-out tasks, with its 95% interval."""

    outcomes: tuple[bool | None, ...]
    """Each task, in the order of the tasks, so that scores can be paired. True: solved. False: not. None: its
    environment broke, or nothing could score the answer."""

    @classmethod
    def of(cls, groups: Iterable[TrajectoryGroup]) -> Score:
        episodes = [t for group in groups for t in group.trajectories]
        return cls(tuple(None if t.failed is not None or t.unscored else t.success for t in episodes))

    @property
    def solved(self) -> int:
        return self.outcomes.count(True)

    @property
    def played(self) -> int:
        """The number of tasks that were measured."""
        return len(self.outcomes) - self.broken

    @property
    def broken(self) -> int:
        return self.outcomes.count(None)

    @property
    def rate(self) -> float:
        """The share of measured tasks that were solved; nan if nothing was measured."""
        return self.solved / self.played if self.played else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the rate; from 0 to 1 if nothing was measured."""
        return wilson(self.solved, self.played) if self.played else (0.0, 1.0)

    def row(self) -> dict[str, float]:
        low, high = self.interval if self.played else (math.nan, math.nan)
        counts = {"eval/tasks": float(self.played), "eval/broken": float(self.broken)}
        return {"eval/success": self.rate, "eval/low": low, "eval/high": high, **counts}

    @property
    def short(self) -> str:
        """The rate as a table shows it: 97.7% (95 to 99)."""
        if not self.played:
            return "not measured"
        low, high = self.interval
        return f"{self.rate:.1%} ({100 * low:.0f} to {100 * high:.0f})"

    def __str__(self) -> str:
        """Say it in words: 293 of 300 held-out tasks solved, which is 97.7% (95% interval: 95.2% to 98.9%)."""
        if not self.played:
            return f"not measured: the environment broke in all of {self.broken} episodes"
        low, high = self.interval
        broken = f"; {self.broken} more not measured, their environment broke" if self.broken else ""
        share = f"{self.rate:.1%} (95% interval: {low:.1%} to {high:.1%})"
        return f"{self.solved} of {self.played} held-out tasks solved, which is {share}{broken}"

    def __repr__(self) -> str:
        """Leave out the outcomes, of which there may be thousands."""
        return f"<Score: {self}>"

    def change(self, after: Score) -> tuple[float, float, float] | None:
        """Return how much higher `after` is on tasks that both measured, with its interval; None if there are none."""
        pairs = [(a, b) for a, b in zip(self.outcomes, after.outcomes, strict=False) if None not in (a, b)]
        if not pairs or len(self.outcomes) != len(after.outcomes):
            return None
        first, second = zip(*pairs, strict=True)
        return paired_difference(first, second)
