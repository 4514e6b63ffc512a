"""A stage as data: what is known of one run of the loop before any model or tokenizer is loaded.

A method tells its stages from its settings alone (`Method.stages`). Whoever plans, checks or builds a run reads them;
the object whose hooks run a stage is made by `Stage.make` when the stage begins. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from opd.backends.config import StageConfig, TrainConfig
from opd.episodes.config import RolloutConfig
from opd.losses import Losses
from opd.teachers.config import TeacherConfig
from opd.types import Sample

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat

LIVE = TeacherConfig(weights="live", rate=None)
"""The teacher of a stage that names none. It holds no weights, and nobody asks it unless the stage listens."""


def _no_notes(_: RolloutConfig) -> list[str]:
    return []


def _is_there(_: Path, __: Mapping[str, float]) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One run of the loop. It starts from the weights that the stage before it ended with, with a new optimiser.

    Raises ValueError for fields that its kind would leave unread.
    """

    make: Callable[[ChatFormat], Any]
    """Makes the `Method` whose hooks run the stage."""
    kind: Literal["train", "play", "score"] = "train"
    """`play` and `score` have no steps: they only prepare what later stages need."""
    model: str | None = None
    """play, score: the name of another model that takes the place of the run's own, with the run's chat template."""
    first_task: int = 0
    """The index of the first task that the stage plays; those before it belong to another stage."""
    holds: Callable[[Path, Mapping[str, float]], bool] = _is_there
    """play, score: True if the folder still holds what the stage made, given the numbers that it made it in. Else the
    stage is run anew."""
    over: StageConfig = StageConfig()  # noqa: RUF009  (frozen)
    """train: what differs from the run's `train`."""
    losses: Losses = Losses()  # noqa: RUF009
    """train: the components of the objective that the samples' weights feed."""
    teacher: TeacherConfig = LIVE
    """train: whose weights teach. A `frozen` teacher is the model at the start of the stage."""
    needs_scores: bool = False
    """train: `Method.weigh` reads what the teacher says of each token, so the teacher is asked before the updates."""
    stored: bool = False
    """train: the samples carry a teacher's stored scores, and nobody is asked."""
    on_dataset: bool = False
    """train: the steps take samples that `Method.prepare` finds, and play no episodes."""
    plays: int = 0
    """The tasks that `Method.prepare` plays, rollout.group_size times each."""
    played_again: int = 0
    """The most episodes of one of these tasks that are played at once, where they may be more than group_size."""
    notes: Callable[[RolloutConfig], list[str]] = _no_notes
    """Returns notes for the plan: what the settings allow and a person may not mean."""

    def __post_init__(self) -> None:
        trained = (self.over, self.losses, self.teacher, self.needs_scores, self.stored, self.on_dataset)
        if self.trains and (self.model is not None or self.holds is not _is_there):
            raise ValueError("a stage that trains has no use for `model` and `holds`")
        if not self.trains and trained != (StageConfig(), Losses(), LIVE, False, False, False):
            raise ValueError(f"a stage of kind {self.kind} trains nothing: it has no use for losses or a teacher")

    @property
    def acts(self) -> bool:
        """True: tasks are played, in its steps or before them. False: it reads a file, or what another stage made."""
        return bool(self.plays) or (self.trains and not self.on_dataset)

    @property
    def trains(self) -> bool:
        """True: the stage has steps."""
        return self.kind == "train"

    @property
    def listens(self) -> bool:
        """True: the teacher is asked while the stage trains, by the objective or before it for `Method.weigh`."""
        return not self.stored and (self.losses.distill is not None or self.needs_scores)

    def settings(self, train: TrainConfig) -> TrainConfig:
        """The run's training settings with the stage's own laid over them."""
        return self.over.over(train)

    def steps(self, train: TrainConfig) -> int:
        """The number of the stage's steps, given the run's training settings."""
        return self.settings(train).steps if self.trains else 0


@dataclass(frozen=True, slots=True)
class Prepared:
    """The numbers and the dataset that a stage made or found before its first step."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    """For the row of the stage's first step, and for `Stage.holds`."""
    dataset: Sequence[Sample] | None = None
    """The samples that the stage trains on in place of episodes, the same on all ranks. A step takes
    `train.tasks_per_step` of these samples, in an order that is drawn anew for every pass over them."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Names and paths that a method reads ahead of training, each by its key in the method's own section."""

    models: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, str] = field(default_factory=dict)
    readers: Mapping[str, Callable[[Path], object]] = field(default_factory=dict)
    """What looks into some of the files before a model is loaded. It raises OpdError for one that is not to be used."""
