"""Chooses skills of a bank for a task, and words them for the task's teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from opd.teachers.privileged import of_like_task
from opd.trainers.skill_sd.bank import SkillBank
from opd.trainers.skill_sd.skill import Skill, Where
from opd.trainers.skill_sd.text import PROMPT_CHARACTERS, likeness, one_line, rarity, shorten, words

_TASK_CHARACTERS = 160


@dataclass(kw_only=True)
class Finder:
    """Finds the skills of a bank that are for a task: its own skills, and those of like tasks."""

    bank: SkillBank
    explore: float
    """The constant of the upper confidence bound."""
    min_likeness: float
    """The cosine from which another task's skill is for a task too."""
    untried: bool = False
    """True: also find skills that were never tried."""
    _rarity: tuple[tuple[tuple[str, int], ...], dict[str, float]] = field(default=((), {}), compare=False, repr=False)
    """The ids and versions of the skills that were counted last, and the rarity of their words."""

    def find(self, task: str, prompt: str, count: int) -> list[Skill]:
        """Return at most `count` skills for a task: its own by their upper confidence bound, then those of like tasks.

        Each has lifted the teacher in such a place before. Of like tasks, each next skill is the one that says most
        about the words of `prompt` that no chosen one has. A task without either kind gets none: a skill of an
        unrelated task would mislead its teacher.
        """
        known = list(self.bank.skills.values())
        own, like = ([s for s in known if self.usable(s, where)] for where in ("own", "like"))
        return [skill for skill, _ in self._choose(own, like, task, prompt, count)]

    def usable(self, skill: Skill, where: Where) -> bool:
        """True: a teacher may be shown the skill in such a place, since it has lifted there or a person wrote it."""
        if skill.retired:
            return False
        return self.untried or skill.by_hand or skill.lifts.get(where, -math.inf) >= self.bank.min_lift

    def find_untried(self, task: str, prompt: str, count: int) -> list[tuple[Skill, Where]]:
        """Return at most `count` skills that would be for a task, and have not been tried in such a place."""
        known = [skill for skill in self.bank.skills.values() if not skill.retired]
        own, like = ([skill for skill in known if where not in skill.lifts] for where in ("own", "like"))
        return self._choose(own, like, task, prompt, count)

    def _choose(
        self, own: Sequence[Skill], like: Sequence[Skill], task: str, prompt: str, count: int
    ) -> list[tuple[Skill, Where]]:
        """Choose at most `count`: of `own` the task's skills, then of `like` the skills of like tasks."""
        mine = [skill for skill in own if task in skill.tasks]
        shown = sum(skill.shown for skill in mine)
        mine = sorted(mine, key=lambda s: (-s.ucb(shown, self.explore), s.id))[:count]
        others = [skill for skill in like if task not in skill.tasks]
        theirs = self._choose_like(others, prompt, count - len(mine))
        return [*((skill, "own") for skill in mine), *((skill, "like") for skill in theirs)]

    def _choose_like(self, others: list[Skill], prompt: str, count: int) -> list[Skill]:
        """Choose at most `count` of `others`, the likest to the prompt first.

        Each choice halves the weights of the prompt's words that it has, so that the next one speaks of others.
        """
        left = {skill.id: _document(skill.source.prompt, skill.lesson.text) for skill in others}
        rare = self._word_rarity() if left else {}
        query = dict.fromkeys(words(shorten(prompt, PROMPT_CHARACTERS)), 1.0)
        chosen: list[Skill] = []
        while left and len(chosen) < count:
            scores = {id: likeness(query, document, rare) for id, document in left.items()}
            best = max(scores, key=lambda id: (scores[id], id))
            if scores[best] < self.min_likeness:
                break
            query = {word: weight / 2 if word in left[best] else weight for word, weight in query.items()}
            del left[best]
            chosen.append(self.bank.skills[best])
        return chosen

    def _word_rarity(self) -> dict[str, float]:
        """Return each word's rarity over all skills of the bank; count again only where these have changed."""
        skills = self.bank.skills.values()
        key = tuple((skill.id, skill.version) for skill in skills)
        if self._rarity[0] != key:
            self._rarity = (key, rarity(_document(skill.source.prompt, skill.lesson.text) for skill in skills))
        return self._rarity[1]


@lru_cache(maxsize=8192)
def _document(prompt: str, text: str) -> frozenset[str]:
    """Return the words by which a skill is found."""
    return frozenset(words(f"{prompt} {text}"))


def teacher_text(skill: Skill, task: str) -> str:
    """Return the skill's text for the teacher of `task`; a skill of another task says which one taught it."""
    if task in skill.tasks:
        return skill.lesson.text
    return of_like_task(skill.lesson.text, one_line(skill.source.prompt, _TASK_CHARACTERS))
