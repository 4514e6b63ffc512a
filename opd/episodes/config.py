"""Holds the settings of environments and of how episodes are sampled. No torch here."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from opd.config import Strict, setting
from opd.engines.config import Limits, VllmConfig
from opd.objective.config import CorrectionConfig


class EnvConfig(Strict):
    """Sets where the student acts."""

    id: str = Field(description="A registered id (`opd envs list`), or `my_package.my_module:MyEnv`.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of the environment's constructor.")
    max_turns: int = Field(8, ge=1, description="Turns after which an episode is truncated.")
    workers: Literal["auto", "threads", "processes"] = Field(
        "auto",
        description="Where environments live. threads: in this process. processes: each in one of its own, which is "
        "killed if it hangs and takes nobody along if it crashes; for those that compute much, too. auto: processes "
        "for textworld (an interpreter in C) and for what is `unprotected`, else threads.",
    )

    probe: bool = Field(
        True,
        description="Begin a task of training and one of evaluation before a model is loaded, to see that they can be "
        "played. false: an environment that counts its resets, say, is left alone.",
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


class RolloutConfig(Strict):
    """Sets how episodes are sampled."""

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
    retries: int = setting(
        1, when={"on_failure": ["retry"]}, ge=1, description="How often one episode is played again."
    )
    min_group_size: int = setting(
        1, when={"on_failure": ["retry", "keep"]}, ge=1, description="A group with fewer members left is dropped."
    )
    stall_warning: float = Field(
        120.0,
        gt=0,
        description="Seconds without an answer or a completion after which the log says who waits for what.",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Passed to the chat template, such as `enable_thinking: false`."
    )
    on_rewrite: Literal["auto", "fork", "append"] = Field(
        "auto",
        description="When the chat template rewrites earlier turns. fork: start a new training sequence with what the "
        "template renders, as a deployed model would read it. append: go on with what was sampled. auto: append where "
        "only the thoughts of earlier turns are dropped, else fork.",
    )
    correction: CorrectionConfig = Field(
        default_factory=lambda: CorrectionConfig(), description="For the gap between sampler and trainer."
    )
    vllm: VllmConfig = Field(default_factory=VllmConfig)

    @model_validator(mode="after")
    def _groups_can_be_large_enough(self) -> RolloutConfig:
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
        """True if tokens are drawn from a part of the distribution."""
        return self.top_p < 1 or self.top_k > 0

    @property
    def limits(self) -> Limits:
        """Return what the engine must have room for."""
        return Limits(self.max_length, self.concurrency)

    @property
    def correction_mode(self) -> Literal["none", "truncate", "mask"]:
        """Return the mode that `correction.mode` stands for.

        `auto` is none for the engine that samples from the network that trains.
        """
        if self.correction.mode == "auto":
            return "none" if self.engine == "transformers" else "truncate"
        return self.correction.mode
