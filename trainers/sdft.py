"""SDFT: the student acts on the plain task; a running average of it, shown a demonstration, scores its tokens.

Source: Self-Distillation Enables Continual Learning (arXiv 2601.19897), as its replicators describe it: the divergence
over the full vocabulary, a mean within each sequence and then over sequences, the first tokens of a response left out
(there a teacher tends to speak of the demonstration), and an average of the student as the teacher. The paper's
algorithm has KL(student || teacher), while the published runs were made with code whose default is the forward KL:
`divergence` takes either. Here an episode may have many turns: what is left out is the beginning of the first answer.

Left out: the capped ratio of trainer to sampler of a sequence, which `rollout.correction` gives to every method, and
the authors' wording of the teacher's prompt (`template`).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Literal

from pydantic import Field

from opd.losses import Divergence
from opd.teachers.config import TeacherConfig
from opd.trainers.loop.registry import register
from opd.trainers.parts.forms import DivergenceSetting
from opd.trainers.parts.shown import ShownConfig, ShownMethod
from opd.types import Sample, TrajectoryGroup


class SdftConfig(ShownConfig):
    """Settings of `method: sdft`."""

    teacher: TeacherConfig = Field(default_factory=lambda: TeacherConfig(weights="ema", rate=0.02))
    divergence: DivergenceSetting = Field(
        Divergence("forward_kl"), description="Of teacher and student: forward_kl as in the code, or reverse_kl."
    )
    reduction: Literal["token_mean", "sequence_mean"] = Field(
        "sequence_mean", description="Mean within each sequence first, or over all sampled tokens of the step."
    )
    skip: int = Field(3, ge=0, description="Tokens at the beginning of the first answer that are not distilled.")


@register("sdft", SdftConfig)
class Sdft(ShownMethod):
    """Self-distillation from an average of the model that sees a demonstration (SDFT)."""

    config: SdftConfig

    def annotate(self, group: TrajectoryGroup) -> list[Sample]:
        return [self._without_first(self.taught_sample(t, segment)) for t in group.usable for segment in t.segments()]

    def _without_first(self, sample: Sample) -> Sample:
        """Take the weight of the first `skip` tokens of the first answer away; the loss then has no term for them."""
        weights = list(sample.distill_weight)
        sampled_of_turn = zip(sample.completion_mask, sample.turn, strict=True)
        first_answer = (place for place, (sampled, turn) in enumerate(sampled_of_turn) if sampled and turn == 0)
        for place in islice(first_answer, self.config.skip):
            weights[place] = 0.0
        return replace(sample, distill_weight=weights)
