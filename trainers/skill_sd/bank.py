"""The bank: which skills there are, where they come from, and which of them are for a task.

The bank of a run holds skills of its training tasks and of no other: `add` refuses the rest. All that it does follows
from what it was told, in that order, so that the banks of all ranks are the same, and a restored one goes on alike.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from opd.errors import DataError
from opd.trainers.skill_sd.text import jaccard, likeness, one_line, rarity, shortened, words

ALIKE = 0.8
"""Two skills of one task whose words overlap so far are one skill, whose newer version counts."""
OLD_TEXTS = 4
"""Earlier texts that are kept of a skill."""
Where = Literal["own", "like"]
"""A skill's own task, and one that speaks of the same things."""
_PROMPT_CHARACTERS = 600
_EXACT = ConfigDict(extra="forbid", strict=True)
"""A row of a file is a skill only where it has these fields, of these very types."""
_LABELS = {"workflow": "Workflow: ", "success": "What worked: ", "mistakes": "Avoid: "}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What a skill says: how it is done, what worked, what went wrong. Each may be empty, not all."""

    __pydantic_config__ = _EXACT
    workflow: str = ""
    success: str = ""
    mistakes: str = ""

    @property
    def text(self) -> str:
        return "\n".join(label + getattr(self, name) for name, label in _LABELS.items() if getattr(self, name))

    def map(self, change: Callable[[str], str]) -> Lesson:
        """The lesson with `change` applied to each part."""
        return Lesson(**{name: change(getattr(self, name)) for name in _LABELS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a lesson comes from."""

    __pydantic_config__ = _EXACT
    task: str
    """The training task, as `train/INDEX`."""
    prompt: str
    """What the task said, by which like tasks are known."""
    episodes: tuple[str, ...]
    """`step-N/TASK/MEMBER` of each episode that it was made of."""
    step: int
    """Steps that the run had made."""
    policy_version: int
    """Of the weights that played these episodes."""
    summariser: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Skill:
    """A lesson, where it comes from, and how it has fared."""

    __pydantic_config__ = _EXACT
    id: Annotated[str, Field(pattern=r"^s\d{5,12}$")]
    """`s` and its number."""
    version: int = 1
    lesson: Lesson
    source: Source
    also: tuple[str, ...] = ()
    """Other tasks whose episodes taught the same."""
    pdi: float = 0.0
    """How well what happened supports it (`opd.trainers.skill_sd.grounding`)."""
    lifts: dict[Where, float] = field(default_factory=dict)
    """Nats a token that it adds, to the teacher, to right episodes above wrong ones of one task, none of which it was
    made of, where it was tried: on its own task, on a like one."""
    trials: dict[Where, int] = field(default_factory=dict)
    """Times that it was tried, each on one task's episodes of one step."""
    shown: int = 0
    """Episodes whose teacher was shown it."""
    reward: float = 0.0
    """The sum of their rewards."""
    used: int = 0
    """The step in which it was last made, renewed or shown."""
    edited: str | None = None
    """Who changed its text by hand, and when."""
    retired: bool = False
    """Taken out by a person: never shown, nor made again."""
    history: tuple[str, ...] = ()
    """Its texts before this version, the oldest first."""

    @property
    def by_hand(self) -> bool:
        """Whether a person's word on it stands."""
        return self.edited is not None or self.retired

    @property
    def tasks(self) -> tuple[str, ...]:
        return (self.source.task, *self.also)

    @property
    def lift(self) -> float | None:
        """The most that it lifts anywhere; None: not tried yet."""
        return max(self.lifts.values(), default=None)

    def ucb(self, shown: int, explore: float) -> float:
        """Mean reward and a bonus for what was seldom shown, of `shown` in all; what never was comes first."""
        if not self.shown:
            return math.inf
        return self.reward / self.shown + explore * math.sqrt(math.log(max(shown, 1)) / self.shown)

    def rewritten(self, lesson: Lesson) -> Skill:
        """The next version, with another text. What was measured of the old one no longer holds."""
        history = (*self.history, self.lesson.text)[-OLD_TEXTS:]
        return replace(
            self,
            version=self.version + 1,
            lesson=lesson,
            history=history,
            lifts={},
            trials={},
        )


_ROW = TypeAdapter(Skill)


@dataclass(kw_only=True)
class SkillBank:
    """Skills by id, in the order in which they were made."""

    capacity: int
    per_task: int
    max_age: int
    """Steps after which a skill that is neither shown nor renewed is forgotten."""
    explore: float
    """UCB's constant."""
    min_likeness: float
    """Cosine from which another task's skill is for a task too."""
    min_lift: float = 0.0
    """Nats a token that it must lift where it is shown."""
    untried: bool = False
    """Whether skills are found that were never tried, too."""
    skills: dict[str, Skill] = field(default_factory=dict)
    made: int = 0
    """Skills that were ever made: the next one's number."""
    _rare: tuple[tuple[tuple[str, int], ...], dict[str, float]] = field(default=((), {}), compare=False, repr=False)

    # -- what comes in ----------------------------------------------------------------------------------

    def add(self, lesson: Lesson, source: Source, *, pdi: float) -> Skill | None:
        """A new skill, or a new version of one that says nearly the same; None where nothing is new.

        Raises DataError for an episode that is not of a training task: evaluation must meet what no teacher saw.
        """
        if not source.task.startswith("train/"):
            raise DataError(f"a skill was made of an episode of {source.task}: only training tasks may teach")
        source = replace(source, prompt=shortened(source.prompt, _PROMPT_CHARACTERS))
        for known in self.skills.values():
            if known.lesson == lesson:
                also = known.also if source.task in known.tasks else (*known.also, source.task)
                self.skills[known.id] = replace(known, also=also, used=source.step)
                return None
        own = self._of(source.task)
        by_hand = (text for s in own if s.by_hand for text in (s.lesson.text, *s.history))
        if any(jaccard(text, lesson.text) >= ALIKE for text in by_hand):
            return None  # a person's word stands, and what it took the place of does not come back
        near = max(own, key=lambda s: jaccard(s.lesson.text, lesson.text), default=None)
        if near is not None and jaccard(near.lesson.text, lesson.text) >= ALIKE:
            skill = replace(near.rewritten(lesson), source=source, pdi=pdi, used=source.step)
        else:
            self.made += 1
            skill = Skill(id=f"s{self.made:05d}", lesson=lesson, source=source, pdi=pdi, used=source.step)
        self.skills[skill.id] = skill
        return skill

    def take(self, skill: Skill) -> Skill:
        """A skill as a person left it, in place of what became of it meanwhile; what it counted since stays.

        A bank from before the skill was made must not give its number to another one.
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

    def tried(self, id: str, gains: Mapping[Where, Sequence[float]]) -> Skill | None:
        """Enter what a skill's further trials found, by place; None where it is dropped for it."""
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
        """These were shown to the teacher of episodes that earned these rewards."""
        for id in ids:
            skill = self.skills[id]
            self.skills[id] = replace(
                skill,
                shown=skill.shown + len(rewards),
                reward=skill.reward + math.fsum(rewards),
                used=step,
            )

    def forget(self, step: int) -> int:
        """Drop what is old, what a task has too many of, and what there is no room for; how many.

        Never what a person changed. A retired skill takes nobody's room: it is kept for what must not be made again.
        """
        before = len(self.skills)
        live = [s for s in self.skills.values() if not s.retired and (s.by_hand or step - s.used <= self.max_age)]
        of_task = Counter[str]()
        chosen: list[Skill] = []
        for skill in sorted(live, key=self._worth, reverse=True):
            if skill.by_hand or (len(chosen) < self.capacity and of_task[skill.source.task] < self.per_task):
                of_task[skill.source.task] += 1
                chosen.append(skill)
        ids = {skill.id for skill in chosen}
        self.skills = {id: skill for id, skill in self.skills.items() if skill.retired or id in ids}
        return before - len(self.skills)

    def _worth(self, skill: Skill) -> tuple[bool, float, int, str]:
        """What is kept first: a person's, then what lifts most, then what was used last."""
        return (skill.by_hand, skill.lift or 0.0, skill.used, skill.id)

    # -- what goes out ----------------------------------------------------------------------------------

    def find(self, task: str, prompt: str, count: int) -> list[Skill]:
        """At most `count` skills for a task: its own by UCB, then those of like tasks.

        Of like tasks each time the one is taken that says most about what no other has spoken of yet. Each has lifted
        the teacher in such a place before. A task without either has none: what a teacher reads of a task that has
        nothing to do with its own misleads it.
        """
        known = list(self.skills.values())
        own, like = ([s for s in known if self.usable(s, where)] for where in ("own", "like"))
        return [skill for skill, _ in self._near(own, like, task, prompt, count)]

    def usable(self, skill: Skill, where: Where) -> bool:
        """Whether a skill may be shown there: it has lifted the teacher, or a person wrote it."""
        if skill.retired:
            return False
        return self.untried or skill.by_hand or skill.lifts.get(where, -math.inf) >= self.min_lift

    def waiting(self, task: str, prompt: str, count: int) -> list[tuple[Skill, Where]]:
        """At most `count` skills that would be for a task, and have not been tried in such a place."""
        known = [skill for skill in self.skills.values() if not skill.retired]
        own, like = ([skill for skill in known if where not in skill.lifts] for where in ("own", "like"))
        return self._near(own, like, task, prompt, count)

    def _near(
        self, own: Sequence[Skill], like: Sequence[Skill], task: str, prompt: str, count: int
    ) -> list[tuple[Skill, Where]]:
        """At most `count`: of `own` those that are the task's, then of `like` those of like tasks."""
        mine = [skill for skill in own if task in skill.tasks]
        shown = sum(skill.shown for skill in mine)
        mine = sorted(mine, key=lambda s: (-s.ucb(shown, self.explore), s.id))[:count]
        others = [skill for skill in like if task not in skill.tasks]
        theirs = self._like(others, prompt, count - len(mine))
        return [*((skill, "own") for skill in mine), *((skill, "like") for skill in theirs)]

    def _like(self, others: list[Skill], prompt: str, count: int) -> list[Skill]:
        """Skills of like tasks, the likest first."""
        left = {skill.id: _document(skill.source.prompt, skill.lesson.text) for skill in others}
        rare = self._rarity() if left else {}
        query = dict.fromkeys(words(shortened(prompt, _PROMPT_CHARACTERS)), 1.0)
        chosen: list[Skill] = []
        while left and len(chosen) < count:
            scores = {id: likeness(query, document, rare) for id, document in left.items()}
            best = max(scores, key=lambda id: (scores[id], id))
            if scores[best] < self.min_likeness:
                break
            query = {word: weight / 2 if word in left[best] else weight for word, weight in query.items()}
            del left[best]
            chosen.append(self.skills[best])
        return chosen

    def _rarity(self) -> dict[str, float]:
        """How much each word says, by all skills of the bank; counted anew where these have changed."""
        key = tuple((skill.id, skill.version) for skill in self.skills.values())
        if self._rare[0] != key:
            documents = [_document(skill.source.prompt, skill.lesson.text) for skill in self.skills.values()]
            self._rare = (key, rarity(documents))
        return self._rare[1]

    def _of(self, task: str) -> list[Skill]:
        return [skill for skill in self.skills.values() if task in skill.tasks]

    def last(self, task: str) -> Skill | None:
        """The newest skill of a task."""
        return max(self._of(task), key=lambda skill: (skill.source.step, skill.id), default=None)

    # -- what stays -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"made": self.made, "skills": [to_row(skill) for skill in self.skills.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made = state["made"]
        self.skills = {skill.id: skill for skill in map(from_row, state["skills"])}


@lru_cache(maxsize=8192)
def _document(prompt: str, text: str) -> frozenset[str]:
    """The words by which a skill is found."""
    return frozenset(words(f"{prompt} {text}"))


def to_row(skill: Skill) -> dict[str, Any]:
    """A skill as it stands in the file and in checkpoints."""
    row = asdict(skill)
    return {"id": row.pop("id"), "text": skill.lesson.text, **row}


def from_row(row: Any) -> Skill:
    """The reverse of `to_row`. Raises DataError for what is no such row."""
    try:
        skill = _ROW.validate_json(json.dumps({key: value for key, value in row.items() if key != "text"}))
        if skill.lifts.keys() != skill.trials.keys():
            raise ValueError("lifts and trials are not of the same places")
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise DataError(f"{one_line(repr(row), 120)} is no skill: {at}: {first['msg']}") from error
    except (TypeError, AttributeError, ValueError, RecursionError) as error:
        raise DataError(f"{one_line(repr(row), 120)} is no skill: {error}") from error
    if not all(task.startswith("train/") for task in skill.tasks):
        raise DataError(f"skill {skill.id} is of {', '.join(skill.tasks)}: only training tasks may teach")
    return skill
