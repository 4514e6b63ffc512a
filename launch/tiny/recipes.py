"""The recipes of tiny models, one an environment: the episodes on which each is warm-started.

A warm start teaches the format, the tools, and how to use privileged text when it is there. It must not
teach the task itself: each recipe holds back some knowledge, so that the plain student stays far from
perfect while a teacher with privileged text in its prompt is nearly always right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from opd.envs.text_env import TextEnv
from opd.envs.worlds.arithmetic import ArithmeticEnv
from opd.envs.worlds.countdown import CountdownEnv
from opd.envs.worlds.countdown import call as combining
from opd.envs.worlds.countdown_solver import OPERATORS, Numbers, apply, steps
from opd.envs.worlds.lookup import ATTRIBUTES, FIELDS, MEANING, PEOPLE, RELATIONS, VALUES, LookupEnv, means
from opd.envs.worlds.sokoban import Push, SokobanPushEnv, note, offset
from opd.envs.worlds.sokoban_board import DIRECTIONS, State
from opd.teachers import privileged


class WarmStartEnv(Protocol):
    """An environment that knows how its current task is done well and done badly.

    For the form `skill` it also has `skill(rng)`: what an agent might have noted that helps with this task,
    among other things; for `other_skill`, `other_skill(rng)`: what it noted of tasks that have nothing to do with it.
    """

    def oracle(self) -> list[str]:
        """Return the actions of a perfect episode."""

    def blunder(self, rng: np.random.Generator) -> list[str]:
        """Return the actions of an episode that goes wrong as the student's do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aims:
    """What a warm start must have come to. Until it has, it goes on, in rounds: how far a given number of steps comes
    depends on the seed, and on how the processor rounds."""

    env: Callable[[], TextEnv]
    """Makes the world as it is, which the model is to act in; also a `WarmStartEnv`."""
    form: str
    """The privileged text with which it must act right."""
    informed: float
    """The least share of episodes that are right with this text."""
    plain: tuple[float, float]
    """The least and the largest share of those that are right without."""
    tasks: int = 400
    """The number of tasks of each kind, none of them trained on."""
    steps: int = 100
    """The length of a round."""
    rounds: int = 8
    """The most rounds that it goes on for."""


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
    `demonstration`, `feedback`, `attempt_right`, `attempt_wrong`, `skill`, or `other_skill`, where play is plain."""
    steps: int
    batch: int = 16
    rates: tuple[float, float] = (0.02, 3e-3)
    """Peak learning rates: of Muon for the matrices inside the layers, of AdamW for the rest."""
    plain: Callable[[Any, np.random.Generator], list[str]] = lambda env, _: list(env.oracle())
    """The actions of an episode without privileged text: what the student can do by itself."""
    aims: Aims | None = None
    """What `steps` must have come to; None: it ends there whatever came of it."""


def privileged_phrases() -> list[str]:
    """The sentences around privileged text, one token each: they are long and always the same."""
    templates = (
        privileged.SOLUTION,
        privileged.DEMONSTRATION,
        privileged.FEEDBACK,
        privileged.ATTEMPT,
        privileged.SKILL,
        privileged.SKILL_OF_LIKE_TASK,
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
        for word, fields in SLANG.items():
            self.slang[word] = fields[rng.integers(len(fields))]
        return self.slang

    def blunder(self, rng: np.random.Generator) -> list[str]:
        words = self.question.words
        fields = [*[list(RELATIONS)] * (len(words) - 1), list(ATTRIBUTES)]
        guessed = {i for i, word in enumerate(words) if word in SLANG} or {int(rng.integers(len(words)))}
        while True:
            plan = [str(rng.choice(fields[i])) if i in guessed else field for i, field in enumerate(self.plan)]
            actions = self.oracle(plan)
            if actions[-1] != self.oracle()[-1]:
                return actions
            guessed.add(len(words) - 1)  # a guess was right, or another path led to the same value

    def skill(self, rng: np.random.Generator) -> str:
        notes = {word: self.slang[word] for word in self.question.words if word in SLANG or rng.random() < 0.5}
        others = [word for word in MEANING if word not in notes]
        for word in rng.choice(others, int(rng.integers(1, 4)), replace=False):
            notes[str(word)] = self.slang[str(word)]
        lines = [f"{means(word, field)}." for word, field in notes.items()]
        return "\n".join(str(line) for line in rng.permutation(lines))


class KnownLookup(SlangLookup):
    """The look-up world as it is: every word has its one meaning. For a model that may teach."""

    def meanings(self, rng: np.random.Generator) -> Mapping[str, str]:
        self.slang = dict(MEANING)
        return self.slang


SLANG = {
    words[2]: [other for other in fields for _ in range(1 if other == field else 2)]
    for fields in (RELATIONS, ATTRIBUTES)
    for field, words in fields.items()
}
"""Return the words that are slang, and the fields to draw their meaning from."""


class WarmArithmetic(ArithmeticEnv):
    """Sums. Too few of them are shown plain for so small a model to learn to add."""

    def oracle(self) -> list[str]:
        return [str(self.result)]

    def blunder(self, rng: np.random.Generator) -> list[str]:
        return [str(self.result + int(rng.choice([-11, -10, -9, -1, 1, 9, 10, 11])))]


class WarmSokoban(SokobanPushEnv):
    """Sokoban, played plain by somebody who knows what a push is and makes any.

    So the student learns the rules and no plans; only privileged text makes it play to win.
    """

    def wander(self, rng: np.random.Generator) -> list[str]:
        """Return random pushes, until the puzzle is solved or lost, or the turns are used up."""
        state, actions = self.state, list[str]()
        while state in self.costs and state.boxes != self.room.goals and len(actions) != self.max_steps:
            ways = self._ways(state)
            push, state = ways[rng.integers(len(ways))]
            actions.append(self.call(push))
        return actions

    def blunder(self, rng: np.random.Generator) -> list[str]:
        """Return random pushes until the puzzle is lost; begin again after too many, or where only the right one is."""
        state, actions = self.state, list[str]()
        while state in self.costs:
            ways = [way for way in self._ways(state) if way[1].boxes != self.room.goals]
            if not ways or len(actions) == self.max_steps:
                state, actions = self.state, []
                continue
            push, state = ways[rng.integers(len(ways))]
            actions.append(self.call(push))
        return actions

    def _ways(self, state: State) -> list[tuple[Push, State]]:
        """Return every push that can be made, and where it leads."""
        ways = []
        for box in sorted(state.boxes):
            for direction in DIRECTIONS:
                behind = self.room.walk(state, 2 * box - self.room.ahead(box, direction))
                after = behind and self.room.move(behind, direction)
                if after is not None:
                    ways.append((Push(box, direction), after))
        return ways

    def skill(self, rng: np.random.Generator) -> str:
        where = offset(self.room, self.state)
        notes = {where: note(*where, [push.direction for push in self.pushes(self.state)])}
        while len(notes) < 3:
            down, right = rng.integers(-3, 4, size=2).tolist()
            ways = ["up" if down < 0 else "down"] * abs(down) + ["left" if right < 0 else "right"] * abs(right)
            if 0 < len(ways) <= 3:
                notes.setdefault((down, right), note(down, right, rng.permutation(ways).tolist()))
        return "\n".join(str(line) for line in rng.permutation(list(notes.values())))


class WarmCountdown(CountdownEnv):
    """Countdown, played plain by somebody who sees one step ahead: the last one, if it is right, or any step."""

    def wander(self, rng: np.random.Generator) -> list[str]:
        return self._random(rng, lambda after: after == (self.target,))

    def blunder(self, rng: np.random.Generator) -> list[str]:
        return self._random(rng, lambda after: after != (self.target,))

    def _random(self, rng: np.random.Generator, prefer: Callable[[Numbers], bool]) -> list[str]:
        """Return random steps: those that lead where it is preferred, as long as there are such."""
        left, actions = self.left, list[str]()
        while len(left) > 1:
            ways = [(step, apply(left, step)) for step in steps(left)]
            ways = [way for way in ways if prefer(way[1])] or ways
            step, left = ways[rng.integers(len(ways))]
            actions.append(combining(step))
        return actions


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
    aims=Aims(env=KnownLookup, form="plan", informed=0.985, plain=(0.3, 0.65)),
)  # fmt: skip

LOOKUP_EXPERT = replace(LOOKUP, env=KnownLookup, forms={"plain": 1.0}, aims=None)
"""Knows what the student of `LOOKUP` cannot, in the same tokens: a teacher for it."""

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

SOKOBAN = Recipe(
    env=WarmSokoban,
    words=DIRECTIONS,
    phrases=[
        "Solve this puzzle:\n", "######\n#", "#\n#", "#\n######", "\n> ######\n#", ", ", "push row ", "\npush row ",
        "push the box at row ", ", column ", "Lost: the box at row ", " must not be pushed ", ".", ".\n",
        "Goal ", " of the box: push ", "\n", " ", "Error: the way ", " is blocked\n######\n#",
        "Error: there is no box at row ", "Error: no way leads behind that box\n######\n#",
    ],
    forms={
        "plain": 0.24,
        "plan": 0.12,
        "solution": 0.18,
        "demonstration": 0.10,
        "feedback": 0.08,
        "attempt_right": 0.08,
        "attempt_wrong": 0.08,
        "skill": 0.12,
    },
    steps=700,
    rates=(7e-3, 6e-3),
    plain=WarmSokoban.wander,
)  # fmt: skip

COUNTDOWN = Recipe(
    env=WarmCountdown,
    words=("multiply", "add", "subtract", "divide"),
    phrases=[
        "Numbers: ", ". Target: ", ".", ", ", ", then ", ". Left: ", *(f" {op} " for op in OPERATORS), " = ", "\n",
        "> ", " is not ", ": after ", " it was out of reach.", *map(str, range(10, 101)),
    ],
    forms={
        "plain": 0.30,
        "plan": 0.12,
        "solution": 0.20,
        "demonstration": 0.10,
        "feedback": 0.08,
        "attempt_right": 0.08,
        "attempt_wrong": 0.12,
    },
    steps=1000,
    rates=(7e-3, 6e-3),
    plain=WarmCountdown.wander,
)  # fmt: skip

RECIPES = {
    "lookup": LOOKUP,
    "arithmetic": ARITHMETIC,
    "sokoban": SOKOBAN,
    "countdown": COUNTDOWN,
    "lookup-expert": LOOKUP_EXPERT,
}
