"""The bank: the skills of a run, added, merged, measured, credited and forgotten.

The bank of a run holds skills of its training tasks and of no other: `add` refuses the rest. It depends on nothing but
the calls that it got, in their order, so that the banks of all ranks are the same, and a restored one goes on alike.
`opd.trainers.skill_sd.finding` chooses skills for a task.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opd.errors import DataError
from opd.trainers.skill_sd.skill import Lesson, Skill, Source, Where, from_row, to_row
from opd.trainers.skill_sd.text import PROMPT_CHARACTERS, jaccard, shorten

ALIKE = 0.8
"""Two skills of one task with at least this Jaccard index of their words are one skill, whose newer version counts."""


@dataclass(kw_only=True)
class SkillBank:
    """Skills by id, in the order in which they were made."""

    capacity: int
    """The most skills in the bank."""
    per_task: int
    """The most skills of one task."""
    max_age: int
    """Steps after which a skill that is neither shown nor renewed is forgotten."""
    min_lift: float = 0.0
    """Nats a token; a skill that lifts less wherever it was tried is dropped."""
    skills: dict[str, Skill] = field(default_factory=dict)
    made: int = 0
    """The number of skills that were ever made, which is also the number of the newest."""

    def add(self, lesson: Lesson, source: Source, *, pdi: float) -> Skill | None:
        """Add a new skill, or a new version of a skill that says nearly the same. Return None where nothing is new.

        Raises DataError for an episode that is not of a training task: evaluation must meet what no teacher saw.
        """
        if not source.task.startswith("train/"):
            raise DataError(f"a skill was made of an episode of {source.task}: only training tasks may teach")
        source = replace(source, prompt=shorten(source.prompt, PROMPT_CHARACTERS))
        for known in self.skills.values():
            if known.lesson == lesson:
                also = known.also if source.task in known.tasks else (*known.also, source.task)
                self.skills[known.id] = replace(known, also=also, used=source.step)
                return None
        own = self._skills_of(source.task)
        by_hand = (text for s in own if s.by_hand for text in (s.lesson.text, *s.history))
        if any(jaccard(text, lesson.text) >= ALIKE for text in by_hand):
            return None  # a person's word stands, and what it took the place of does not come back
        near = max(own, key=lambda s: jaccard(s.lesson.text, lesson.text), default=None)
        if near is not None and jaccard(near.lesson.text, lesson.text) >= ALIKE:
            skill = replace(near.next_version(lesson), source=source, pdi=pdi, used=source.step)
        else:
            self.made += 1
            skill = Skill(id=f"s{self.made:05d}", lesson=lesson, source=source, pdi=pdi, used=source.step)
        self.skills[skill.id] = skill
        return skill

    def take(self, skill: Skill) -> Skill:
        """Put a skill as a person left it in place of the bank's version, whose counts it keeps. Return the result.

        Its number is given to no other skill, also where the bank was restored from before that skill was made.
        """
        if (known := self.skills.get(skill.id)) is not None:
            version = max(skill.version, known.version + 1)
            skill = replace(
                skill,
                version=version,
                also=known.also,
                shown=known.shown,
                reward=known.reward,
                used=known.used,
            )
        self.made = max(self.made, int(skill.id[1:]))
        self.skills[skill.id] = skill
        return skill

    def add_trials(self, id: str, gains: Mapping[Where, Sequence[float]]) -> Skill | None:
        """Average the results of further trials of a skill into its lifts, in nats a token by place.

        Drop the skill and return None where no lift reaches `min_lift` and no person changed it.
        """
        skill = self.skills[id]
        lifts, trials = dict(skill.lifts), dict(skill.trials)
        for where, values in gains.items():
            before = trials.get(where, 0)
            trials[where] = before + len(values)
            lifts[where] = (lifts.get(where, 0.0) * before + math.fsum(values)) / trials[where]
        if max(lifts.values()) < self.min_lift and not skill.by_hand:
            del self.skills[id]
            return None
        self.skills[id] = replace(skill, lifts=lifts, trials=trials)
        return self.skills[id]

    def credit(self, ids: Iterable[str], rewards: Sequence[float], *, step: int) -> None:
        """Count for each skill the episodes whose teacher was shown it in this step, and their rewards."""
        for id in ids:
            skill = self.skills[id]
            self.skills[id] = replace(
                skill,
                shown=skill.shown + len(rewards),
                reward=skill.reward + math.fsum(rewards),
                used=step,
            )

    def forget(self, step: int) -> int:
        """Drop skills that are too old, too many for their task, or too many for the bank. Return how many.

        What a person changed is never dropped. A retired skill takes no room: it is kept only so that the same skill
        is not made again.
        """
        before = len(self.skills)
        live = [s for s in self.skills.values() if not s.retired and (s.by_hand or step - s.used <= self.max_age)]
        of_task = Counter[str]()
        chosen: list[Skill] = []
        for skill in sorted(live, key=_worth, reverse=True):
            if skill.by_hand or (len(chosen) < self.capacity and of_task[skill.source.task] < self.per_task):
                of_task[skill.source.task] += 1
                chosen.append(skill)
        ids = {skill.id for skill in chosen}
        self.skills = {id: skill for id, skill in self.skills.items() if skill.retired or id in ids}
        return before - len(self.skills)

    def newest(self, task: str) -> Skill | None:
        """Return the newest skill of a task; None where it has none."""
        return max(self._skills_of(task), key=lambda skill: (skill.source.step, skill.id), default=None)

    def _skills_of(self, task: str) -> list[Skill]:
        return [skill for skill in self.skills.values() if task in skill.tasks]

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` reads, JSON-serialisable."""
        return {"made": self.made, "skills": [to_row(skill) for skill in self.skills.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state. Raises DataError for a row that is no skill, or is not of a training task."""
        self.made = state["made"]
        self.skills = {skill.id: skill for skill in map(from_row, state["skills"])}


def _worth(skill: Skill) -> tuple[bool, float, int, str]:
    """Return the order in which skills are kept: by hand first, then by the largest lift, then by the last use."""
    return (skill.by_hand, skill.lift or 0.0, skill.used, skill.id)
