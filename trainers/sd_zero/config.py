"""The settings of SD-Zero."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from opd.backends.config import StageConfig
from opd.config import Strict
from opd.teachers.config import TeacherConfig
from opd.teachers.privileged import CUE_RIGHT, CUE_WRONG


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
    generation: float = Field(
        1.0, ge=0, description="Phase 1: weight of attempt, cue and revision as one answer; 0: off."
    )
    revision: float = Field(1.0, ge=0, description="Phase 1: weight of the revision, given attempt and cue; 0: off.")
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
