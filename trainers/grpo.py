"""GRPO: episodes of one task are compared with each other, and the better ones made likelier. The baseline.

Source: DeepSeekMath (arXiv 2402.03300), section 4, with one advantage for a whole episode of many turns. Its
variants are settings: no scaling and a constant length (Dr. GRPO, arXiv 2503.20783), a higher bound above and
the token mean (DAPO, arXiv 2503.14476), one ratio a sequence (GSPO, arXiv 2507.18071), leave-one-out (RLOO).

Left out: the KL to a reference policy, which these variants drop as well.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from opd.config import setting
from opd.episodes.config import RolloutConfig
from opd.losses import Losses
from opd.trainers.loop.method import Method
from opd.trainers.loop.registry import register
from opd.trainers.parts.policy import PolicyConfig, check_compared
from opd.types import Sample, TrajectoryGroup, to_sample


class GrpoConfig(PolicyConfig):
    """Settings of `method: grpo`."""

    reduction: Literal["token_mean", "sequence_mean", "sequence_sum"] = Field(
        "token_mean",
        description="Mean over all sampled tokens of the step (DAPO), first within each sequence (the paper), or the "
        "sum over a sequence divided by `length` (Dr. GRPO).",
    )
    length: float | None = setting(
        None,
        when={"reduction": ["sequence_sum"]},
        needed="Dr. GRPO: the most tokens of a completion",
        gt=0,
        description="The constant that divides a sequence's sum.",
    )


@register("grpo", GrpoConfig)
class Grpo(Method):
    """Group-relative policy optimisation from the environment's reward alone (GRPO and its variants)."""

    config: GrpoConfig

    @staticmethod
    def losses(config: GrpoConfig) -> Losses:
        return Losses(policy=config.loss(), reduction=config.reduction, length=config.length or 1.0)

    @staticmethod
    def advice(config: GrpoConfig, rollout: RolloutConfig) -> list[str]:
        check_compared(rollout)
        return []

    def annotate(self, group: TrajectoryGroup) -> list[Sample]:
        advantages = self.config.advantages(group.usable)
        return [
            to_sample(trajectory, segment, policy=1.0, advantage=advantage, route="policy")
            for trajectory, advantage in zip(group.usable, advantages, strict=True)
            for segment in trajectory.segments()
        ]
