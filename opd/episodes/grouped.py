"""Scores the groups whose rewards compare their episodes, once the last of these has ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opd.episodes.answers import Answer
from opd.episodes.environments import Environments
from opd.episodes.episode import Round
from opd.episodes.faults import MOST_CHARACTERS, explain
from opd.types import End, Trajectory

Ended = list[list[tuple[Trajectory, Any]]]
"""For each episode its attempts, the last of which counts, and what each handed out for its group's scoring."""


def score_groups(ended: Ended, size: int, environments: Environments, shared: Round) -> list[list[Trajectory]]:
    """Return the attempts at each episode; those that wait for their group's scores have them now.

    `size` is the number of episodes of a group, which stand one behind the other. A group that could not be scored is
    scored again in a fresh environment, where `rollout.on_failure` says so, and then fails: its members are counted,
    never trained.
    Raises Interrupted once the round is to be left.
    """
    attempts = [[trajectory for trajectory, _ in own] for own in ended]
    waiting = [
        found
        for first in range(0, len(ended), size)
        if (found := [n for n in range(first, min(first + size, len(ended))) if _waits(*ended[n][-1])])
    ]
    for attempt in range(1 + (shared.config.retries if shared.config.on_failure == "retry" else 0)):
        if not waiting:
            break
        groups = [
            ([ended[n][-1][1] for n in group], [attempts[n][-1].completion_ids for n in group]) for group in waiting
        ]
        outcomes = environments.score_groups(groups, fresh=attempt > 0, stopped=shared.stopped)
        failed = []
        for group, outcome in zip(waiting, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                failed.append(group)
            for place, n in enumerate(group):
                last = ended[n][-1][0]
                attempts[n][-1] = (
                    _broken(last, outcome) if isinstance(outcome, BaseException) else _scored(last, outcome[place])
                )
        waiting = failed
    return attempts


def _waits(trajectory: Trajectory, member: Any) -> bool:
    """True if an episode is over and its reward is not whole."""
    return member is not None and trajectory.failed is None


def _scored(trajectory: Trajectory, answer: Answer) -> Trajectory:
    """Give an episode its whole reward, at its last turn, in place of what was known at its end."""
    *others, last = trajectory.turns
    last = replace(last, reward=answer.reward, rewards=answer.rewards, feedback=last.feedback or answer.feedback)
    return replace(
        trajectory,
        turns=[*others, last],
        success=bool(answer.success) and trajectory.terminated,
        unscored=answer.unscored,
        ungraded=trajectory.ungraded + answer.ungraded,
        metrics={**trajectory.metrics, **answer.metrics},
        notes={**trajectory.notes, **answer.notes},
    )


def _broken(trajectory: Trajectory, error: BaseException) -> Trajectory:
    fault, reason = explain(error)
    return replace(
        trajectory, end=End.BROKEN, success=False, failed=f"scoring its group: {reason}"[:MOST_CHARACTERS], fault=fault
    )
