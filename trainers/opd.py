"""OPD: the student acts, and another, stronger model that sees the same prompt scores the student's own tokens.

Source: on-policy distillation as in the recipe of tinker-cookbook (`form: sampled`: the advantage of a token is the
teacher's log-prob less the student's), GKD (arXiv 2306.13649: `form: exact`), and vOPD (arXiv 2605.07865: `baseline`;
its own name, `method: vopd`, is this one with the baseline on). Here an episode may have many turns: every token that
was sampled is scored, in the conversation that it was sampled in.

Left out: discounted sums of later log-ratios (the recipe's default discount is 0), teachers with another tokenizer.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from opd.episodes.config import RolloutConfig
from opd.losses import Divergence, Losses
from opd.teachers.config import TeacherConfig
from opd.trainers.loop.method import Method
from opd.trainers.loop.registry import register
from opd.trainers.parts.forms import DivergenceSetting, FormConfig
from opd.trainers.parts.policy import PolicyShareConfig
from opd.types import Message, Sample, TrajectoryGroup, to_sample

UNPAID = (
    "rewards add nothing: an episode is compared with others of its task, and there are none (rollout.group_size = 1)"
)


class OpdConfig(PolicyShareConfig, FormConfig):
    """Settings of `method: opd`."""

    teacher: TeacherConfig = Field(description="Who teaches: `weights: external` and its `model`.")
    form: Literal["exact", "sampled"] = Field(
        "sampled",
        description="sampled: the sampled token alone, a policy gradient, which on average trains the reverse KL. "
        "exact: compare distributions, by `divergence`.",
    )
    divergence: DivergenceSetting = Field(
        Divergence("reverse_kl", top_k=100, support="student"),
        description="The divergence of student and teacher: its kind, and the entries that it compares.",
    )
    teacher_chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Laid over rollout.chat_template_kwargs, such as `enable_thinking: true`."
    )

    @field_validator("teacher")
    @classmethod
    def _somebody_else_teaches(cls, teacher: TeacherConfig) -> TeacherConfig:
        if teacher.weights != "external":
            raise ValueError(
                f"teacher.weights = {teacher.weights} would see what the student sees and say the same; set weights: "
                "external and model, or choose a method whose teacher sees more (opsd, sdpo)"
            )
        return teacher


@register("opd", OpdConfig)
class Opd(Method):
    """On-policy distillation from another model that sees the same prompt (OPD)."""

    config: OpdConfig

    @staticmethod
    def losses(config: OpdConfig) -> Losses:
        return Losses(
            policy=config.policy_loss(),
            distill=config.loss(coef=1 - config.policy_share),
            reduction=config.reduction,
        )

    @staticmethod
    def teacher(config: OpdConfig) -> TeacherConfig:
        return config.teacher

    @staticmethod
    def advice(config: OpdConfig, rollout: RolloutConfig) -> list[str]:
        notes = [UNPAID] if config.policy_share and rollout.group_size == 1 else []
        if config.baseline and rollout.truncated:
            notes.append(
                "a baseline is without bias for tokens of the whole distribution, not with rollout.top_p, top_k"
            )
        return notes

    def annotate(self, group: TrajectoryGroup) -> list[Sample]:
        samples = []
        for trajectory, weight, advantage in self.config.with_advantages(group.usable):
            for segment in trajectory.segments():
                view = self.chat.view(trajectory, segment, _unchanged, **self.config.teacher_chat_template_kwargs)
                samples.append(
                    to_sample(
                        trajectory,
                        segment,
                        view=view,
                        distill=1.0,
                        policy=weight,
                        advantage=advantage,
                        route="distill",
                    )
                )
        return samples


def _unchanged(turn: int, messages: list[Message]) -> list[Message]:
    """Return the messages: the teacher reads what the student read."""
    return messages
