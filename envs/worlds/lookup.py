"""Asks questions about people that take a few look-ups and an answer: a small world for tool agents.

A task is a table of people, redrawn from its seed, and a question such as "What is the hue of the trainer of
the boss of ann?". Each field of the table goes by three words in questions but by one name in the tools, so an
agent must know which field a word means, carry each result into the next call, and stop in time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from opd.envs.text_env import Start, task_split
from opd.envs.tool_env import ToolEnv, ToolError, tool
from opd.errors import ConfigError, EnvError
from opd.tool_calls import format_call

SYSTEM = "Answer the question: look up one field of one person at a time, then give the answer."

PEOPLE = (
    "alice", "ann", "ben", "boris", "carl", "clara", "dana", "diego", "elena", "emma", "felix", "fred", "gina",
    "greta", "hugo", "ivan", "judy", "kate", "liam", "mona", "nina", "omar", "paul", "quinn", "rosa", "sam",
    "tina", "umar", "vera", "walt", "yuri", "zoe",
)  # fmt: skip

RELATIONS = {
    "boss": ("boss", "manager", "supervisor"),
    "coach": ("coach", "trainer", "instructor"),
    "doctor": ("doctor", "physician", "medic"),
    "friend": ("friend", "buddy", "pal"),
    "lawyer": ("lawyer", "attorney", "counsel"),
    "rival": ("rival", "opponent", "competitor"),
}
"""Fields that hold another person, each with the words for it in questions."""

ATTRIBUTES = {
    "car": ("car", "vehicle", "automobile"),
    "city": ("city", "town", "residence"),
    "color": ("color", "hue", "shade"),
    "drink": ("drink", "beverage", "refreshment"),
    "hobby": ("hobby", "pastime", "interest"),
    "job": ("job", "profession", "occupation"),
}
"""Fields that hold a value, each with the words for it in questions."""

VALUES = {
    "car": ("coupe", "jeep", "limo", "pickup", "sedan", "truck", "van", "wagon"),
    "city": ("cairo", "delhi", "lima", "oslo", "paris", "quito", "rome", "tokyo"),
    "color": ("black", "blue", "gray", "green", "orange", "pink", "red", "white"),
    "drink": ("beer", "cider", "cocoa", "cola", "juice", "milk", "tea", "water"),
    "hobby": ("chess", "golf", "judo", "piano", "poetry", "skiing", "tennis", "yoga"),
    "job": ("actor", "baker", "chef", "clerk", "judge", "miner", "nurse", "pilot"),
}

FIELDS = {**RELATIONS, **ATTRIBUTES}
MEANING = {word: field for field, words in FIELDS.items() for word in words}
"""The field that a word in a question stands for."""

_RELATION_WORDS = tuple(word for words in RELATIONS.values() for word in words)
_ATTRIBUTE_WORDS = tuple(word for words in ATTRIBUTES.values() for word in words)
_DRAWS = 10_000


@dataclass(frozen=True, slots=True)
class Question:
    """Holds a chain of words from a person to a value, in the order in which they are looked up."""

    person: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"What is the {' of the '.join(reversed(self.words))} of {self.person}?"


class LookupEnv(ToolEnv):
    """Look up fields of people, one call at a time, then answer. Reward 1 for the right answer, else 0.

    Privileged are `plan` (the fields to look up, in order) and `solution` (the look-ups with their results).
    No question is in two splits, whatever the table behind it.

    Args:
        hops: how many look-ups a question may take; evenly mixed, by the task's index where there is one.
        max_steps: truncate after this many turns; by default two more than the longest question takes.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  (gymnasium's own declaration)
        "render_modes": [],
        "tasks": {"train": None, "eval": None, "warm": None},
    }

    def __init__(self, *, hops: Sequence[int] = (1, 2, 3), max_steps: int | None = None) -> None:
        if not hops or min(hops) < 1:
            raise ConfigError(f"hops = {list(hops)} must name at least one number of look-ups, each 1 or more")
        super().__init__(max_steps=max(hops) + 2 if max_steps is None else max_steps)
        self.hops = tuple(hops)
        self.question = Question(person="", words=())
        self.plan: tuple[str, ...] = ()
        self._table: dict[str, dict[str, str]] = {}
        self._read: list[str] = []

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        number = int(rng.integers(len(self.hops))) if index is None else index
        self.question = _draw_question(rng, self.hops[number % len(self.hops)], split)
        meaning = self.meanings(rng)
        self.plan = tuple(meaning[word] for word in self.question.words)
        self._table = _draw_table(rng)
        self._read = []
        return Start(
            prompt=str(self.question),
            system=SYSTEM,
            privileged={"plan": ", ".join(self.plan), "solution": self._solution()},
        )

    def meanings(self, rng: np.random.Generator) -> Mapping[str, str]:
        """Return the field that each word stands for in this task; a subclass may draw it with `rng`."""
        return MEANING

    @tool
    def get(self, person: str, field: str) -> str:
        """Look up one field of one person.

        Args:
            person: the person's name
            field: boss, coach, doctor, friend, lawyer, rival, car, city, color, drink, hobby or job
        """
        if person not in self._table:
            raise ToolError(f"there is nobody called {person[:80]!r}")
        if field not in FIELDS:
            raise ToolError(f"there is no field {field[:80]!r}; the fields are {', '.join(FIELDS)}")
        self._read.append(field)
        return self._table[person][field]

    @tool
    def answer(self, value: str) -> str:
        """Answer the question. This ends the task.

        Args:
            value: what the last look-up returned
        """
        right = value == self._follow(self.plan)[-1]
        self.finish(float(right), success=right, feedback=None if right else self._explain())
        return "right" if right else "wrong"

    def oracle(self, plan: Sequence[str] | None = None) -> list[str]:
        """Return the actions of a perfect episode, or those of an agent that reads the fields of another `plan`."""
        fields = self.plan if plan is None else plan
        *people, value = self._follow(fields)
        gets = [_call("get", person=person, field=field) for person, field in zip(people, fields, strict=True)]
        return [*gets, _call("answer", value=value)]

    def _follow(self, plan: Sequence[str]) -> list[str]:
        """Return the person asked about, then what each look-up of the plan returns."""
        path = [self.question.person]
        for field in plan:
            path.append(self._table[path[-1]][field])
        return path

    def _solution(self) -> str:
        path = self._follow(self.plan)
        steps = zip(self.plan, path, path[1:], strict=False)
        return "\n".join([*(f"{field} of {person}: {found}" for field, person, found in steps), f"answer: {path[-1]}"])

    def _explain(self) -> str:
        """Say what was wrong, without the answer: the words that were taken for another field."""
        wrong = [
            f"{means(word, field)}, {f'not {read}' if read else 'which was not looked up'}"
            for word, field, read in zip_longest(self.question.words, self.plan, self._read[: len(self.plan)])
            if read != field
        ]
        return f"Wrong answer: {'; '.join(wrong) or 'it is not what the last look-up returned'}."


def means(word: str, field: str) -> str:
    """Say, as feedback and skills do, that a word in a question stands for a field."""
    return f"{word} means {field}"


def _draw_question(rng: np.random.Generator, hops: int, split: str) -> Question:
    for _ in range(_DRAWS):
        relations = [_RELATION_WORDS[n] for n in rng.integers(len(_RELATION_WORDS), size=hops - 1)]
        attribute = _ATTRIBUTE_WORDS[rng.integers(len(_ATTRIBUTE_WORDS))]
        question = Question(PEOPLE[rng.integers(len(PEOPLE))], (*relations, attribute))
        if task_split(str(question)) == split:
            return question
    raise EnvError(f"no question of {hops} look-ups is in split {split!r}")


def _draw_table(rng: np.random.Generator) -> dict[str, dict[str, str]]:
    """Draw every field of everyone. Nobody is their own boss."""
    size = len(PEOPLE)
    others = (np.arange(size)[:, None] + rng.integers(1, size, (size, len(RELATIONS)))) % size
    picks = rng.integers([len(VALUES[field]) for field in ATTRIBUTES], size=(size, len(ATTRIBUTES)))
    return {
        person: {field: PEOPLE[n] for field, n in zip(RELATIONS, row, strict=True)}
        | {field: VALUES[field][n] for field, n in zip(ATTRIBUTES, choice, strict=True)}
        for person, row, choice in zip(PEOPLE, others.tolist(), picks.tolist(), strict=True)
    }


def _call(name: str, **arguments: str) -> str:
    return format_call(name, arguments)
