"""The base class of methods: a method answers who teaches, what the teacher sees, and which token gets which loss.

A method's file holds its config, its registration (`registry.register`) and its class, and imports no torch. The loop
(`loop.py`) calls the hooks below and knows no method by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.episodes.config import RolloutConfig
from opd.errors import ConfigError
from opd.losses import Losses
from opd.teachers.config import TeacherConfig
from opd.trainers.loop.stage import LIVE, Inputs, Prepared, Stage
from opd.types import Message, Sample, TrajectoryGroup

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat
    from opd.trainers.loop.play import Player


class Method:
    """The hooks of a method. Every method has `annotate` and `losses`; one that distils also names a `teacher`.

    The static hooks answer from the method's settings alone, before a tokenizer is loaded. An object runs one stage.
    """

    name = ""
    """The key of the method's section, for messages; `register` sets it. Empty for the class of a single stage."""

    def __init__(self, config: Any, chat: ChatFormat) -> None:
        self.config = config
        self.chat = chat
        self.dropped: Counter[str] = Counter()
        """Counts of what `annotate` left out, by reason, since the loop last asked; a row's `dropped/<reason>`."""

    # -- known from the settings alone

    @staticmethod
    def losses(config: Any) -> Losses:
        """The components of the objective that the samples' weights feed."""
        raise NotImplementedError

    @staticmethod
    def teacher(config: Any) -> TeacherConfig:
        """Return the teacher's settings, which name the weights that teach."""
        return LIVE

    @staticmethod
    def needs_scores(config: Any) -> bool:
        """True: `weigh` reads what the teacher says of each token, so the teacher is asked before the updates."""
        return False

    @staticmethod
    def advice(config: Any, rollout: RolloutConfig) -> list[str]:
        """Notes for the plan: what these settings allow and a person may not mean.

        Raises ConfigError where a run by them could learn nothing.
        """
        return []

    @classmethod
    def stages(cls, config: Any) -> Sequence[Stage]:
        """The runs of the loop that the method is made of, one after the other: by default one, of the answers above.

        A method of several stages answers with this hook alone, and names the class that runs each of them.
        """
        if cls.annotate is Method.annotate and cls.prepare is Method.prepare:
            raise ConfigError(f"the method {cls.name or cls.__name__} has no annotate, so that nothing makes samples")
        stage = Stage(
            make=partial(cls, config),
            losses=cls.losses(config),
            teacher=cls.teacher(config),
            needs_scores=cls.needs_scores(config),
            notes=partial(cls.advice, config),
        )
        return (stage,)

    @classmethod
    def inputs(cls, config: Any) -> Inputs:
        """Name what the method reads ahead of training: by default the teacher's model, if that is another one."""
        model = cls.teacher(config).model
        return Inputs(models={"teacher.model": model} if model else {})

    # -- while a stage runs

    def prepare(self, player: Player, folder: Path) -> Prepared:
        """Make what the stage needs, on all ranks, before its first step; or, after a restart, find it in `folder`.

        The folder is the run's `data/`, which all stages share. Here a stage may play episodes that it does not train
        on yet (`player.play`). It must stop soon, and leave whole files, once `player.stopping()` is true.
        """
        return Prepared()

    def annotate(self, group: TrajectoryGroup) -> list[Sample]:
        """Answer the three questions for the trajectories of one task, as samples with weights and teacher's views."""
        raise NotImplementedError

    def teacher_messages(self, messages: list[Message], privileged: dict[str, str]) -> list[Message]:
        """Return what the teacher reads in place of the task's first messages; its own success is measured so, too."""
        return messages

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
        """Return what must survive a restart, JSON-serialisable."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
