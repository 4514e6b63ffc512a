"""What a method is: answers to who teaches, what the teacher sees, and which token gets which loss.

A method's file holds its config, its registration and its class, and imports no torch. The loop
(`trainers/loop/loop.py`) calls the hooks below and knows no method by name.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from opd.backends.config import TrainConfig
from opd.config import Strict
from opd.episodes.config import RolloutConfig
from opd.losses import Losses
from opd.teachers.config import TeacherConfig
from opd.types import Message, Sample, TrajectoryGroup

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat
    from opd.trainers.loop.loop import Loop

METHODS = ("grpo", "lightning_opd", "opd", "opsd", "sd_zero", "sdpo", "sft", "skill_sd", "srpo", "vopd")
"""The modules under `trainers/` that register a method of the same name."""


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A registered method: its name in YAML, its config, and its class."""

    name: str
    config: type[Strict]
    cls: type[Method]
    summary: str


LIVE = TeacherConfig(weights="live", rate=None)
"""Holds no weights, and is never asked unless a method distils."""

_registry: dict[str, MethodSpec] = {}
M = TypeVar("M", bound="type[Method]")


class Method:
    """The hooks of a method. `annotate` and `losses` are what every method has.

    A method of several phases only has `stages`, each of which has the rest.
    """

    def __init__(self, config: Any, chat: ChatFormat) -> None:
        self.config = config
        self.chat = chat
        self.dropped: Counter[str] = Counter()
        """What `annotate` left out, by reason, since the loop last asked; a row's `dropped/<reason>`."""

    def annotate(self, group: TrajectoryGroup) -> list[Sample]:
        """The three questions, for the trajectories of one task."""
        raise NotImplementedError

    @property
    def losses(self) -> Losses:
        """Which components of the objective the samples' weights feed."""
        raise NotImplementedError

    @property
    def teacher(self) -> TeacherConfig:
        """Whose weights teach."""
        return LIVE

    def advice(self, rollout: RolloutConfig) -> list[str]:
        """What these settings allow and a person may not mean; notes of the plan. Known without a tokenizer."""
        return []

    def teacher_messages(self, messages: list[Message], privileged: dict[str, str]) -> list[Message]:
        """What the teacher reads in place of the task's first messages; also how its own success is measured."""
        return messages

    @property
    def needs_scores(self) -> bool:
        """Whether `weigh` reads what the teacher says of each token; it is then asked before training."""
        return False

    def stages(self) -> Sequence[Method]:
        """The runs of the loop that this method is made of, one after the other: by default one, its own.

        Each stage starts from the weights that the one before it ended with, with a new optimiser, and is a method
        of its own: a teacher that is `frozen` is the model at the start of the stage. Known without a tokenizer.
        """
        return (self,)

    def schedule(self, train: TrainConfig) -> TrainConfig:
        """What this stage trains with, given the run's settings; `opd.config.StageConfig.over` does the usual."""
        return train

    def prepare(self, loop: Loop, folder: Path) -> dict[str, float]:
        """Make what the stage needs, on all ranks, before its first step; or, after a restart, find it in `folder`.

        The folder is the run's `data/`, which all stages share. Here a stage may play episodes that it does not train
        on yet (`loop.play`), and must stop soon, leaving whole files, once `loop.stopping()` holds.
        Returns what it made in numbers, for the row of the stage's first step.
        """
        return {}

    trains = True
    """Whether the stage has steps. One without them only prepares what later stages need."""

    def kept(self, folder: Path, made: Mapping[str, float]) -> bool:
        """Whether what a stage without steps made, in these numbers, is still in `folder`; else it is made anew."""
        return True

    asks = True
    """Whether its teacher, if its losses distil, is asked while it trains; else the samples hold what was said."""

    borrowed: str | None = None
    """The name of another model that a stage without steps takes in place of the run's own, to play or to score. It
    is given the run's own chat template."""

    first_task = 0
    """The index of the first task that this stage plays; those before it are another stage's."""

    dataset: Sequence[Sample] | None = None
    """What a stage trains on in place of episodes, the same on all ranks; `prepare` reads it.

    A step takes `train.tasks_per_step` of them, in an order that is drawn anew for every pass over them.
    """

    def weigh(self, samples: list[Sample], all_sum: Callable[[list[float]], list[float]]) -> list[Sample]:
        """The step's samples, in the same order, with weights that depend on all of them.

        `all_sum` adds up each value over all ranks. With `needs_scores` the samples that have a teacher's view hold
        `teacher_logprobs` and `teacher_entropy`.
        """
        return samples

    def observe(self, groups: list[TrajectoryGroup]) -> None:
        """Learn from finished episodes after the step: those of all ranks, on all of them."""

    def metrics(self) -> dict[str, float]:
        """Numbers about what the method keeps, for the row of a step; asked after `observe`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart; JSON-serialisable."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""


def register(name: str, config: type[Strict]) -> Callable[[M], M]:
    """Class decorator: make a method known under `name`, with its own section of that name."""

    def add(cls: M) -> M:
        summary = (cls.__doc__ or "").strip().split("\n")[0]
        _registry[name] = MethodSpec(name=name, config=config, cls=cls, summary=summary)
        return cls

    return add


def methods() -> dict[str, MethodSpec]:
    """Every method, by its name in YAML, in the order of `METHODS` whatever was imported first."""
    for name in METHODS:
        importlib.import_module(f"opd.trainers.{name}")
    return {name: _registry[name] for name in METHODS} | _registry
