"""The settings of the teacher. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from opd.config import ServerAddress, Strict


class TeacherConfig(Strict):
    """The teacher: the same model in another role, or another model."""

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
