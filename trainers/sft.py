"""SFT: cross-entropy on episodes as they stand: a teacher's, the model's own that were right, or those of a file.

`source: own` is rejection fine-tuning (RFT): the model plays, and learns what its environment called right. Every
assistant's token of every turn is learned, tool results and other prompts are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from opd.backends.config import StageConfig, TrainConfig
from opd.config import Strict, setting
from opd.errors import DataError
from opd.losses import CrossEntropy, Losses
from opd.teachers.config import TeacherConfig
from opd.trainers.base import Method, register
from opd.trainers.conversations import read_conversations
from opd.trainers.episodes import OWN, TEACHERS, EpisodeFile, Playing, collect, segments, summary
from opd.types import Sample, Segment, Trajectory, to_sample

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat
    from opd.trainers.loop import Loop


class ImitationConfig(Strict):
    """Which episodes are learned, and how they count."""

    keep: Literal["right", "all"] = Field(
        "right", description="Learn from episodes that the environment called solved, or from all."
    )
    reduction: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean", description="Mean over the step's tokens, or first within each sequence."
    )


class SftConfig(ImitationConfig):
    """Settings of `method: sft`."""

    source: Literal["teacher", "own", "file"] = Field(
        description="Whose episodes: another model's (teacher), the model's own (rejection fine-tuning), or those in a "
        "file."
    )
    teacher: TeacherConfig | None = setting(
        None, when={"source": ["teacher"]}, needed="`weights: external` and its `model`", description="Who plays."
    )
    tasks: int | None = setting(
        None,
        when={"source": ["teacher", "own"]},
        needed="how many are played",
        ge=1,
        description="Tasks that are played, rollout.group_size times each.",
    )
    file: str | None = setting(
        None,
        when={"source": ["file"]},
        needed="its path",
        description='JSON lines, {"messages": [...]} with `tools` and `success` where there are.',
    )

    @model_validator(mode="after")
    def _another_model_teaches(self) -> SftConfig:
        if self.teacher is not None and self.teacher.weights != "external":
            raise ValueError(
                f"teacher.weights = {self.teacher.weights} is the model itself; set weights: external and model, or "
                "source: own"
            )
        return self


@register("sft", SftConfig)
class Sft(Method):
    """Supervised fine-tuning on a teacher's episodes, on own ones that were right (RFT), or on a file."""

    config: SftConfig

    def stages(self) -> Sequence[Method]:
        config = self.config
        imitating = Imitating(config, self.chat, source=config.source, tasks=config.tasks, file=config.file)
        if config.teacher is None:
            return (imitating,)
        assert config.tasks is not None
        return (Playing(config, self.chat, tasks=config.tasks, model=config.teacher.model), imitating)


class Imitating(Method):
    """Learns from episodes that were played before, or plays its own first."""

    config: ImitationConfig

    def __init__(
        self,
        config: ImitationConfig,
        chat: ChatFormat,
        *,
        source: Literal["teacher", "own", "file"],
        tasks: int | None = None,
        file: str | None = None,
        over: StageConfig = StageConfig(),  # noqa: B008  (frozen)
    ) -> None:
        super().__init__(config, chat)
        self.source, self.tasks, self.file, self.over = source, tasks, file, over

    def schedule(self, train: TrainConfig) -> TrainConfig:
        return self.over.over(train)

    @property
    def losses(self) -> Losses:
        return Losses(ce=CrossEntropy(), reduction=self.config.reduction)

    def prepare(self, loop: Loop, folder: Path) -> dict[str, float]:
        made: dict[str, float] = {}
        where = folder / (TEACHERS if self.source == "teacher" else OWN)
        only_right = self.config.keep == "right"
        if self.file is not None:
            where = Path(self.file).expanduser()
            read = loop.backend.ranks.from_first(lambda: read_conversations(where, self.chat))
            found = [(t, s) for t in read if t.success or not only_right for s in t.segments()]
        else:
            file = EpisodeFile(where)
            if self.source == "own":
                assert self.tasks is not None
                rows = collect(loop, file, self.tasks, name="the run's model")
                made = summary(rows)
            else:
                rows = loop.backend.ranks.from_first(lambda: file.read()[1])
            if loop.stopping():
                return made
            found = list(segments(rows, only_right=only_right))
        self.dataset = self._fitting(found, loop.rollout.max_length, where)
        return made | {
            "collect/kept": float(len(self.dataset)),
            "dropped/too_long": float(len(found) - len(self.dataset)),
        }

    def _fitting(self, found: Sequence[tuple[Trajectory, Segment]], most: int, where: Path) -> list[Sample]:
        """What is not too long. Raises DataError if nothing is left."""
        samples = [to_sample(trajectory, segment, ce=1.0, route="ce") for trajectory, segment in found]
        kept = [sample for sample in samples if len(sample.token_ids) <= most]
        if not kept:
            raise DataError(
                f"{where} holds nothing to learn from: {len(found)} sequences with keep = {self.config.keep}, none of "
                f"at most rollout.max_length = {most} tokens"
            )
        return kept
