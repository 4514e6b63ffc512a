"""Settings of the reward's policy gradient, and of its share beside a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from opd.config import Strict, setting
from opd.episodes.config import RolloutConfig
from opd.errors import ConfigError
from opd.losses import Policy
from opd.types import Trajectory


def check_compared(rollout: RolloutConfig) -> None:
    """Raise ConfigError where an episode has no others of its task to be compared with, and nothing else teaches."""
    if rollout.group_size == 1:
        raise ConfigError(
            "rollout.group_size = 1: an episode is compared with others of its task, and there are none, so that "
            "nothing can be learned. Set 2 or more (published: 8)"
        )


class PolicyConfig(Strict):
    """Settings that make advantages of a group's rewards, and bound how far a token's probability moves."""

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
        """Return the component that these settings ask for."""
        return Policy(
            clip_low=self.clip_low, clip_high=self.clip_high, level=self.ratio, entropy=self.entropy, coef=coef
        )

    def advantages(self, group: Sequence[Trajectory]) -> list[float]:
        """Return one advantage for each episode of a group, by its reward; [] for an empty group.

        One that nobody could score is compared with no other, and has an advantage of 0.
        """
        from opd.maths.advantage import group_advantage  # late: it needs torch

        rewards = [t.reward for t in group if not t.unscored]
        if not rewards:
            return [0.0] * len(group)
        found = iter(group_advantage(rewards, scale=self.scale, leave_one_out=self.leave_one_out))
        return [0.0 if t.unscored else float(next(found)) for t in group]


class PolicyShareConfig(Strict):
    """Settings of a share of the reward's policy gradient beside a teacher's divergence."""

    policy_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the reward's policy gradient, beside one less this of the teacher (SDPO, equation 3; 0.9 "
        "helps weak models); 0 leaves rewards out.",
    )
    policy: PolicyConfig = setting(
        PolicyConfig(), when={"policy_share": True}, description="The policy gradient's settings."
    )

    def policy_loss(self) -> Policy | None:
        """Return the policy's component; None where it has no share."""
        return self.policy.loss(coef=self.policy_share) if self.policy_share else None

    def with_advantages(self, group: Sequence[Trajectory]) -> Iterator[tuple[Trajectory, float, float]]:
        """Yield each episode with the weight of its policy loss and its advantage, both 0 without a share."""
        weight = 1.0 if self.policy_share else 0.0
        for trajectory, advantage in zip(group, self.policy.advantages(group), strict=True):
            yield trajectory, weight, weight * advantage
