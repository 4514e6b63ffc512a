"""Scores the episodes of environments whose rewards are a rubric: at their end, or once their whole group has ended.

A reward function that compares completions needs those of the group. So the last step of an episode hands out a
`Member` (`info["member"]`), what the scoring needs to know of it; and when every episode of the group is over, a
trainer gives them all to `score_group` of an environment of that kind. Where no trainer plays, an episode is a group of
its own.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opd.envs.text_env import Reply
from opd.errors import EnvError
from opd.grading import Trainer, grading
from opd.rewards import Rubric, Score, TrainerState
from opd.rewards.functions import Completion
from opd.types import Message

Told = Callable[[Score], str]
"""What a score is in words, for the teacher of an episode that was no success."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Holds what scoring a group needs to know of one of its episodes."""

    prompt: str | list[Message]
    completion: Completion
    columns: Mapping[str, Any]
    environment: Any = None
    """The object that the functions get among `environments`; None where there is none, or none that can be sent."""
    score: Score = field(default_factory=lambda: Score(total=0.0, parts={}))
    """What is known before the group is: the parts that see a single episode."""
    given: float = 0.0
    """The reward that the environment gave itself, and that `score.parts` tells of."""
    given_parts: Mapping[str, float | None] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave an environment that cannot be pickled behind."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        try:
            pickle.dumps(self.environment)
        except Exception:  # what pickle says depends on what it meets
            values["environment"] = None
        return _member, (values,)


def _member(values: dict[str, Any]) -> Member:
    return Member(**values)


class Scorer:
    """Makes replies of a rubric's scores.

    Args:
        rubric: what scores.
        success_threshold: a total reward of at least this is a success.
        told: what a score that is no success says.
    """

    def __init__(self, rubric: Rubric | None, success_threshold: float, told: Told | None = None) -> None:
        self.rubric = rubric
        self.success_threshold = success_threshold
        self._told = told

    def reply(self, member: Member, trainer: Trainer | None) -> Reply:
        """Score an episode that is over; `member.score` has what the environment gave it itself.

        Under a trainer the parts that compare are left for `group`.
        """
        later = trainer is not None and self.rubric is not None and self.rubric.compares
        if self.rubric is not None:
            columns = dict(member.columns)
            if member.environment is not None:
                columns["environments"] = member.environment
            score = self.rubric.score(
                member.prompt, member.completion, columns, when="episode" if later else "all", state=_state(trainer)
            )
            member = replace(member, score=score)
        reply = self._reply(member)
        return replace(reply, member=member, success=False, feedback=None, unscored=False) if later else reply

    @grading()
    def group(self, members: Sequence[Member], ids: Sequence[Sequence[int]], trainer: Trainer | None) -> list[Reply]:
        """Score what compares the episodes of a group; return for each its whole reward, as one reply.

        `ids` are the tokens of each completion. Raises EnvError where a function fails.
        """
        assert self.rubric is not None
        names = dict.fromkeys(name for member in members for name in member.columns)
        columns: dict[str, Sequence[Any]] = {name: [m.columns.get(name) for m in members] for name in names}
        columns["completion_ids"] = [list(one) for one in ids]
        environments = [member.environment for member in members]
        if all(one is not None for one in environments):
            columns["environments"] = environments
        elif wanting := self.rubric.wanting("environments"):
            raise EnvError(
                f"reward {wanting} compares a group by its environments, and these cannot be sent between processes: "
                "set env.workers: threads, or group: false for this part, which then sees one episode"
            )
        scores = self.rubric.score_batch(
            [m.prompt for m in members], [m.completion for m in members], columns, when="group", state=_state(trainer)
        )
        return [self._reply(replace(m, score=_joined(m.score, s))) for m, s in zip(members, scores, strict=True)]

    def _reply(self, member: Member) -> Reply:
        score = _joined(Score(total=member.given, parts=dict(member.given_parts)), member.score)
        success = not score.unscored and score.total >= self.success_threshold - 1e-9  # 0.1 does not add up exactly
        return Reply(
            reward=score.total,
            terminated=True,
            success=success,
            unscored=score.unscored,
            feedback=None if success or score.unscored or self._told is None else self._told(score),
            rewards=score.parts,
            metrics=score.metrics,
            notes=score.notes,
        )


def _joined(first: Score, second: Score) -> Score:
    return Score(
        total=first.total + second.total,
        parts=first.parts | second.parts,
        metrics=first.metrics | second.metrics,
        notes=first.notes | second.notes,
    )


def _state(trainer: Trainer | None) -> TrainerState | None:
    return None if trainer is None else TrainerState.at(trainer.step, trainer.steps)
