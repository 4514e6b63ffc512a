"""A teacher that is shown one of the environment's privileged texts, in the first user message of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, field_validator

from opd.errors import DataError
from opd.losses import Distill, Losses
from opd.teachers.config import TeacherConfig
from opd.teachers.privileged import SOLUTION, in_first_user_message, with_solution
from opd.trainers.loop.method import Method
from opd.trainers.parts.forms import DivergenceConfig, OwnTeacherConfig
from opd.types import Message, Sample, Segment, Trajectory, to_sample


class ShownConfig(OwnTeacherConfig, DivergenceConfig):
    """Settings of the text that the teacher is shown."""

    teacher: TeacherConfig = Field(default_factory=lambda: TeacherConfig(weights="frozen", rate=None))
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


class ShownMethod(Method):
    """A method whose teacher is shown the text that `ShownConfig` names."""

    config: ShownConfig

    @staticmethod
    def losses(config: ShownConfig) -> Losses:
        return Losses(distill=Distill(divergence=config.divergence), reduction=config.reduction)

    @staticmethod
    def teacher(config: ShownConfig) -> TeacherConfig:
        return config.teacher

    def taught_sample(self, trajectory: Trajectory, segment: Segment) -> Sample:
        """Make a sample of a segment, with the teacher's view; every sampled token is distilled.

        Raises DataError where the environment does not offer the text.
        """
        rewrite = self._rewrite(trajectory.privileged, segment.start)
        view = self.chat.view(trajectory, segment, rewrite, **self.config.teacher_chat_template_kwargs)
        return to_sample(trajectory, segment, view=view, distill=1.0, route="distill")

    def _rewrite(self, privileged: dict[str, str], first: int) -> Callable[[int, list[Message]], list[Message]]:
        """Show the text in the first messages of a sequence; later ones reach the teacher as they are."""
        return lambda turn, messages: self.teacher_messages(messages, privileged) if turn == first else messages

    def teacher_messages(self, messages: list[Message], privileged: dict[str, str]) -> list[Message]:
        name = self.config.privileged
        if name is None:
            return messages
        if name not in privileged:
            raise DataError(
                f"{self.name}.privileged = {name!r}, but the environment offers "
                f"{sorted(privileged) or 'no privileged text'}"
            )
        return in_first_user_message(
            messages, lambda prompt: with_solution(prompt, privileged[name], template=self.config.template)
        )
