"""A teacher that looks back on an episode: it is shown a sibling that succeeded, or the environment's feedback.

SDPO and SRPO share it; they differ in which episodes it corrects. The student's prompt holds nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from pydantic import Field, field_validator

from opd.episodes.config import RolloutConfig
from opd.teachers.config import TeacherConfig
from opd.teachers.privileged import (
    DEMONSTRATION,
    FEEDBACK,
    episode_text,
    in_first_user_message,
    in_last_message,
    with_demonstration,
    with_feedback,
    without_thinking,
)
from opd.trainers.loop.method import Method
from opd.trainers.parts.forms import FormConfig, OwnTeacherConfig
from opd.types import Message, Sample, Segment, TeacherView, Trajectory, to_sample

When = Literal["without_demonstration", "always", "never"]


class HindsightConfig(OwnTeacherConfig, FormConfig):
    """Settings that `sdpo` and `srpo` share; their defaults are SDPO's without rich feedback."""

    teacher: TeacherConfig = Field(default_factory=lambda: TeacherConfig(weights="ema", rate=0.05))
    right_from: float | None = Field(
        None, description="Reward from which an episode is right; null: where the environment calls it solved."
    )
    feedback: When = Field(
        "without_demonstration", description="When the teacher is shown what the environment said about an episode."
    )
    feedback_at: Literal["turn", "start"] = Field(
        "turn",
        description="turn: what was said about an action stands before that action; start: all of it stands in the "
        "first user message, so that what came out at the end also corrects the turns before it.",
    )
    demonstration_template: str = Field(DEMONSTRATION, description="The first user message, from {prompt}, {episode}.")
    feedback_template: str = Field(FEEDBACK, description="The message with feedback, from {prompt} and {feedback}.")
    teacher_chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Laid over rollout.chat_template_kwargs, such as `enable_thinking: false`."
    )
    max_teacher_tokens: int = Field(
        18_432, ge=1, description="Where the teacher's sequence would be longer, the episode is not distilled."
    )

    @field_validator("demonstration_template")
    @classmethod
    def _has_prompt_and_episode(cls, template: str) -> str:
        with_demonstration("", "", template=template)
        return template

    @field_validator("feedback_template")
    @classmethod
    def _has_prompt_and_feedback(cls, template: str) -> str:
        with_feedback("", "", template=template)
        return template


@dataclass(frozen=True, slots=True)
class Hindsight:
    """The texts that a teacher may be shown about one episode."""

    demonstration: str | None
    """A right sibling's episode, as text; None: there is none."""
    feedback: dict[int, str]
    """The environment's feedback on the actions, by turn."""


class HindsightMethod(Method):
    """A method whose teacher looks back."""

    config: HindsightConfig

    @staticmethod
    def teacher(config: HindsightConfig) -> TeacherConfig:
        return config.teacher

    @staticmethod
    def advice(config: HindsightConfig, rollout: RolloutConfig) -> list[str]:
        most = config.max_teacher_tokens
        if most >= rollout.max_length:
            return []
        return [
            f"max_teacher_tokens = {most} is less than rollout.max_length = {rollout.max_length}: a teacher reads the "
            "whole episode and what it is shown, so long episodes are not distilled (route/too_long counts them)"
        ]

    def is_right(self, trajectory: Trajectory) -> bool:
        """True if the episode earned `right_from`; if that is None, if the environment calls it solved."""
        least = self.config.right_from
        if trajectory.unscored:
            return False
        return trajectory.success if least is None else trajectory.reward >= least

    def hindsight(self, trajectory: Trajectory, group: Sequence[Trajectory]) -> Hindsight:
        """Return the group's first right episode *other* than this one, and this one's own feedback if it is wanted."""
        sibling = next((other for other in group if other is not trajectory and self.is_right(other)), None)
        when = self.config.feedback
        wanted = when == "always" or (when == "without_demonstration" and sibling is None)
        feedback = {n: turn.feedback for n, turn in enumerate(trajectory.turns) if turn.feedback} if wanted else {}
        return Hindsight(None if sibling is None else _demonstration_text(sibling), feedback)

    def taught_sample(
        self, trajectory: Trajectory, segment: Segment, known: Hindsight, *, policy: float = 0.0, advantage: float = 0.0
    ) -> Sample:
        """Make a sample of a segment, with the teacher's view if there is something to show and room for it.

        Its route says so: distill, untaught (nothing to show) or too_long. Turns before the first thing that is shown
        are not distilled: there the teacher knows no more than the student.
        """
        shown = self._texts(segment, known)
        view = self._view(trajectory, segment, shown) if shown else None
        if view is None or len(view.token_ids) > self.config.max_teacher_tokens:
            route = "untaught" if view is None else "too_long"
            return to_sample(trajectory, segment, policy=policy, advantage=advantage, route=route)
        sample = to_sample(
            trajectory, segment, view=view, distill=1.0, policy=policy, advantage=advantage, route="distill"
        )
        first = min(turn for turn, _, _ in shown)
        weights = [w if turn >= first else 0.0 for w, turn in zip(sample.distill_weight, sample.turn, strict=True)]
        return replace(sample, distill_weight=weights)

    def _texts(self, segment: Segment, known: Hindsight) -> list[tuple[int, str, str]]:
        """Return all that is shown in a segment, each as turn, kind (demonstration or feedback) and text."""
        shown = [] if known.demonstration is None else [(segment.start, "demonstration", known.demonstration)]
        if self.config.feedback_at == "start":
            feedback = [(segment.start, "\n".join(known.feedback.values()))] if known.feedback else []
        else:
            turns = range(segment.start, segment.start + len(segment.turns))
            feedback = [(turn, text) for turn, text in known.feedback.items() if turn in turns]
        return shown + [(turn, "feedback", text) for turn, text in feedback]

    def _view(self, trajectory: Trajectory, segment: Segment, shown: list[tuple[int, str, str]]) -> TeacherView:
        config = self.config
        at_start = config.feedback_at == "start"

        def rewrite(turn: int, messages: list[Message]) -> list[Message]:
            for _, what, text in (entry for entry in shown if entry[0] == turn):
                if what == "demonstration":
                    fill = partial(with_demonstration, episode=text, template=config.demonstration_template)
                else:
                    fill = partial(with_feedback, feedback=text, template=config.feedback_template)
                place = in_first_user_message if what == "demonstration" or at_start else in_last_message
                messages = place(messages, fill)
            return messages

        view = self.chat.view(trajectory, segment, rewrite, **config.teacher_chat_template_kwargs)
        return replace(view, shows=tuple(dict.fromkeys(what for _, what, _ in shown)))


def _demonstration_text(trajectory: Trajectory) -> str:
    """Write an episode as a demonstration: its actions without the thinking, and what came back."""
    return episode_text(
        {**m, "content": without_thinking(m["content"])} if m["role"] == "assistant" else m for m in trajectory.messages
    )
