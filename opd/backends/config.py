"""The settings of training: the optimiser, the size of a step, stages, evaluation. No torch here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from opd.config import Strict, setting


def _decay_rate(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"{value} is no decay rate; each is at least 0 and below 1")
    return value


DecayRate = Annotated[float, AfterValidator(_decay_rate)]


class TrainConfig(Strict):
    """The optimiser and the size of a step."""

    steps: int = Field(100, ge=1, description="Optimiser updates (per stage).")
    tasks_per_step: int = Field(32, ge=1, description="Tasks in a step; episodes are this times group_size.")
    tasks: int | None = Field(
        None, ge=1, description="Training tasks in all, played again and again in their order; null: without end."
    )
    tokens_per_microbatch: int = Field(
        8192, ge=16, description="Most padded tokens (student and teacher) in one forward pass."
    )
    updates_per_step: int = Field(
        1,
        ge=1,
        description="Optimiser updates made of one step's episodes, each on its own share of the tasks. Beyond 1 the "
        "later ones are off-policy: only then are ratios other than 1, and clipped.",
    )
    lr: float = Field(1e-5, gt=0, description="Peak learning rate (AdamW).")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="After the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Updates of linear warm-up.")
    betas: tuple[DecayRate, DecayRate] = Field((0.9, 0.999), description="AdamW's decay rates.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    save_every: int = Field(
        0, ge=0, description="Steps between checkpoints; 0: by train.save_minutes alone. The last step is always saved."
    )
    save_minutes: float = Field(
        30.0,
        ge=0,
        description="Minutes after which the step at hand ends with a checkpoint, if none was saved meanwhile; 0: by "
        "train.save_every alone.",
    )
    max_hours: float | None = Field(
        None,
        gt=0,
        description="Hours after which the run is saved and ends with exit code 75, to be resumed; null: no limit.",
    )
    stop_grace: float = Field(
        30.0,
        gt=0,
        description="Seconds that whoever stops a run gives it between the signal and the kill; the plan warns where a "
        "checkpoint takes longer.",
    )
    keep_last: int = Field(2, ge=1, description="Checkpoints kept; older ones are deleted.")
    keep_best: bool = Field(
        False, description="Also keep the checkpoint whose evaluation was best; eval.every says which have one."
    )
    give_up_after: int = Field(
        3,
        ge=0,
        description="End the run after so many rounds of episodes in a row (steps, or rounds that a stage collects) of "
        "which none can be used, or so many updates in a row that are not finite; 0: never.",
    )
    threads: int | None = Field(None, ge=1, le=4096, description="CPU threads of torch; by default as torch chooses.")
    variance_every: int = Field(
        0,
        ge=0,
        description="Steps between measurements of the sampled-token gradient's variance, with and without a "
        "baseline (methods that distil); 0: never. One costs about two more projections of the head.",
    )

    @model_validator(mode="after")
    def _no_task_twice_in_a_step(self) -> TrainConfig:
        if self.tasks is not None and self.tasks < self.tasks_per_step:
            raise ValueError(
                f"train.tasks = {self.tasks} is less than train.tasks_per_step = {self.tasks_per_step}: a step would "
                "play a task twice. Raise the one, or lower the other and raise rollout.group_size"
            )
        return self


class StageConfig(Strict):
    """The training settings of a stage of a method where they differ from `train`."""

    steps: int | None = Field(
        None, ge=1, description="Steps of this stage, where they are fewer than train.steps; more are not taken."
    )
    tasks_per_step: int | None = Field(
        None, ge=1, description="Tasks in a step, or samples in a step of a stage on stored data."
    )
    lr: float | None = Field(None, gt=0, description="Peak learning rate.")

    def over(self, train: TrainConfig) -> TrainConfig:
        """Merge: the run's settings, replaced by those that the stage sets."""
        own = {name: getattr(self, name) for name in StageConfig.model_fields}
        given = {name: value for name, value in own.items() if value is not None}
        return train.model_copy(update=given | {"steps": min(train.steps, self.steps or train.steps)})


class EvalConfig(Strict):
    """Success on held-out tasks, before the first step, every so often, and at the end."""

    tasks: int = Field(0, ge=0, description="Held-out tasks; 0 turns evaluation off.")
    first: int = setting(
        0,
        when={"tasks": True},
        ge=0,
        description="The number of the first of them: a run is not reported on what it was stopped or chosen by.",
    )
    every: int = setting(
        0, when={"tasks": True}, ge=0, description="Steps between evaluations; 0: only before and after."
    )
    stop_at: float | None = setting(
        None,
        when={"every": True},
        gt=0,
        le=1,
        description="The run is over at the first evaluation after a step that finds at least this share solved; null: "
        "after train.steps alone.",
    )
    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    env_kwargs: dict[str, Any] = setting({}, when={"tasks": True}, description="Laid over env.kwargs.")
