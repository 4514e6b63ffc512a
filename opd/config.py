"""The typed settings that every run shares. No torch here: a bad file must fail before anything heavy.

Each field's description is what `opd config --explain KEY` prints. A method's own settings stand in its
file under `trainers/`; `opd.launch.config` joins the two and reads YAML.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


class Strict(BaseModel):
    """A section of the settings: unknown keys are errors, values are frozen once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _address(url: str) -> str:
    """An address of a server and nothing else. Raises ValueError for what cannot be asked."""
    wanted = "a server's address is like http://127.0.0.1:8000, with nothing behind the port"
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:  # of the port, or of the brackets of an IPv6 address
        raise ValueError(f"{url!r}: {error}; {wanted}") from None
    if not named or url.rstrip("/") != f"{parts.scheme}://{parts.netloc}" or "@" in url or not url.isprintable():
        raise ValueError(f"{url!r}: {wanted}")
    return url


ServerAddress = Annotated[str, AfterValidator(_address)]


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
    workers: Literal["threads", "processes"] = Field(
        "threads",
        description="Where environments live. threads: in this process. processes: each in one of its own, which is "
        "killed if it hangs and takes nobody along if it crashes; for those that compute much, too.",
    )

    @field_validator("workers")
    @classmethod
    def _can_fork(cls, workers: str) -> str:
        if workers == "processes" and not hasattr(os, "fork"):
            raise ValueError("env.workers = processes needs fork(), which this system lacks; use threads")
        return workers


def _env_from_id(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


EnvSetting = Annotated[EnvConfig, BeforeValidator(_env_from_id)]


_OWN_ENGINE_ARGS = {
    "model",
    "load_format",
    "logprobs_mode",
    "generation_config",
    "skip_tokenizer_init",
    "weight_transfer_config",
    "max_model_len",
}


class VllmConfig(Strict):
    """How vLLM runs, in this process (`rollout.engine: vllm`) or as servers (`vllm_server`)."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the engine's weights and cache; auto is the type of the model that trains."
    )
    gpu_memory_utilization: float = Field(
        0.4, gt=0, le=1, description="Share of a GPU's memory that an engine may take, weights and cache together."
    )
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description="Size of the cache in GiB. By default what gpu_memory_utilization leaves; on a CPU 1 GiB.",
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs over which one engine is split.")
    enforce_eager: bool = Field(False, description="Skip compilation and CUDA graphs: a quicker start, slower tokens.")
    sleep: bool = Field(
        True, description="On a GPU, in this process: give the engine's memory back while the model trains."
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of vLLM's engine, under vLLM's own names."
    )
    servers: list[ServerAddress] = Field(
        default_factory=list,
        description="Addresses of running servers (`opd serve`), such as http://127.0.0.1:8000. Without any, the run "
        "starts its own on this machine and stops them at its end.",
    )
    replicas: int = Field(
        1, ge=1, description="How many servers each process of the run starts, where it starts its own."
    )
    devices: list[str] = Field(
        default_factory=list,
        description='CUDA_VISIBLE_DEVICES of each server that the run starts, such as ["1", "2,3"]: not the GPUs that '
        "train.",
    )
    api_key_env: str = Field(
        "OPD_VLLM_KEY", min_length=1, description="The environment variable that holds the servers' key."
    )
    timeout: float = Field(600.0, gt=0, description="Seconds that a server may take for one request.")
    retries: int = Field(4, ge=0, description="How often a request that failed is sent again (overload, bad answers).")
    restart_timeout: float = Field(
        300.0, gt=0, description="Seconds to wait for a server that is starting, or that died, before the run stops."
    )

    @field_validator("engine_args")
    @classmethod
    def _leave_what_the_engine_relies_on(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(set(value) & _OWN_ENGINE_ARGS):
            raise ValueError(f"rollout.vllm.engine_args cannot set {', '.join(taken)}: sampling relies on it")
        return value


class RolloutConfig(Strict):
    """How episodes are sampled."""

    engine: Literal["transformers", "vllm", "vllm_server"] = Field(
        "transformers",
        description="What generates: `transformers` (embedded, CPU or GPU), `vllm` in this process, or `vllm_server`.",
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
    workers: int = Field(
        64,
        ge=1,
        description="Environments that are reset or stepped at once, each by a thread (which waits, if env.workers = "
        "processes). As many as concurrency where they wait for something; as many as cores where they compute.",
    )
    reset_timeout: float = Field(120.0, gt=0, description="Seconds that a reset (and making the environment) may take.")
    step_timeout: float = Field(60.0, gt=0, description="Seconds that a step may take, and closing an environment.")
    grading_timeout: float = Field(
        120.0, gt=0, description="Seconds that scoring an episode may take; they do not count as the step's."
    )
    episode_timeout: float | None = Field(
        None,
        gt=0,
        description="Seconds after which an episode is truncated: no turn is begun, a running step is given up.",
    )
    on_failure: Literal["retry", "keep", "drop"] = Field(
        "retry",
        description="When an environment fails. retry: play the episode again in a fresh one, with the same draws, "
        "then as keep. keep: train on the group's other members. drop: train on none of the group.",
    )
    retries: int = Field(1, ge=1, description="on_failure: retry: how often one episode is played again.")
    min_group_size: int = Field(
        1, ge=1, description="on_failure: retry and keep: a group with fewer members left is dropped."
    )
    stall_warning: float = Field(
        120.0,
        gt=0,
        description="Seconds without an answer or a completion after which the log says who waits for what.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Passed to the chat template, such as `enable_thinking: false`."
    )
    on_rewrite: Literal["fork", "append"] = Field(
        "fork",
        description="When the chat template rewrites earlier turns (drops their thinking, say): start a new "
        "training sequence with what the template renders, or keep appending to what was sampled.",
    )
    correction: CorrectionConfig = Field(
        default_factory=lambda: CorrectionConfig(), description="For the gap between sampler and trainer."
    )
    vllm: VllmConfig = Field(default_factory=VllmConfig)

    @model_validator(mode="after")
    def _policy_is_whole(self) -> RolloutConfig:
        if self.on_failure != "retry" and self.retries != 1:
            raise ValueError(f"rollout.retries is used by retry alone, but on_failure = {self.on_failure}; remove it")
        if self.on_failure == "drop" and self.min_group_size != 1:
            raise ValueError("rollout.min_group_size has no effect with on_failure = drop; remove it, or use keep")
        if self.min_group_size > self.group_size:
            raise ValueError(
                f"rollout.min_group_size = {self.min_group_size} is more than group_size = {self.group_size}: every "
                "group would be dropped. Lower it"
            )
        return self

    @model_validator(mode="after")
    def _truncated_sampling_has_no_ratio(self) -> RolloutConfig:
        mode, written = self.correction_mode, self.correction.mode
        if self.truncated and mode != "none":
            why = f" (what auto means with engine = {self.engine})" if written != mode else ""
            raise ValueError(
                f"rollout.correction.mode = {mode}{why} with top_p = {self.top_p:g}, top_k = {self.top_k}: "
                "the sampler's log-probs are then of a truncated distribution, and no ratio to the trainer's "
                "means anything; set top_p: 1 and top_k: 0, or correction.mode: none"
            )
        return self

    @property
    def truncated(self) -> bool:
        """Whether tokens are drawn from a part of the distribution."""
        return self.top_p < 1 or self.top_k > 0

    @property
    def correction_mode(self) -> Literal["none", "truncate", "mask"]:
        """What `correction.mode` comes to: by itself none for the engine that samples from the network that trains."""
        if self.correction.mode == "auto":
            return "none" if self.engine == "transformers" else "truncate"
        return self.correction.mode


class CorrectionConfig(Strict):
    """Importance weights for tokens that the sampler drew with another probability than the trainer gives them."""

    mode: Literal["auto", "none", "truncate", "mask"] = Field(
        "auto",
        description="truncate: weigh a token by trainer over sampler, at most `high`; mask: drop it outside of `low` "
        "to `high`; auto: truncate, unless the engine samples from the trainer's own network.",
    )
    level: Literal["token", "sequence"] = Field(
        "token", description="Ratio of each token, or of the whole sequence (the product of its tokens')."
    )
    low: float = Field(0.5, ge=0, lt=1, description="mask: the least ratio that is kept.")
    high: float = Field(2.0, gt=1, description="The greatest weight (truncate) or ratio (mask).")

    @model_validator(mode="after")
    def _low_belongs_to_mask(self) -> CorrectionConfig:
        if self.mode != "mask" and self.low != 0.5:
            raise ValueError(f"rollout.correction.low is used by mask alone, but the mode is {self.mode}; remove it")
        return self


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
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's decay rates.")
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
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; by default as torch chooses.")
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
    """What a stage of a method trains with where it differs from `train`."""

    steps: int | None = Field(
        None, ge=1, description="Steps of this stage, where they are fewer than train.steps; more are not taken."
    )
    tasks_per_step: int | None = Field(
        None, ge=1, description="Tasks in a step, or samples in a step of a stage on stored data."
    )
    lr: float | None = Field(None, gt=0, description="Peak learning rate.")

    def over(self, train: TrainConfig) -> TrainConfig:
        """The run's settings with those of the stage laid over them."""
        own = {name: getattr(self, name) for name in StageConfig.model_fields}
        given = {name: value for name, value in own.items() if value is not None}
        return train.model_copy(update=given | {"steps": min(train.steps, self.steps or train.steps)})


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


class PassRateWeighting(Strict):
    """PACED: learn most from the tasks at the edge of what the student can do."""

    alpha: float = Field(1.0, ge=0, description="Exponent of the share of solved episodes.")
    beta: float = Field(1.0, ge=0, description="Exponent of the share of unsolved episodes.")
    normalise: bool = Field(True, description="Divide by the mean over the step, so that the step keeps its size.")
    on: Literal["distilled", "all"] = Field(
        "distilled", description="Distilled tokens (the paper), or those of every component: rewards too, then."
    )


class StepWeighting(Strict):
    """SOD: distil less at turns where the student has left the teacher's ground."""

    epsilon: float = Field(1e-6, gt=0, description="Added to the mean gap of a turn.")
    most: float = Field(1.2, ge=1, description="Greatest weight of a turn.")


class WeightingConfig(Strict):
    """Which tokens count for more; lies over the weights of any method, on its distilled tokens or on all."""

    entropy: float | None = Field(
        None,
        gt=0,
        description="SRPO: exp(-this * entropy of the teacher) over its mean, on distilled tokens.",
    )
    pass_rate: PassRateWeighting | None = Field(
        None, description="PACED: by the pass rate, on distilled tokens or all."
    )
    steps: StepWeighting | None = Field(None, description="SOD: by the divergence of each turn, on distilled tokens.")
    turns: list[float] | None = Field(
        None,
        min_length=1,
        description="A weight for each turn, on every component; the last stands for all after it, 0 masks.",
    )

    @field_validator("turns")
    @classmethod
    def _weights_are_weights(cls, turns: list[float] | None) -> list[float] | None:
        if turns is not None and (min(turns) < 0 or not any(turns)):
            raise ValueError(f"weighting.turns = {turns}: weights must not be negative, nor all 0")
        return turns

    @property
    def needs_scores(self) -> bool:
        """Whether the teacher must be asked before the weights are known."""
        return self.entropy is not None or self.steps is not None


class TeacherConfig(Strict):
    """Who teaches: the same model in another role, or another one."""

    weights: Literal["live", "frozen", "ema", "synced", "trust_region", "external"] = Field(
        "frozen",
        description="live: the student as it is now; frozen: as it was at the start; ema: a running average; "
        "synced: as it was at the last of every so many updates; "
        "trust_region: the initial one's distribution times the student's, each to the power of its share; "
        "external: another model.",
    )
    model: str | None = Field(
        None,
        min_length=1,
        description="external: the model that teaches, named as model.name is. It must have the student's tokenizer.",
    )
    servers: list[ServerAddress] = Field(
        default_factory=list,
        description="external: vLLM servers that hold `model` (`opd serve`), such as http://127.0.0.1:8000, which are "
        "asked in place of loading it: for the sampled token, or its top k, at temperature 1.",
    )
    api_key_env: str = Field(
        "OPD_VLLM_KEY", min_length=1, description="servers: the environment variable that holds their key."
    )
    timeout: float = Field(600.0, gt=0, description="servers: seconds that one may take for one sequence.")
    rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="The student's share: ema mixes it into the weights at each step, trust_region into the log-probs.",
    )
    every: int | None = Field(None, ge=1, description="synced: the updates after which it becomes the student again.")

    @model_validator(mode="after")
    def _every_belongs_to_synced(self) -> TeacherConfig:
        if self.weights == "synced" and self.every is None:
            raise ValueError("teacher.weights = synced needs teacher.every, in updates (published: once an epoch)")
        if self.weights != "synced" and self.every is not None:
            raise ValueError(f"teacher.every is used by synced alone, but teacher.weights = {self.weights}; remove it")
        return self

    @model_validator(mode="after")
    def _model_belongs_to_external(self) -> TeacherConfig:
        if self.weights == "external" and self.model is None:
            raise ValueError("teacher.weights = external needs teacher.model, named as model.name is")
        if self.weights != "external":
            for name in ("model", "servers"):
                if getattr(self, name):
                    raise ValueError(
                        f"teacher.{name} is used by external alone, but teacher.weights = {self.weights}; set weights: "
                        "external, or remove it"
                    )
        if not self.servers and (self.api_key_env, self.timeout) != ("OPD_VLLM_KEY", 600.0):
            raise ValueError("teacher.api_key_env and timeout have no effect without teacher.servers; remove them")
        return self

    @model_validator(mode="after")
    def _rate_belongs_to_a_mixture(self) -> TeacherConfig:
        mixes = self.weights in ("ema", "trust_region")
        if mixes and self.rate is None:
            raise ValueError(f"teacher.weights = {self.weights} needs teacher.rate (published values: 0.01 to 0.05)")
        if not mixes and self.rate is not None:
            raise ValueError(
                f"teacher.rate is used by ema and trust_region alone, but teacher.weights = {self.weights}; remove it"
            )
        return self
