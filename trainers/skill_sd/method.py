"""Skill-SD: the reward trains, and beside it a teacher that reads skills made of the agent's own earlier episodes.

Source: Skill-SD (arXiv 2604.10674), by its abstract and by notes that quote its equations; no code of the authors is
public, and docs/skills.md says how we fill what they leave open. The loss is GRPO's plus `distill` times

    mean over sampled tokens of  ratio * (exp(-gap) - 1 + gap),  gap = log student - log teacher of the token,

whose ratio of student to old policy keeps its gradient: on average this is the reverse KL's gradient, while the same
without the ratio is the forward KL's (`opd/maths/estimators.py`). The student never sees a skill.

Left out: skills are written after the step, not in the background, so that runs repeat.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.errors import DataError
from opd.losses import Losses, SampledDistill
from opd.teachers.config import TeacherConfig
from opd.teachers.privileged import in_first_user_message, with_skill, with_solution
from opd.trainers.loop.method import Method
from opd.trainers.loop.registry import register
from opd.trainers.loop.stage import Prepared
from opd.trainers.skill_sd.config import SkillSdConfig
from opd.trainers.skill_sd.keeper import SkillKeeper
from opd.trainers.skill_sd.makers import prompt_text
from opd.types import Message, Sample, Segment, TeacherView, Trajectory, TrajectoryGroup, to_sample

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat
    from opd.trainers.loop.play import Player


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
        """Return the skills for a task; with `fixed`, the name of the environment's text that stands in their place."""
        return self.keeper.text_for(task, prompt_text(messages)) if self.config.fixed is None else self.config.fixed

    def _sample(self, trajectory: Trajectory, segment: Segment, advantage: float) -> Sample:
        text = self._skills(trajectory.task.id, trajectory.turns[0].messages)
        view = None if text is None else self._view(trajectory, segment, text)
        plain = partial(to_sample, trajectory, segment, policy=1.0, advantage=advantage)
        if view is None:
            return plain(route="policy" if text is None else "too_long")
        return plain(view=replace(view, shows=(self.config.fixed or "skill",)), distill=1.0, route="distill")

    def _view(self, trajectory: Trajectory, segment: Segment, text: str | None) -> TeacherView | None:
        """Return the teacher's view with a text of skills, or without (None); None where it would be too long."""

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
        """Show the skills of like tasks: which task this is, is not known here."""
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
