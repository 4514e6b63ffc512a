"""SRPO: the reward reinforces right episodes, and a right sibling corrects wrong ones.

Source: SRPO (arXiv 2604.02288), by the paper's text; no code of the authors is public. Each episode goes one way:

    right, or no sibling is right   policy    clipped surrogate of the group's advantages
    wrong, and a sibling is right   distill   divergence from the teacher, weighed by exp(-beta * its entropy)

Both sums share one denominator, the tokens of both. A group of wrong episodes so has advantages of 0 and teaches
nothing.

Left out: mixing the two advantages of one token, which the paper tries and drops (`sdpo.policy_share` does that).
"""

from __future__ import annotations

from collections.abc import Callable

from pydantic import Field

from opd.episodes.config import RolloutConfig
from opd.losses import Losses
from opd.trainers.loop.registry import register
from opd.trainers.parts.hindsight import HindsightConfig, HindsightMethod, When
from opd.trainers.parts.policy import PolicyConfig, check_compared
from opd.types import Sample, Trajectory, TrajectoryGroup, to_sample


class SrpoPolicyConfig(PolicyConfig):
    """GRPO's settings, with a higher bound above."""

    clip_high: float | None = Field(0.28, gt=0, description="Ratios above 1 + this lose their gradient; null is off.")


class SrpoConfig(HindsightConfig):
    """Settings of `method: srpo`."""

    feedback: When = Field(
        "always", description="When the teacher is shown what the environment said about an episode."
    )
    policy: SrpoPolicyConfig = Field(
        default_factory=SrpoPolicyConfig, description="The policy gradient of what is not corrected."
    )
    entropy_beta: float = Field(
        1.0, ge=0, description="Trust an unsure teacher less: exp(-this * entropy) over its mean; 0 trusts all alike."
    )


@register("srpo", SrpoConfig)
class Srpo(HindsightMethod):
    """Samples routed by outcome: right ones to the policy gradient, wrong ones to a self-teacher (SRPO)."""

    config: SrpoConfig

    @staticmethod
    def losses(config: SrpoConfig) -> Losses:
        return Losses(policy=config.policy.loss(), distill=config.loss(), reduction=config.reduction, shared=True)

    @staticmethod
    def needs_scores(config: SrpoConfig) -> bool:
        return config.entropy_beta > 0

    @staticmethod
    def advice(config: HindsightConfig, rollout: RolloutConfig) -> list[str]:
        check_compared(rollout)
        return HindsightMethod.advice(config, rollout)

    def annotate(self, group: TrajectoryGroup) -> list[Sample]:
        advantages = self.config.policy.advantages(group.usable)
        return [
            sample
            for trajectory, advantage in zip(group.usable, advantages, strict=True)
            for sample in self._samples(trajectory, advantage, group.usable)
        ]

    def _samples(self, trajectory: Trajectory, advantage: float, group: list[Trajectory]) -> list[Sample]:
        """Make the samples of one episode. One whose teacher's sequence would be too long is left to its reward."""
        known = self.hindsight(trajectory, group)
        segments, route = trajectory.segments(), "policy"
        if not (trajectory.unscored or self.is_right(trajectory)) and known.demonstration is not None:
            corrected = [self.taught_sample(trajectory, segment, known) for segment in segments]
            if all(sample.teacher_view is not None for sample in corrected):
                return corrected
            route = "too_long"
        return [to_sample(trajectory, part, policy=1.0, advantage=advantage, route=route) for part in segments]

    def weigh(self, samples: list[Sample], all_sum: Callable[[list[float]], list[float]]) -> list[Sample]:
        """Weigh distilled tokens by the teacher's entropy, over the mean weight of the step's distilled tokens."""
        if not self.config.entropy_beta:
            return samples
        from opd.trainers.loop.weighting import by_entropy  # late: it needs torch

        return by_entropy(samples, self.config.entropy_beta, all_sum)
