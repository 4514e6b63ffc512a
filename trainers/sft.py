"""SFT: cross-entropy on episodes as they stand, of a teacher, of the model itself where it was right, or of a file.

`source: own` is rejection fine-tuning (RFT): the model plays, and learns what its environment called right. Every
assistant's token of every turn is learned, tool results and other prompts are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from opd.config import PathText, setting
from opd.teachers.config import TeacherConfig
from opd.trainers.loop.method import Method
from opd.trainers.loop.registry import register
from opd.trainers.loop.stage import Inputs, Stage
from opd.trainers.parts.episodes import playing
from opd.trainers.parts.imitation import ImitationConfig, imitating


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
    file: PathText | None = setting(
        None,
        when={"source": ["file"]},
        needed="its path",
        description='JSON lines, {"messages": [...]} with `tools` and `success` where there are.',
    )

    leave_out: tuple[str, ...] = setting(
        (),
        when={"source": ["file"]},
        description="Keys of messages that the model's chat template does not render, and that you do not miss "
        "(`reasoning_content`, say). Others are refused.",
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

    @classmethod
    def stages(cls, config: SftConfig) -> Sequence[Stage]:
        last = imitating(config, source=config.source, tasks=config.tasks, file=config.file, leave_out=config.leave_out)
        if config.teacher is None:
            return (last,)
        assert config.tasks is not None
        return (playing(config, tasks=config.tasks, model=config.teacher.model), last)

    @classmethod
    def inputs(cls, config: SftConfig) -> Inputs:
        model = config.teacher and config.teacher.model
        return Inputs(
            models={"teacher.model": model} if model else {}, files={"file": config.file} if config.file else {}
        )
