"""A skill: what it says, where it comes from, how it has fared, and its row in files and checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from opd.errors import DataError
from opd.trainers.skill_sd.text import one_line

if TYPE_CHECKING:
    from opd.types import Trajectory

OLD_TEXTS = 4
"""A skill's history holds at most this many earlier texts."""
Where = Literal["own", "like"]
"""A place to show a skill: a task that it was made of (own), or a task that speaks of the same things (like)."""
_EXACT = ConfigDict(extra="forbid", strict=True)
"""A row of a file is a skill only where it has these fields, of these very types."""
_LABELS = {"workflow": "Workflow: ", "success": "What worked: ", "mistakes": "Avoid: "}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """The text of a skill in three parts: the steps, what worked, what went wrong. Each may be empty, not all."""

    __pydantic_config__ = _EXACT
    workflow: str = ""
    success: str = ""
    mistakes: str = ""

    @property
    def text(self) -> str:
        """The parts that are not empty, a line each, each behind its label."""
        return "\n".join(label + getattr(self, name) for name, label in _LABELS.items() if getattr(self, name))

    def map(self, change: Callable[[str], str]) -> Lesson:
        """Return the lesson with `change` applied to each part."""
        return Lesson(**{name: change(getattr(self, name)) for name in _LABELS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The origin of a lesson."""

    __pydantic_config__ = _EXACT
    task: str
    """The training task, as `train/INDEX`."""
    prompt: str
    """The task's text; like tasks are found by its words."""
    episodes: tuple[str, ...]
    """The episodes that it was made of, each as `step-N/TASK/MEMBER`."""
    step: int
    """The number of steps that the run had made."""
    policy_version: int
    """The version of the weights that played these episodes; of several, the newest."""
    summariser: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Skill:
    """A lesson, where it comes from, and how it has fared."""

    __pydantic_config__ = _EXACT
    id: Annotated[str, Field(pattern=r"^s\d{5,12}$")]
    """`s` and its number, of at least five digits."""
    version: int = 1
    lesson: Lesson
    source: Source
    also: tuple[str, ...] = ()
    """Other tasks whose episodes taught the same."""
    pdi: float = 0.0
    """Its Posterior Distillation Index: how well its episodes support it (`opd.trainers.skill_sd.grounding`)."""
    lifts: dict[Where, float] = field(default_factory=dict)
    """The mean of its trials by place: nats a token by which it raises the teacher's log-prob of right episodes more
    than that of wrong ones. Right and wrong ones are of one task, and it was made of none of them."""
    trials: dict[Where, int] = field(default_factory=dict)
    """The number of its trials by place, each on one task's episodes of one step."""
    shown: int = 0
    """The number of episodes whose teacher was shown it."""
    reward: float = 0.0
    """The sum of their rewards."""
    used: int = 0
    """The last step in which it was made, renewed or shown."""
    edited: str | None = None
    """The person who changed its text by hand, and the time; None: nobody did."""
    retired: bool = False
    """True: a person took it out. It is never shown, and never made again."""
    history: tuple[str, ...] = ()
    """The texts of earlier versions, the oldest first."""

    @property
    def by_hand(self) -> bool:
        """True: a person edited or retired it, and the run must not undo that."""
        return self.edited is not None or self.retired

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that taught it, the one of its source first."""
        return (self.source.task, *self.also)

    @property
    def lift(self) -> float | None:
        """Its largest lift over the places, in nats a token; None: it was not tried yet."""
        return max(self.lifts.values(), default=None)

    def ucb(self, shown: int, explore: float) -> float:
        """Return its upper confidence bound, `mean reward + explore * sqrt(log(shown) / own shown)`.

        `shown` counts the episodes that were shown it or a skill that it competes with. Infinite for a skill that was
        never shown.
        """
        if not self.shown:
            return math.inf
        return self.reward / self.shown + explore * math.sqrt(math.log(max(shown, 1)) / self.shown)

    def next_version(self, lesson: Lesson) -> Skill:
        """Return the next version, with another text and without the trials, which measured the old text."""
        history = (*self.history, self.lesson.text)[-OLD_TEXTS:]
        return replace(self, version=self.version + 1, lesson=lesson, history=history, lifts={}, trials={})


_ROW = TypeAdapter(Skill)


def episode_name(step: int, episode: Trajectory) -> str:
    """Return an episode's name in `Source.episodes`: `step-N/TASK/MEMBER`."""
    return f"step-{step}/{episode.task.id}/{episode.member}"


def to_row(skill: Skill) -> dict[str, Any]:
    """Return the skill as a row of the file and of checkpoints: its id and its text first, then all its fields."""
    row = asdict(skill)
    return {"id": row.pop("id"), "text": skill.lesson.text, **row}


def from_row(row: Any) -> Skill:
    """Return the skill of a row that `to_row` made. Raises DataError for any other row."""
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
