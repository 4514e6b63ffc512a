"""Tiny models that read skills: warm-started on what the rules of `trainers/skill_sd/makers.py` write of an episode.

A model of half a million parameters reads what it was taught to read. These two are taught that a skill of their task,
or of a task with the same words, is to be used, and one of another task is not: there they play as without.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opd.envs.worlds.lookup import ATTRIBUTES, MEANING, PEOPLE, RELATIONS, Question
from opd.launch.tiny.recipes import LOOKUP, SLANG, SOKOBAN, Recipe, SlangLookup, WarmSokoban
from opd.launch.tiny.recipes import RECIPES as PLAIN_RECIPES
from opd.teachers.privileged import of_like_task
from opd.trainers.skill_sd.makers import by_rules
from opd.trainers.skill_sd.text import one_line

_TASK_CHARACTERS = 160


class SkillLookup(SlangLookup):
    """Return skills of other questions, asked in the same slang."""

    def skill(self, rng: np.random.Generator) -> str:
        slang = [word for word in self.question.words if word in SLANG]
        about = [word for word in slang if rng.random() < 0.9] or [str(rng.choice(list(MEANING)))]
        skills = [self._of_question(self._question_with(word, rng), rng) for word in about]
        while len(skills) < int(rng.integers(1, 4)):
            skills.append(self._of_question(self._question_with(str(rng.choice(list(MEANING))), rng), rng))
        return "\n".join(str(skill) for skill in rng.permutation(skills))

    def _question_with(self, word: str, rng: np.random.Generator) -> Question:
        relations = [w for w in MEANING if MEANING[w] in RELATIONS]
        attributes = [w for w in MEANING if MEANING[w] in ATTRIBUTES]
        hops = [str(w) for w in rng.choice(relations, int(rng.integers(0, 3)))]
        if word in attributes:
            return Question(str(rng.choice(PEOPLE)), (*hops, word))
        place = int(rng.integers(len(hops) + 1))
        return Question(str(rng.choice(PEOPLE)), (*hops[:place], word, *hops[place:][:1], str(rng.choice(attributes))))

    def _of_question(self, question: Question, rng: np.random.Generator) -> str:
        own = self.question, self.plan
        self.question, self.plan = question, tuple(self.slang[word] for word in question.words)
        try:
            kind = rng.random()
            done = self.oracle() if kind < 0.75 else []
            wrong = self.blunder(rng) if kind > 0.15 else []
            self._read = [line.split('"field": "')[1].split('"')[0] for line in wrong[:-1]]
            lesson = by_rules(done, [self._explain()] if wrong else [])
        finally:
            self.question, self.plan = own
        return of_like_task(lesson.text, one_line(str(question), _TASK_CHARACTERS))


class SkillSokoban(WarmSokoban):
    """Return skills of the puzzle itself, or of others that have nothing to do with it."""

    def skill(self, rng: np.random.Generator) -> str:
        done = self.oracle()
        kind = rng.random()
        lost = [self._lost(rng) for _ in range(int(rng.integers(1, 4)))] if kind > 0.3 else []
        return by_rules(done if kind < 0.85 else [], lost).text

    def other_skill(self, rng: np.random.Generator) -> str:
        other = SkillSokoban(level=1)
        skills = []
        for _ in range(int(rng.integers(1, 3))):
            prompt, _ = other.reset(seed=int(rng.integers(1 << 30)), options={"split": "warm"})
            skills.append(of_like_task(other.skill(rng), one_line(str(prompt), _TASK_CHARACTERS)))
        return "\n".join(skills)

    def _lost(self, rng: np.random.Generator) -> str:
        """Return what is said when the puzzle is lost in some way; the puzzle is then as it was."""
        start = self.state
        said = ""
        for action in self.blunder(rng):
            said = self.respond(action).feedback or ""
        self.state = start
        return said


def _phrases(*more: Sequence[str]) -> list[str]:
    return [phrase for phrases in more for phrase in phrases]


LOOKUP_SKILLS = Recipe(
    env=SkillLookup,
    words=LOOKUP.words,
    phrases=_phrases(
        LOOKUP.phrases,
        (
            "Workflow: get(person=", ", field=", "); get(person=", "); answer(value=", ")\n", ")", "?\n",
            "Avoid: Wrong answer: ", "From a like task: What is the ", "?\nWorkflow: get(person=",
            ")\nAvoid: Wrong answer: ", "?\nAvoid: Wrong answer: ", ", which was not looked up",
        ),
    ),
    forms={"plain": 0.26, "plan": 0.12, "solution": 0.12, "feedback": 0.08, "demonstration": 0.04, "skill": 0.38},
    steps=700,
    rates=(7e-3, 6e-3),
)  # fmt: skip

SOKOBAN_SKILLS = Recipe(
    env=SkillSokoban,
    words=SOKOBAN.words,
    phrases=_phrases(
        SOKOBAN.phrases,
        (
            "Workflow: push(row=", ", column=", ", direction=", "); push(row=", ")\n", ")",
            "Avoid: Lost: the box at row ", ")\nAvoid: Lost: the box at row ", ". Lost: the box at row ",
            "From a like task: Solve this puzzle: ###### #", "# #", "# ######",
        ),
    ),
    forms={
        "plain": 0.28,
        "plan": 0.08,
        "solution": 0.18,
        "demonstration": 0.06,
        "feedback": 0.04,
        "skill": 0.26,
        "other_skill": 0.10,
    },
    steps=600,
    rates=(7e-3, 6e-3),
    plain=WarmSokoban.wander,
)  # fmt: skip

RECIPES = PLAIN_RECIPES | {"lookup-skills": LOOKUP_SKILLS, "sokoban-skills": SOKOBAN_SKILLS}
