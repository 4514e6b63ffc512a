"""What a teacher knows of an episode that is over: a sibling that succeeded, and what the environment said.

SDPO and SRPO share this, and how far from such a teacher a token is; they differ in which episodes it corrects.
Nothing of it reaches the student's prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from opd.config import RolloutConfig, Strict, TeacherConfig
from opd.losses import Distill, SampledDistill
from opd.privileged import (
    DEMONSTRATION,
    FEEDBACK,
    episode_text,
    in_first_user_message,
    in_last_message,
    with_demonstration,
    with_feedback,
    without_thinking,
)
from opd.trainers.base import Method
from opd.types import Message, Sample, Segment, TeacherView, Trajectory, to_sample

When = Literal["without_demonstration", "always", "never"]
_BELONGS = {
    "top_k": ("top_k", "sampled"),
    "tail": ("top_k",),
    "baseline": ("sampled",),
    "temperature": ("full", "top_k"),
}
"""Which forms use a setting that the others leave alone."""


_TEACHER = TeacherConfig(weights="ema", rate=0.05)


class HindsightConfig(Strict):
    """Settings that `sdpo` and `srpo` share; their defaults are SDPO's without rich feedback."""

    teacher: TeacherConfig = _TEACHER
    form: Literal["full", "top_k", "sampled"] = Field(
        "top_k",
        description="Compare whole distributions, or the student's `top_k` likeliest entries and the rest as one, or "
        "the sampled token alone (a policy gradient).",
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "jsd", description="forward_kl is KL(teacher || student), reverse_kl is KL(student || teacher)."
    )
    beta: float = Field(
        0.5, ge=0, le=1, description="jsd: the teacher's share of the mixture; 0 and 1 are the forward and reverse KL."
    )
    top_k: int = Field(100, ge=1, description="Entries of form: top_k, or of baseline: top_k.")
    tail: bool = Field(
        True, description="form: top_k: keep what lies outside as one more entry; false renormalises both sides."
    )
    temperature: float = Field(1.0, gt=0, description="Divides both sides' logits, but for form: sampled.")
    baseline: Literal["full", "top_k", "optimal"] | None = Field(
        None,
        description="form: sampled: what is taken off a token's log-ratio to lower the variance (vOPD); top_k "
        "renormalises both sides on the student's likeliest entries.",
    )
    max_ratio: float | None = Field(
        2.0, gt=0, description="A token counts by its ratio of student to old policy, at most this; null: it does not."
    )
    reduction: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean", description="Mean over the step's tokens, or first within each sequence."
    )
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

    @field_validator("teacher", mode="before")
    @classmethod
    def _what_is_left_out_stays(cls, teacher: Any) -> Any:
        """A rate alone is the default teacher's rate."""
        if isinstance(teacher, dict) and "weights" not in teacher:
            return {**_TEACHER.model_dump(), **teacher}
        return teacher

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

    @model_validator(mode="after")
    def _settings_belong_together(self) -> HindsightConfig:
        for name, forms in _BELONGS.items():
            idle = self.form not in forms or (name == "top_k" and self.form == "sampled" and self.baseline != "top_k")
            if idle and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} = {getattr(self, name)} has no effect with form = {self.form}; remove it")
        if self.form == "sampled" and self.divergence != "reverse_kl":
            raise ValueError(
                f"divergence = {self.divergence}, but form = sampled trains the reverse KL; set divergence: reverse_kl"
            )
        if self.divergence != "jsd" and self.beta != 0.5:
            raise ValueError(f"beta is used by jsd alone, but divergence = {self.divergence}; remove it")
        return self

    def loss(self, *, coef: float = 1.0) -> Distill | SampledDistill:
        """The component that these settings ask for."""
        if self.form == "sampled":
            by_top_k = self.baseline == "top_k"
            return SampledDistill(
                baseline=self.baseline,
                top_k=self.top_k if by_top_k else None,
                renormalise=by_top_k,
                max_ratio=self.max_ratio,
                coef=coef,
            )
        return Distill(
            kind=self.divergence,
            beta=self.beta,
            temperature=self.temperature,
            top_k=self.top_k if self.form == "top_k" else None,
            support="student",
            tail=self.tail,
            max_ratio=self.max_ratio,
            coef=coef,
        )


@dataclass(frozen=True, slots=True)
class Hindsight:
    """What there is to tell a teacher about one episode."""

    demonstration: str | None
    """A sibling's episode, as text."""
    feedback: dict[int, str]
    """What the environment said about the actions, by turn."""


class HindsightMethod(Method):
    """A method whose teacher looks back."""

    config: HindsightConfig

    @property
    def teacher(self) -> TeacherConfig:
        return self.config.teacher

    def advice(self, rollout: RolloutConfig) -> list[str]:
        most = self.config.max_teacher_tokens
        if most >= rollout.max_length:
            return []
        return [
            f"max_teacher_tokens = {most} is less than rollout.max_length = {rollout.max_length}: a teacher reads the "
            "whole episode and what it is shown, so long episodes are not distilled (route/too_long counts them)"
        ]

    def right(self, trajectory: Trajectory) -> bool:
        least = self.config.right_from
        return trajectory.success if least is None else trajectory.reward >= least

    def hindsight(self, trajectory: Trajectory, group: Sequence[Trajectory]) -> Hindsight:
        """The first *other* episode of the group that is right, and the episode's own feedback if it is wanted."""
        sibling = next((other for other in group if other is not trajectory and self.right(other)), None)
        when = self.config.feedback
        wanted = when == "always" or (when == "without_demonstration" and sibling is None)
        said = {n: turn.feedback for n, turn in enumerate(trajectory.turns) if turn.feedback} if wanted else {}
        return Hindsight(None if sibling is None else _as_text(sibling), said)

    def taught(
        self, trajectory: Trajectory, segment: Segment, known: Hindsight, *, policy: float = 0.0, advantage: float = 0.0
    ) -> Sample:
        """A segment with the teacher's view. Tokens before the first thing that it shows are not distilled: there
        the teacher knows no more than the student. The route tells whether there is anything, and room for it."""
        shown = self._shown(segment, known)
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

    def _shown(self, segment: Segment, known: Hindsight) -> list[tuple[int, str, str]]:
        """(turn, what it is, the text) of all that is shown in a segment."""
        shown = [] if known.demonstration is None else [(segment.start, "demonstration", known.demonstration)]
        if self.config.feedback_at == "start":
            told = [(segment.start, "\n".join(known.feedback.values()))] if known.feedback else []
        else:
            turns = range(segment.start, segment.start + len(segment.turns))
            told = [(turn, text) for turn, text in known.feedback.items() if turn in turns]
        return shown + [(turn, "feedback", text) for turn, text in told]

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


def _as_text(trajectory: Trajectory) -> str:
    """An episode as a demonstration: what was done, without the thinking, and what came back."""
    return episode_text(
        {**m, "content": without_thinking(m["content"])} if m["role"] == "assistant" else m for m in trajectory.messages
    )
