"""SDPO: the same model, shown what came out of an episode, scores the episode's own tokens.

Source: Reinforcement Learning via Self-Distillation (arXiv 2601.20802), equations 1, 3 and 11, and its released code
for the teacher's prompt, the bound on the importance ratio, and what happens to an episode without anything to show.
Here an episode may have many turns: feedback is shown where it arose, tool results stand in their places.

Left out: the PPO-like clip of equation 13 (the code's detached ratio stands in its place), and the test-time setting.
"""

from __future__ import annotations

from pydantic import Field

from opd.config import setting
from opd.episodes.config import RolloutConfig
from opd.losses import Losses
from opd.trainers.base import register
from opd.trainers.grpo import ALONE, PolicyConfig
from opd.trainers.hindsight import HindsightConfig, HindsightMethod
from opd.types import Sample, TrajectoryGroup

UNSHOWN = (
    "no sibling can demonstrate (rollout.group_size = 1; published: 8): the environment's feedback alone teaches, "
    "where there is any"
)


class SdpoConfig(HindsightConfig):
    """Settings of `method: sdpo`."""

    policy_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the reward's policy gradient, beside one less this of the teacher (equation 3; 0.9 "
        "helps weak models).",
    )
    policy: PolicyConfig = setting(
        PolicyConfig(), when={"policy_share": True}, description="The policy gradient's settings."
    )


@register("sdpo", SdpoConfig)
class Sdpo(HindsightMethod):
    """Self-distillation from a teacher that sees a sibling's success, or the environment's feedback (SDPO)."""

    config: SdpoConfig

    @property
    def losses(self) -> Losses:
        config, share = self.config, self.config.policy_share
        return Losses(
            policy=config.policy.loss(coef=share) if share else None,
            distill=config.loss(coef=1 - share),
            reduction=config.reduction,
        )

    def advice(self, rollout: RolloutConfig) -> list[str]:
        alone = ALONE if self.config.feedback == "never" else UNSHOWN
        return [*super().advice(rollout), *([alone] if rollout.group_size == 1 else [])]

    def annotate(self, group: TrajectoryGroup) -> list[Sample]:
        """Right episodes are taught as well, by other right ones; where there is nothing to show, nothing is."""
        share = 1.0 if self.config.policy_share else 0.0
        advantages = self.config.policy.advantages(group.usable)
        return [
            self.taught(
                trajectory,
                segment,
                self.hindsight(trajectory, group.usable),
                policy=share,
                advantage=share * advantage,
            )
            for trajectory, advantage in zip(group.usable, advantages, strict=True)
            for segment in trajectory.segments()
        ]
