"""The typed settings that every run shares. No torch here: a bad file must fail before anything heavy.

Each field's description is what `opd config --explain KEY` prints. A method's own settings stand in its
file under `trainers/`; `opd.launch.config` joins the two and reads YAML.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """A section of the settings: unknown keys are errors, values are frozen once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LoraConfig(Strict):
    """Low-rank adapters in place of full fine-tuning (library: peft)."""

    r: int = Field(16, ge=1, description="Rank of the adapters.")
    alpha: int = Field(32, ge=1, description="Scale of the adapters; the update is multiplied by alpha / r.")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="Module names that get an adapter, or all-linear."
    )


class ModelConfig(Strict):
    """The model that acts and learns. `model: NAME` is short for `model: {name: NAME}`."""

    name: str = Field(
        description="A hub id, a local folder, a .gguf file, `smollm2` (from its package), or `tiny:<env>` "
        "(a small model built and warm-started on this machine)."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto", description="Type of the weights; auto is float32 on a CPU and bfloat16 on a GPU."
    )
    lora: LoraConfig | None = Field(None, description="Train adapters instead of all weights.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third more time."
    )
    trust_remote_code: bool = Field(False, description="Run the Python code that a hub repository ships.")


def _model_from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


ModelSetting = Annotated[ModelConfig, BeforeValidator(_model_from_name)]


class EnvConfig(Strict):
    """Where the student acts."""

    id: str = Field(description="A registered id (`opd envs list`), or `my_package.my_module:MyEnv`.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of the environment's constructor.")
    max_turns: int = Field(8, ge=1, description="Turns after which an episode is truncated.")


def _env_from_id(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


EnvSetting = Annotated[EnvConfig, BeforeValidator(_env_from_id)]


class RolloutConfig(Strict):
    """How episodes are sampled."""

    engine: Literal["transformers"] = Field(
        "transformers", description="What generates: `transformers` (embedded, CPU or GPU)."
    )
    group_size: int = Field(1, ge=1, description="Episodes of the same task in a step (G).")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of training rollouts.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; 1 is off.")
    top_k: int = Field(0, ge=0, description="Sample among the k likeliest; 0 is off.")
    max_tokens: int = Field(256, ge=1, description="Most tokens in one completion (one turn).")
    max_length: int = Field(2048, ge=8, description="Most tokens in one sequence, prompts included.")
    concurrency: int = Field(64, ge=1, description="Most episodes at once.")
    deterministic: bool = Field(
        True,
        description="Fix who shares a batch by episode and turn, so that a run is a function of its seed to the "
        "bit. false: whoever has finished a turn goes on at once, which is faster with slow environments.",
    )
    step_timeout: float = Field(60.0, gt=0, description="Seconds that a reset or a step of an environment may take.")
    workers: int = Field(8, ge=1, description="Threads that step environments.")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Passed to the chat template, such as `enable_thinking: false`."
    )
    on_rewrite: Literal["fork", "append"] = Field(
        "fork",
        description="When the chat template rewrites earlier turns (drops their thinking, say): start a new "
        "training sequence with what the template renders, or keep appending to what was sampled.",
    )


class TrainConfig(Strict):
    """The optimiser and the size of a step."""

    steps: int = Field(100, ge=1, description="Optimiser updates (per stage).")
    tasks_per_step: int = Field(32, ge=1, description="Tasks in a step; episodes are this times group_size.")
    tokens_per_microbatch: int = Field(
        8192, ge=16, description="Most padded tokens (student and teacher) in one forward pass."
    )
    lr: float = Field(1e-5, gt=0, description="Peak learning rate (AdamW).")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="After the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's decay rates.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    save_every: int = Field(0, ge=0, description="Steps between checkpoints; 0 saves only the last.")
    keep_last: int = Field(2, ge=1, description="Checkpoints kept; older ones are deleted.")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; by default as torch chooses.")


class EvalConfig(Strict):
    """Success on held-out tasks, before the first step, every so often, and at the end."""

    tasks: int = Field(0, ge=0, description="Held-out tasks; 0 turns evaluation off.")
    every: int = Field(0, ge=0, description="Steps between evaluations; 0: only before and after.")
    temperature: float = Field(0.0, ge=0, description="0 is greedy.")
    env_kwargs: dict[str, Any] = Field(default_factory=dict, description="Laid over env.kwargs.")


class TrackingConfig(Strict):
    """Where numbers go. `metrics.jsonl` and `rollouts.jsonl` are always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online with a key, offline without one, off where wandb is not installed."
    )
    project: str = Field("opd", description="The wandb project.")
    name: str | None = Field(None, description="The wandb run's name; by default the run folder's.")
    rollouts_per_step: int = Field(8, ge=0, description="Episodes of each step written to rollouts.jsonl.")
    plot: bool = Field(True, description="Write curves.png beside the run.")
    console: bool = Field(True, description="Progress bar and tables in the terminal.")


class TeacherConfig(Strict):
    """Who teaches: the same model in another role, or another one."""

    weights: Literal["live", "frozen", "ema"] = Field(
        "frozen",
        description="live: the student as it is now; frozen: as it was at the start; ema: a running average.",
    )
    rate: float | None = Field(None, gt=0, le=1, description="ema: the share of the student mixed in at each step.")

    @model_validator(mode="after")
    def _rate_belongs_to_ema(self) -> TeacherConfig:
        if self.weights == "ema" and self.rate is None:
            raise ValueError("teacher.weights = ema needs teacher.rate (published values: 0.01 to 0.05)")
        if self.weights != "ema" and self.rate is not None:
            raise ValueError(f"teacher.rate is used by ema alone, but teacher.weights = {self.weights}; remove it")
        return self
