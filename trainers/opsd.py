"""OPSD: the student acts on the plain task; the same model, shown a reference solution, scores its tokens.

Source: Self-Distilled Reasoner (arXiv 2601.18734), equations 6 and 8, and the released code for the
temperature inside the loss. Here the episode may have many turns: the solution stands once, in the first
user message, and every sampled token of every turn is taught.

Left out: `reason_first` (the teacher writes an explanation before it scores).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from opd.losses import Distill, Divergence, Losses
from opd.teachers.config import TeacherConfig
from opd.trainers.loop.registry import register
from opd.trainers.parts.forms import DivergenceSetting
from opd.trainers.parts.shown import ShownConfig, ShownMethod
from opd.types import Sample, TrajectoryGroup


class OpsdConfig(ShownConfig):
    """Settings of `method: opsd`."""

    teacher: TeacherConfig = Field(default_factory=lambda: TeacherConfig(weights="frozen", rate=None))
    divergence: DivergenceSetting = Field(
        Divergence("forward_kl", clip=0.05),
        description="The divergence of teacher and student; the authors use the sampling temperature in it as well.",
    )
    reduction: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean", description="Mean over all sampled tokens of the step, or first within each sequence."
    )


@register("opsd", OpsdConfig)
class Opsd(ShownMethod):
    """Self-distillation from a teacher that sees a reference solution (OPSD)."""

    config: OpsdConfig

    @staticmethod
    def losses(config: OpsdConfig) -> Losses:
        return Losses(distill=Distill(divergence=config.divergence), reduction=config.reduction)

    @staticmethod
    def teacher(config: OpsdConfig) -> TeacherConfig:
        return config.teacher

    def annotate(self, group: TrajectoryGroup) -> list[Sample]:
        return [self.taught_sample(t, segment) for t in group.usable for segment in t.segments()]
