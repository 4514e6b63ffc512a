"""SDPO: the same model, shown what came out of an episode, scores the episode's own tokens.

Source: Reinforcement Learning via Self-Distillation (arXiv 2601.20802), equations 1, 3 and 11, and its released code
for the teacher's prompt, the bound on the importance ratio, and what happens to an episode without anything to show.
Here an episode may have many turns: feedback is shown where it arose, tool results stand in their places.

Left out: the PPO-like clip of equation 13 (the code's detached ratio stands in its place), and the test-time setting.
"""

from __future__ import annotations

from opd.episodes.config import RolloutConfig
from opd.losses import Losses
from opd.trainers.loop.registry import register
from opd.trainers.parts.hindsight import HindsightConfig, HindsightMethod
from opd.trainers.parts.policy import PolicyShareConfig, check_compared
from opd.types import Sample, TrajectoryGroup

UNSHOWN = (
    "no sibling can demonstrate (rollout.group_size = 1; published: 8): the environment's feedback alone teaches, "
    "where there is any"
)


class SdpoConfig(PolicyShareConfig, HindsightConfig):
    """Settings of `method: sdpo`."""


@register("sdpo", SdpoConfig)
class Sdpo(HindsightMethod):
    """Self-distillation from a teacher that sees a sibling's success, or the environment's feedback (SDPO)."""

    config: SdpoConfig

    @staticmethod
    def losses(config: SdpoConfig) -> Losses:
        return Losses(
            policy=config.policy_loss(),
            distill=config.loss(coef=1 - config.policy_share),
            reduction=config.reduction,
        )

    @staticmethod
    def advice(config: HindsightConfig, rollout: RolloutConfig) -> list[str]:
        if config.feedback == "never":
            check_compared(rollout)
        return [*HindsightMethod.advice(config, rollout), *([UNSHOWN] if rollout.group_size == 1 else [])]

    def annotate(self, group: TrajectoryGroup) -> list[Sample]:
        """Right episodes are taught as well, by other right ones; where there is nothing to show, nothing is."""
        return [
            self.taught_sample(
                trajectory, segment, self.hindsight(trajectory, group.usable), policy=weight, advantage=advantage
            )
            for trajectory, weight, advantage in self.config.with_advantages(group.usable)
            for segment in trajectory.segments()
        ]
