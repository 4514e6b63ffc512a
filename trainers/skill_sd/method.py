"""Skill-SD: a teacher that reads skills, made of the agent's own earlier episodes, beside the reward.

Source: Skill-SD (arXiv 2604.10674), by its abstract and by notes that quote its equations; no code of the authors is
public, and what they leave open is said in docs/skills.md. The loss is GRPO's plus `distill` times

    mean over sampled tokens of  ratio * (exp(-gap) - 1 + gap),  gap = log student - log teacher of the token,

whose ratio of student to old policy keeps its gradient: on average this is the reverse KL's gradient, while the same
without the ratio is the forward KL's (`opd/maths/estimators.py`). The student never sees a skill.

Left out: skills are written after the step, not in the background, so that runs repeat.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from opd.config import Strict, setting
from opd.errors import DataError
from opd.losses import Losses, SampledDistill
from opd.teachers.config import TeacherConfig
from opd.teachers.privileged import in_first_user_message, with_skill, with_solution
from opd.trainers.loop.method import Method
from opd.trainers.loop.registry import register
from opd.trainers.loop.stage import Prepared
from opd.trainers.parts.policy import PolicyConfig
from opd.trainers.skill_sd.keeper import SkillKeeper, SkillsConfig
from opd.trainers.skill_sd.makers import prompt_text
from opd.types import Message, Sample, Segment, TeacherView, Trajectory, TrajectoryGroup, to_sample

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat
    from opd.trainers.loop.play import Player


class SkillSdConfig(Strict):
    """Settings of `method: skill_sd`."""

    teacher: TeacherConfig = Field(TeacherConfig(weights="live"), description="Who teaches; left out: weights = live.")
    distill: float = Field(0.001, ge=0, description="The teacher's coefficient beside the reward's 1.")
    estimator: Literal["weighted_k3", "k3", "k2", "policy_gradient"] = Field(
        "weighted_k3",
        description="How the sampled token's gap becomes a loss; k3, the naive one, trains the forward KL.",
    )
    max_ratio: float | None = setting(
        2.0,
        when={"estimator": ["weighted_k3", "policy_gradient"]},
        gt=0,
        description="Bound on the ratio of student to old policy; null: none.",
    )
    policy: PolicyConfig = Field(default_factory=PolicyConfig, description="The policy gradient's settings.")
    skills: SkillsConfig = setting(SkillsConfig(), when={"fixed": [None]})
    fixed: str | None = Field(
        None,
        description="Show the teacher this privileged text of the environment in place of skills (`solution`, ...): "
        "self-distillation from fixed solutions beside the reward, to compare with.",
    )
    right_from: float | None = Field(
        None, description="Reward from which an episode is right; null: where the environment calls it solved."
    )
    max_teacher_tokens: int = Field(18_432, ge=8, description="What would be longer for the teacher is not distilled.")


@register("skill_sd", SkillSdConfig)
class SkillSd(Method):
    """GRPO beside a teacher that reads skills made of the agent's own earlier episodes (Skill-SD)."""

    config: SkillSdConfig

    def __init__(self, config: SkillSdConfig, chat: ChatFormat) -> None:
        super().__init__(config, chat)
        self.keeper = SkillKeeper(config.skills, chat, right_from=config.right_from)

    @staticmethod
    def losses(config: SkillSdConfig) -> Losses:
        bound = None if config.estimator in ("k2", "k3") else config.max_ratio
        distill = SampledDistill(form=config.estimator, max_ratio=bound, coef=config.distill)
        return Losses(policy=config.policy.loss(), distill=distill)

    @staticmethod
    def teacher(config: SkillSdConfig) -> TeacherConfig:
        return config.teacher

    def prepare(self, player: Player, folder: Path) -> Prepared:
        self.keeper.open(player, folder)
        return Prepared()

    def annotate(self, group: TrajectoryGroup) -> list[Sample]:
        return [
            self._sample(trajectory, segment, advantage)
            for trajectory, advantage in zip(group.usable, self.config.policy.advantages(group.usable), strict=True)
            for segment in trajectory.segments()
        ]

    def _skills(self, task: str, messages: list[Message]) -> str | None:
        """What there is to show: skills, or in the comparison the name of a text that the environment has."""
        return self.keeper.text_for(task, prompt_text(messages)) if self.config.fixed is None else self.config.fixed

    def _sample(self, trajectory: Trajectory, segment: Segment, advantage: float) -> Sample:
        text = self._skills(trajectory.task.id, trajectory.turns[0].messages)
        view = None if text is None else self._view(trajectory, segment, text)
        plain = partial(to_sample, trajectory, segment, policy=1.0, advantage=advantage)
        if view is None:
            return plain(route="policy" if text is None else "too_long")
        return plain(view=replace(view, shows=(self.config.fixed or "skill",)), distill=1.0, route="distill")

    def _view(self, trajectory: Trajectory, segment: Segment, text: str | None) -> TeacherView | None:
        """The teacher's side with a text of skills, or without; None where it would be too long."""

        def rewrite(turn: int, messages: list[Message]) -> list[Message]:
            return self._with_text(messages, trajectory.privileged, text) if turn == segment.start else messages

        view = self.chat.view(trajectory, segment, rewrite)
        return view if len(view.token_ids) <= self.config.max_teacher_tokens else None

    def _with_text(self, messages: list[Message], privileged: dict[str, str], text: str | None) -> list[Message]:
        if text is None:
            return messages
        if self.config.fixed is None:
            return in_first_user_message(messages, partial(with_skill, skill=text))
        if text not in privileged:
            raise DataError(f"skill_sd.fixed = {text!r}, but the environment offers {sorted(privileged) or 'nothing'}")
        return in_first_user_message(messages, partial(with_solution, solution=privileged[text]))

    def teacher_messages(self, messages: list[Message], privileged: dict[str, str]) -> list[Message]:
        """With the skills of like tasks: which task this is, is not known here."""
        return self._with_text(messages, privileged, self._skills("", messages))

    def observe(self, groups: list[TrajectoryGroup]) -> None:
        if self.config.fixed is None:
            self.keeper.learn(groups, self._view)

    def metrics(self) -> dict[str, float]:
        return self.keeper.numbers

    def state_dict(self) -> dict[str, Any]:
        return self.keeper.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.keeper.load_state_dict(state)
