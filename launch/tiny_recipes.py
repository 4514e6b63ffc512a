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

    The student so learns that these words can mean anything, and guesses; only privileged text tells. In the
    real world they have one meaning, which training has to find. Here it comes half as often as any other, so
    that the student's likeliest guess is wrong there, whatever the seed, and a sampled one is right at times.
    """

    def meanings(self, rng: np.random.Generator) -> Mapping[str, str]:
        self.slang = dict(MEANING)
        for word, fields in _SLANG.items():
            self.slang[word] = fields[rng.integers(len(fields))]
        return self.slang

    def blunder(self, rng: np.random.Generator) -> list[str]:
        words = self.question.words
        fields = [*[list(RELATIONS)] * (len(words) - 1), list(ATTRIBUTES)]
        guessed = {i for i, word in enumerate(words) if word in _SLANG} or {int(rng.integers(len(words)))}
        while True:
            plan = [str(rng.choice(fields[i])) if i in guessed else field for i, field in enumerate(self.plan)]
            actions = self.oracle(plan)
            if actions[-1] != self.oracle()[-1]:
                return actions
            guessed.add(len(words) - 1)  # a guess was right, or another path led to the same value

    def skill(self, rng: np.random.Generator) -> str:
        notes = {word: self.slang[word] for word in self.question.words if word in _SLANG or rng.random() < 0.5}
        others = [word for word in MEANING if word not in notes]
        for word in rng.choice(others, int(rng.integers(1, 4)), replace=False):
            notes[str(word)] = self.slang[str(word)]
        lines = [f"{means(word, field)}." for word, field in notes.items()]
        return "\n".join(str(line) for line in rng.permutation(lines))


_SLANG = {
    words[2]: [other for other in fields for _ in range(1 if other == field else 2)]
    for fields in (RELATIONS, ATTRIBUTES)
    for field, words in fields.items()
}
"""The words that are slang, and the fields to draw their meaning from."""


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
    steps=700,
)

RECIPES = {"lookup": LOOKUP, "arithmetic": ARITHMETIC}
