"""GRPO: episodes of one task are compared with each other, and the better ones made likelier. The baseline.

Source: DeepSeekMath (arXiv 2402.03300), section 4, with one advantage for a whole episode of many turns. Its
variants are settings: no scaling and a constant length (Dr. GRPO, arXiv 2503.20783), a higher bound above and
the token mean (DAPO, arXiv 2503.14476), one ratio a sequence (GSPO, arXiv 2507.18071), leave-one-out (RLOO).

Left out: the KL to a reference policy, which these variants drop as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from opd.config import Strict, setting
from opd.episodes.config import RolloutConfig
from opd.losses import Losses, Policy
from opd.trainers.base import Method, register
from opd.types import Sample, Trajectory, TrajectoryGroup, to_sample

ALONE = (
    "an episode is compared with others of its task, and there are none (rollout.group_size = 1; published: 8): "
    "nothing can be learned"
)


class PolicyConfig(Strict):
    """How the rewards of a group become advantages, and how far one may move a token's probability."""

    scale: Literal["std", "none"] = Field(
        "std", description="Divide advantages by the group's standard deviation, or not (Dr. GRPO)."
    )
    leave_one_out: bool = Field(False, description="Compare with the mean of the group's other members (RLOO).")
    clip_low: float | None = Field(
        0.2,
        gt=0,
        le=1,
        description="Ratios below 1 - this lose their gradient; null is off. Idle with one update a step.",
    )
    clip_high: float | None = Field(
        0.2, gt=0, description="Ratios above 1 + this lose their gradient (DAPO: 0.28); null is off."
    )
    ratio: Literal["token", "sequence"] = Field(
        "token", description="One ratio a token, or the geometric mean of its sequence (GSPO; clips of order 3e-4)."
    )
    entropy: float = Field(0.0, ge=0, description="Bonus on the student's entropy, per nat.")

    def loss(self, *, coef: float = 1.0) -> Policy:
        """The component that these settings ask for."""
        return Policy(
            clip_low=self.clip_low, clip_high=self.clip_high, level=self.ratio, entropy=self.entropy, coef=coef
        )

    def advantages(self, group: Sequence[Trajectory]) -> list[float]:
        """One for each episode of a group, by its reward; none for none."""
        from opd.maths.advantage import group_advantage  # late: it needs torch

        if not group:
            return []
        found = group_advantage([t.reward for t in group], scale=self.scale, leave_one_out=self.leave_one_out)
        return [float(value) for value in found]


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

    @property
    def losses(self) -> Losses:
        config = self.config
        return Losses(policy=config.loss(), reduction=config.reduction, length=config.length or 1.0)

    def advice(self, rollout: RolloutConfig) -> list[str]:
        return [ALONE] if rollout.group_size == 1 else []

    def annotate(self, group: TrajectoryGroup) -> list[Sample]:
        advantages = self.config.advantages(group.usable)
        return [
            to_sample(trajectory, segment, policy=1.0, advantage=advantage, route="policy")
            for trajectory, advantage in zip(group.usable, advantages, strict=True)
            for segment in trajectory.segments()
        ]
