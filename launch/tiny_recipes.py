"""What a tiny model is warm-started on, one recipe an environment.

A warm start teaches the format, the tools, and how to use privileged text when it is there. It must not
teach the task itself: each recipe holds back some knowledge, so that the plain student stays far from
perfect while a teacher with privileged text in its prompt is nearly always right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from opd import privileged
from opd.envs.arithmetic import ArithmeticEnv
from opd.envs.lookup import ATTRIBUTES, FIELDS, MEANING, PEOPLE, RELATIONS, VALUES, LookupEnv, means
from opd.envs.text_env import TextEnv


class WarmStartEnv(Protocol):
    """An environment that knows how its current task is done well and done badly.

    For the form `skill` it also has `skill(rng)`: what an agent might have noted that helps with this task,
    among other things.
    """

    def oracle(self) -> list[str]:
        """The actions of a perfect episode."""

    def blunder(self, rng: np.random.Generator) -> list[str]:
        """The actions of an episode that goes wrong as the student's do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the tiny model of one environment is made."""

    env: Callable[[], TextEnv]
    """Makes an environment that is also a `WarmStartEnv`."""
    words: Sequence[str]
    """What gets one token each."""
    phrases: Sequence[str]
    """Fixed texts that get one token each."""
    forms: Mapping[str, float]
    """The share of each form of context: `plain`, the name of a privileged text of the environment,
    `demonstration`, `feedback`, `attempt_right`, `attempt_wrong` or `skill`."""
    steps: int
    batch: int = 16


def privileged_phrases() -> list[str]:
    """The sentences around privileged text, one token each: they are long and always the same."""
    templates = (
        privileged.SOLUTION,
        privileged.DEMONSTRATION,
        privileged.FEEDBACK,
        privileged.ATTEMPT,
        privileged.SKILL,
        privileged.CUE_RIGHT,
        privileged.CUE_WRONG,
    )
    return [part for template in templates for part in re.split(r"\{[a-z]+\}", template) if part]


class SlangLookup(LookupEnv):
    """The look-up world where the third word of each field means another field in every task.

    The student so learns that these words can mean anything, and guesses; only the plan, a demonstration or
    a skill tells. In the real world they have one meaning, which training has to find.
    """

    def meanings(self, rng: np.random.Generator) -> Mapping[str, str]:
        self.slang = dict(MEANING)
        for fields in (RELATIONS, ATTRIBUTES):
            for words in fields.values():
                self.slang[words[2]] = str(rng.choice(list(fields)))
        return self.slang

    def blunder(self, rng: np.random.Generator) -> list[str]:
        words, plan = self.question.words, list(self.plan)
        guessed = [i for i, word in enumerate(words) if word in _SLANG] or [int(rng.integers(len(words)))]
        while tuple(plan) == self.plan:
            for i in guessed:
                plan[i] = str(rng.choice(list(ATTRIBUTES if i == len(words) - 1 else RELATIONS)))
        return self.oracle(plan)

    def skill(self, rng: np.random.Generator) -> str:
        notes = {word: self.slang[word] for word in self.question.words if word in _SLANG or rng.random() < 0.5}
        others = [word for word in MEANING if word not in notes]
        for word in rng.choice(others, int(rng.integers(1, 4)), replace=False):
            notes[str(word)] = self.slang[str(word)]
        lines = [f"{means(word, field)}." for word, field in notes.items()]
        return "\n".join(str(line) for line in rng.permutation(lines))


_SLANG = frozenset(words[2] for words in FIELDS.values())


class WarmArithmetic(ArithmeticEnv):
    """Sums. Too few of them are shown plain for so small a model to learn to add."""

    def oracle(self) -> list[str]:
        return [str(self.result)]

    def blunder(self, rng: np.random.Generator) -> list[str]:
        return [str(self.result + int(rng.choice([-11, -10, -9, -1, 1, 9, 10, 11])))]


LOOKUP = Recipe(
    env=SlangLookup,
    words=[*PEOPLE, *MEANING, *FIELDS, *(value for values in VALUES.values() for value in values)],
    phrases=[
        "What is the ", " of the ", " of ", "?", ": ", "\n", "answer: ", ", ", "\n> ", "> ", " means ", ", not ", "; ",
        "Wrong answer: ", ".", ".\n",
    ],
    forms={
        "plain": 0.36,
        "plan": 0.20,
        "solution": 0.14,
        "demonstration": 0.06,
        "feedback": 0.06,
        "attempt_right": 0.06,
        "attempt_wrong": 0.06,
        "skill": 0.06,
    },
    steps=500,
)  # fmt: skip

ARITHMETIC = Recipe(
    env=WarmArithmetic,
    words=["What", "is", "Answer", "with", "the", "number", "only"],
    phrases=["What is ", "? Answer with the number only.", " + ", " = ", ". The answer is ", ".", "\n", "> "],
    forms={
        "plain": 0.4,
        "solution": 0.25,
        "answer": 0.15,
        "demonstration": 0.05,
        "feedback": 0.05,
        "attempt_right": 0.05,
        "attempt_wrong": 0.05,
    },
    steps=300,
)

RECIPES = {"lookup": LOOKUP, "arithmetic": ARITHMETIC}
