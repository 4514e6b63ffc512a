"""OPSD: the student acts on the plain task; the same model, shown a reference solution, scores its tokens.

Source: Self-Distilled Reasoner (arXiv 2601.18734), equations 6 and 8, and the released code for the
temperature inside the loss. Here the episode may have many turns: the solution stands once, in the first
user message, and every sampled token of every turn is taught.

Left out: `reason_first` (the teacher writes an explanation before it scores).
"""

from __future__ import annotations

from pydantic import Field

from opd.losses import Divergence
from opd.trainers.loop.registry import register
from opd.trainers.parts.forms import DivergenceSetting
from opd.trainers.parts.shown import ShownConfig, ShownMethod
from opd.types import Sample, TrajectoryGroup


class OpsdConfig(ShownConfig):
    """Settings of `method: opsd`."""

    divergence: DivergenceSetting = Field(
        Divergence("forward_kl", clip=0.05),
        description="The divergence of teacher and student; the authors use the sampling temperature in it as well.",
    )


@register("opsd", OpsdConfig)
class Opsd(ShownMethod):
    """Self-distillation from a teacher that sees a reference solution (OPSD)."""

    config: OpsdConfig

    def annotate(self, group: TrajectoryGroup) -> list[Sample]:
        return [self.taught_sample(t, segment) for t in group.usable for segment in t.segments()]
