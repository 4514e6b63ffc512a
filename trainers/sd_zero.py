"""SD-Zero: a model learns to revise its attempts once it is told how they went, then teaches itself without.

Source: Self-Distillation Zero (arXiv 2604.12002) and its released code, which disagree; `variant` takes either side.
Here an attempt may have many turns: what is revised, and what the teacher sees, is the whole episode with what the
tools answered, and a cue that tells the outcome. Left out: the code's clean-up of revisions (suffixes, flattery).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from opd.backends.config import StageConfig, TrainConfig
from opd.config import Strict
from opd.episodes.config import RolloutConfig
from opd.losses import CrossEntropy, Distill, Divergence, Losses, check_known
from opd.teachers.config import TeacherConfig
from opd.teachers.privileged import CUE_RIGHT, CUE_WRONG
from opd.trainers.base import Method, register
from opd.trainers.revisions import Collection, Part, Reviser, TraceFile, collect, summary, to_samples
from opd.types import Sample, TrajectoryGroup, to_sample

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat
    from opd.trainers.loop import Loop


class SdZeroConfig(Strict):
    """Settings of `method: sd_zero`."""

    phases: Literal["both", "revision", "distillation"] = Field("both", description="Both phases, or one alone.")
    variant: Literal["paper", "code"] = Field(
        "paper",
        description="paper: generation and revision together, then the reverse KL over the full vocabulary. code: only "
        "wrong attempts are revised, generation and revision are two stages, then half forward and half reverse KL, "
        "renormalised on the teacher's top 64.",
    )
    questions: int = Field(256, ge=1, description="Phase 1: tasks that are attempted, rollout.group_size times each.")
    revisions: int = Field(
        3, ge=0, description="Phase 1: revisions of each attempt; 0 learns right attempts as they stand (RFT)."
    )
    generation: float = Field(1.0, ge=0, description="Phase 1: weight of attempt, cue, revision, said unasked; 0: off.")
    revision: float = Field(1.0, ge=0, description="Phase 1: weight of the revision, given the others; 0 is off.")
    place: Literal["prompt", "reply"] = Field(
        "prompt",
        description="Where a reviser and the teacher see attempt and cue: as text in the first user message, or, as in "
        "the paper, as the ids with which the reply begins.",
    )
    cue_right: str = Field(CUE_RIGHT, description="Said of an attempt that was right.")
    cue_wrong: str = Field(CUE_WRONG, description="Said of an attempt that was not, or that a limit cut.")
    max_teacher_tokens: int = Field(
        32768, ge=8, description="Most that the teacher reads, and of a sequence of phase 1; longer is dropped."
    )
    temperature: float = Field(1.0, gt=0, description="Phase 2: divides both sides' logits in the loss.")
    teacher: TeacherConfig = Field(default_factory=lambda: TeacherConfig(weights="frozen", rate=None))
    revising: StageConfig = Field(default_factory=StageConfig, description="Phase 1, where it differs from train.")
    distilling: StageConfig = Field(default_factory=StageConfig, description="Phase 2, where it differs from train.")

    @model_validator(mode="after")
    def _phase_1_learns_something(self) -> SdZeroConfig:
        if not (self.generation or (self.revision and self.revisions)):
            raise ValueError("sd_zero.generation = 0: phase 1 learns nothing; for phase 2 alone, phases: distillation")
        return self


@register("sd_zero", SdZeroConfig)
class SdZero(Method):
    """Self-revision from a binary reward, then self-distillation of the reviser (SD-Zero)."""

    config: SdZeroConfig

    def stages(self) -> Sequence[Method]:
        config = self.config
        both: dict[Part, float] = {"generation": config.generation, "revision": config.revision}
        if not config.revisions:
            both = {"attempt": config.generation}
        parts = {part: weight for part, weight in both.items() if weight}
        split = [parts] if config.variant == "paper" else [{part: weight} for part, weight in parts.items()]
        first: list[Method] = [Revising(config, self.chat, part, collects=n == 0) for n, part in enumerate(split)]
        second: list[Method] = [Distilling(config, self.chat)]
        return {"revision": first, "distillation": second, "both": first + second}[config.phases]


class _Phase(Method):
    """What both phases share: how an attempt is put before the model."""

    config: SdZeroConfig

    def __init__(self, config: SdZeroConfig, chat: ChatFormat) -> None:
        super().__init__(config, chat)
        self.reviser = Reviser(chat, (config.cue_right, config.cue_wrong), config.place)


class Revising(_Phase):
    """Phase 1, or a half of it: learn from revisions that turned out right."""

    losses = Losses(ce=CrossEntropy())

    def __init__(self, config: SdZeroConfig, chat: ChatFormat, parts: dict[Part, float], *, collects: bool) -> None:
        super().__init__(config, chat)
        self.parts, self.collects = parts, collects
        self.collection = Collection(config.questions, config.revisions, revise_right=config.variant == "paper")

    def schedule(self, train: TrainConfig) -> TrainConfig:
        return self.config.revising.over(train)

    def advice(self, rollout: RolloutConfig) -> list[str]:
        return [self.collection.announced(rollout.group_size)] if self.collects else []

    def prepare(self, loop: Loop, folder: Path) -> dict[str, float]:
        config, file = self.config, TraceFile(folder / "revisions.jsonl", loop.origin)
        rows = collect(loop, file, self.reviser, self.collection, whole=loop.version > 0)
        if loop.stopping():
            return {}
        self.dataset, too_long = to_samples(rows, self.reviser, self.parts, config.max_teacher_tokens, where=file.path)
        return {"dropped/too_long": float(too_long)} | (summary(rows) if self.collects else {})


class Distilling(_Phase):
    """Phase 2: the reviser, who sees the attempt and how it went, scores the attempt's own tokens."""

    def __init__(self, config: SdZeroConfig, chat: ChatFormat) -> None:
        super().__init__(config, chat)
        self.first_task = config.questions if config.phases == "both" else 0

    @property
    def losses(self) -> Losses:
        temperature = self.config.temperature
        if self.config.variant == "paper":
            return Losses(distill=Distill(divergence=Divergence("reverse_kl", temperature=temperature)))
        check_known("sd_zero.variant", self.config.variant, ("paper", "code"))
        return Losses(distill=Distill(divergence=Divergence("mixed_kl", top_k=64, tail=False, temperature=temperature)))

    @property
    def teacher(self) -> TeacherConfig:
        return self.config.teacher

    def schedule(self, train: TrainConfig) -> TrainConfig:
        return self.config.distilling.over(train)

    def annotate(self, group: TrajectoryGroup) -> list[Sample]:
        samples = []
        for attempt in group.usable:
            viewed = [(segment, self.reviser.view(attempt, segment)) for segment in attempt.segments()]
            too_long = any(len(view.token_ids) > self.config.max_teacher_tokens for _, view in viewed)
            self.dropped["too_long"] += too_long
            if not too_long:
                samples += [to_sample(attempt, s, view=view, distill=1.0, route="distill") for s, view in viewed]
        return samples
