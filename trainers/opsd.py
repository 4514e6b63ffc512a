"""OPSD: the student acts on the plain task; the same model, shown a reference solution, scores its tokens.

Source: Self-Distilled Reasoner (arXiv 2601.18734), equations 6 and 8, and the released code for the
temperature inside the loss. Here the episode may have many turns: the solution stands once, in the first
user message, and every sampled token of every turn is taught.

Left out: `reason_first` (the teacher writes an explanation before it scores).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, field_validator

from opd.errors import DataError
from opd.losses import Distill, Divergence, Losses
from opd.teachers.config import TeacherConfig
from opd.teachers.privileged import SOLUTION, in_first_user_message, with_solution
from opd.trainers.loop.method import Method
from opd.trainers.loop.registry import register
from opd.trainers.parts.forms import DivergenceConfig, DivergenceSetting
from opd.types import Message, Sample, TrajectoryGroup, to_sample


class OpsdConfig(DivergenceConfig):
    """Settings of `method: opsd`."""

    teacher: TeacherConfig = Field(default_factory=lambda: TeacherConfig(weights="frozen", rate=None))
    divergence: DivergenceSetting = Field(
        Divergence("forward_kl", clip=0.05),
        description="Of teacher and student; the authors use the sampling temperature in the loss as well.",
    )
    reduction: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean", description="Mean over all sampled tokens of the step, or first within each sequence."
    )
    privileged: str | None = Field(
        "solution",
        description="Which of the environment's privileged texts the teacher sees; null shows it nothing "
        "(a control: there is then nothing to learn).",
    )
    template: str = Field(SOLUTION, description="The teacher's first user message, from {prompt} and {solution}.")
    teacher_chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Laid over rollout.chat_template_kwargs, such as `enable_thinking: true`."
    )

    @field_validator("template")
    @classmethod
    def _has_both_parts(cls, template: str) -> str:
        with_solution("", "", template=template)
        return template


@register("opsd", OpsdConfig)
class Opsd(Method):
    """Self-distillation from a teacher that sees a reference solution (OPSD)."""

    config: OpsdConfig

    @staticmethod
    def losses(config: OpsdConfig) -> Losses:
        return Losses(distill=Distill(divergence=config.divergence), reduction=config.reduction)

    @staticmethod
    def teacher(config: OpsdConfig) -> TeacherConfig:
        return config.teacher

    def annotate(self, group: TrajectoryGroup) -> list[Sample]:
        samples = []
        for trajectory in group.usable:
            for segment in trajectory.segments():
                rewrite = self._rewrite(trajectory.privileged, segment.start)
                view = self.chat.view(trajectory, segment, rewrite, **self.config.teacher_chat_template_kwargs)
                samples.append(to_sample(trajectory, segment, view=view, distill=1.0, route="distill"))
        return samples

    def _rewrite(self, privileged: dict[str, str], first: int) -> Callable[[int, list[Message]], list[Message]]:
        """The task stands in the first messages of a sequence; later ones reach the teacher as they are."""
        return lambda turn, messages: self.teacher_messages(messages, privileged) if turn == first else messages

    def teacher_messages(self, messages: list[Message], privileged: dict[str, str]) -> list[Message]:
        name = self.config.privileged
        if name is None:
            return messages
        if name not in privileged:
            raise DataError(
                f"opsd.privileged = {name!r}, but the environment offers {sorted(privileged) or 'no privileged text'}"
            )
        return in_first_user_message(
            messages, lambda prompt: with_solution(prompt, privileged[name], template=self.config.template)
        )
