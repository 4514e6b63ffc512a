"""Lightning OPD: on-policy distillation whose teacher is asked once, ahead of training, and then is not there.

Source: Lightning OPD (arXiv 2604.13010). Five stages, each of which holds one model and can be resumed by itself:
the teacher plays; the student learns what it said (SFT); the student so made plays once; the teacher scores each token
that was sampled, once, into a store; the student trains on these for many steps, with its own log-probs of now.

`A_t = log teacher(y_t) - log student(y_t)`, detached and bounded, times the gradient of the token's log-prob; no
importance ratio. Here an episode may have many turns, ids are stored and not texts, and, beyond the paper, a store may
hold the teacher's top k, from which a divergence is trained. Teacher consistency, which the paper asks for, is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator, model_validator

from opd.backends.config import StageConfig
from opd.config import PathText, setting
from opd.losses import Distill, Divergence, Losses, SampledDistill, unknown
from opd.teachers.config import TeacherConfig
from opd.trainers.lightning_opd.offline import Terms, offline, scoring
from opd.trainers.loop.method import Method
from opd.trainers.loop.registry import register
from opd.trainers.loop.stage import Inputs, Stage
from opd.trainers.parts.episodes import playing
from opd.trainers.parts.forms import DivergenceConfig, DivergenceSetting
from opd.trainers.parts.imitation import ImitationConfig, imitating


class LightningConfig(ImitationConfig, DivergenceConfig):
    """Settings of `method: lightning_opd`."""

    teacher: TeacherConfig = Field(
        description="Who plays for the SFT and scores: `weights: external` and its `model`.",
    )
    keep: Literal["right", "all"] = Field(
        "all",
        description="SFT: learn from all of the teacher's episodes (the paper), or from those that the environment "
        "called solved.",
    )
    sft_tasks: int = Field(
        256,
        ge=0,
        description="SFT: tasks that the teacher plays, rollout.group_size times each; 0: the run's model has learned "
        "from this teacher already.",
    )
    sft_teacher: PathText | None = Field(
        None, min_length=1, description="SFT: another model that plays, to see what that costs; needs mismatch: allow."
    )
    tasks: int = Field(512, ge=1, description="Other tasks, which the student plays, rollout.group_size times each.")
    data: PathText | None = Field(
        None,
        min_length=1,
        description="The data/ folder of an earlier run: the run's model, which played its episodes, is trained on "
        "these and on the store beside them, and no other stage is run.",
    )
    form: Literal["exact", "sampled"] = Field(
        "sampled",
        description="sampled: the sampled token's policy gradient (the paper). exact: also store the teacher's "
        "`divergence.top_k` likeliest ids at each position, and train `divergence` over these.",
    )
    divergence: DivergenceSetting = setting(
        Divergence("reverse_kl", top_k=100, temperature=None),
        when={"form": ["exact"]},
        description="Divergence of student and stored teacher, over the teacher's top k at the sampling temperature.",
    )
    max_advantage: float | None = setting(
        10.0,
        when={"form": ["sampled"]},
        gt=0,
        description="Bound on the absolute advantage (the paper; its code has none).",
    )
    mismatch: Literal["refuse", "allow"] = Field(
        "refuse",
        description="refuse or allow that another model scores than played for the SFT, or that another student played "
        "the episodes than is trained.",
    )
    shard_tokens: int = Field(
        1 << 18, ge=1, description="Tokens in a shard of the store: the most that a kill can lose."
    )
    imitating: StageConfig = Field(default_factory=StageConfig, description="The SFT, where it differs from train.")
    distilling: StageConfig = Field(default_factory=StageConfig, description="The last stage, likewise.")

    @field_validator("teacher")
    @classmethod
    def _another_model_teaches(cls, teacher: TeacherConfig) -> TeacherConfig:
        if teacher.weights != "external":
            raise ValueError(f"teacher.weights = {teacher.weights} cannot be asked ahead; set external and model")
        return teacher

    @model_validator(mode="after")
    def _settings_belong_together(self) -> LightningConfig:
        if self.sft_teacher is not None and (self.mismatch == "refuse" or not self.sft_tasks):
            raise ValueError(
                f"sft_teacher = {self.sft_teacher} is not the one that scores ({self.teacher.model}), which moves the "
                "fixed point. Remove it, or set mismatch: allow and sft_tasks to see that"
            )
        rule, stored = self.divergence, "the teacher's top k alone are stored, at the sampling temperature"
        if rule.clip is not None:
            raise ValueError(f"divergence.clip = {rule.clip} is for the whole vocabulary, but {stored}; remove it")
        if rule.top_k is None:
            raise ValueError(f"divergence.top_k = null is the whole vocabulary, but {stored}; set how many")
        if rule.support != "teacher":
            raise ValueError(f"divergence.support = {rule.support}, but {stored}; remove it")
        if rule.temperature is not None:
            raise ValueError(f"divergence.temperature = {rule.temperature}, but {stored}; remove it")
        return self

    def loss(self) -> Distill | SampledDistill:
        """Return the component that the last stage trains. Raises ConfigError for a form that there is none for."""
        if self.form == "exact":
            return Distill(divergence=self.divergence)
        if self.form != "sampled":
            raise unknown("form", self.form, ("exact", "sampled"))
        return SampledDistill(clip=self.max_advantage)


@register("lightning_opd", LightningConfig)
class LightningOpd(Method):
    """Distillation from a teacher that is asked once, ahead of training, into a store (Lightning OPD)."""

    @classmethod
    def stages(cls, config: LightningConfig) -> Sequence[Stage]:
        losses = Losses(distill=config.loss(), reduction=config.reduction)
        allowed = config.mismatch == "allow"
        top_k = config.divergence.top_k or 0 if config.form == "exact" else 0
        terms = Terms(top_k=top_k, shard_tokens=config.shard_tokens, allow_mismatch=allowed)
        last = offline(config, terms, losses, over=config.distilling, data=config.data)
        if config.data is not None:
            return (last,)
        first: list[Stage] = []
        if config.sft_tasks:
            model = config.sft_teacher or config.teacher.model
            first = [
                playing(config, tasks=config.sft_tasks, model=model),
                imitating(config, source="teacher", over=config.imitating),
            ]
        own = playing(config, tasks=config.tasks, first=config.sft_tasks)
        return (*first, own, scoring(config, terms, model=config.teacher.model), last)

    @classmethod
    def inputs(cls, config: LightningConfig) -> Inputs:
        if config.data is not None:
            return Inputs(folders={"data": config.data})
        models = {"sft_teacher": config.sft_teacher, "teacher.model": config.teacher.model}
        return Inputs(models={key: name for key, name in models.items() if name})
