"""Accounts for every token that a step sampled: it was trained, masked, or dropped for a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from opd.types import WEIGHTS, Sample, Trajectory, TrajectoryGroup


class TurnKey(NamedTuple):
    """Says which turn of a step it is."""

    task: str
    """The task's id."""
    member: int
    """Which of its group the trajectory is."""
    number: int
    """Which of the trajectory's turns it is, from 0."""


def account(
    groups: Sequence[TrajectoryGroup], trained: Sequence[Sample], skipped: Sequence[Sample] = ()
) -> dict[str, float]:
    """Count tokens, as metrics; every token of `tokens/sampled` is in one of the others, and in one only.

    `tokens/trained` have a weight in a sample of an update; `tokens/masked` are in a sample and have none.
    `tokens/dropped/` and a reason are the rest: the kind of failure that ended the episode (`timeout`, ...);
    `retried`, an attempt that was played again; `small_group`, too few members of the group survived;
    `skipped`, samples whose update was left out since its gradient was not finite; `unused`, the method made
    no sample of it.
    """
    fates: Counter[str] = Counter(trained=0, masked=0)
    if not groups:  # samples of a stored set, in which a task may stand often: nothing was sampled in this step
        weights = (zip(*(getattr(sample, name) for name in WEIGHTS), strict=True) for sample in trained)
        fates["trained"] = sum(any(token) for tokens in weights for token in tokens)
    updated, left_out = (_weighed(trained), _weighed(skipped)) if groups else ({}, {})
    for group in groups:
        fates["dropped/retried"] += sum(t.completion_tokens for t in group.replaced)
        for trajectory in group.trajectories:
            lost = _lost(group, trajectory)
            for number, turn in enumerate(trajectory.turns):
                key, size = TurnKey(group.task.id, trajectory.member, number), len(turn.completion_ids)
                if lost is not None:
                    fates[f"dropped/{lost}"] += size
                elif key in updated:
                    fates["trained"] += sum(updated[key])
                    fates["masked"] += size - sum(updated[key])
                else:
                    fates["dropped/skipped" if key in left_out else "dropped/unused"] += size
    row = {f"tokens/{fate}": float(count) for fate, count in fates.items() if count or "/" not in fate}
    return {"tokens/sampled": float(sum(t.completion_tokens for g in groups for t in g.attempts)), **row}


def _lost(group: TrajectoryGroup, trajectory: Trajectory) -> str | None:
    """Return why a trajectory could not train; None for one that could."""
    if trajectory.failed is not None:
        return trajectory.fault or "failed"
    return "small_group" if group.dropped else None


def _weighed(samples: Sequence[Sample]) -> dict[TurnKey, list[bool]]:
    """Return a flag for each sampled token of a turn. True: a loss of a sample weighs it."""
    found: dict[TurnKey, list[bool]] = {}
    for sample in samples:
        if sample.task is None:
            continue
        turns: dict[int, list[bool]] = {}
        weights = zip(*(getattr(sample, name) for name in WEIGHTS), strict=True)
        for sampled, turn, weighs in zip(sample.completion_mask, sample.turn, weights, strict=True):
            if sampled:
                turns.setdefault(turn, []).append(any(weighs))
        for turn, flags in turns.items():
            key = TurnKey(sample.task.id, sample.member, turn)
            found[key] = [a or b for a, b in zip(flags, found.get(key, flags), strict=True)]
    return found
