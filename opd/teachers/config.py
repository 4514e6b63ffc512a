"""The settings of the teacher. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
)

from opd.config import PathText, ServerAddress, Strict, setting


class TeacherConfig(Strict):
    """The teacher: the same model in another role, or another model."""

    weights: Literal["live", "frozen", "ema", "synced", "trust_region", "external"] = Field(
        "frozen",
        description="live: the student as it is now; frozen: as it was at the start; ema: a running average; "
        "synced: as it was at the last of every so many updates; "
        "trust_region: the initial one's distribution times the student's, each to the power of its share; "
        "external: another model.",
    )
    model: PathText | None = setting(
        None,
        when={"weights": ["external"]},
        needed="named as model.name is",
        min_length=1,
        description="The model that teaches, named as model.name is. It must have the student's tokenizer.",
    )
    servers: list[ServerAddress] = setting(
        [],
        when={"weights": ["external"]},
        description="vLLM servers that hold `model` (`opd serve`), such as http://127.0.0.1:8000, which are asked in "
        "place of loading it: for the sampled token, or its top k, at temperature 1.",
    )
    api_key_env: str = setting(
        "OPD_VLLM_KEY",
        when={"servers": True},
        min_length=1,
        description="The environment variable that holds the servers' key.",
    )
    timeout: float = setting(
        600.0, when={"servers": True}, gt=0, description="Seconds that a server may take for one sequence."
    )
    rate: float | None = setting(
        None,
        when={"weights": ["ema", "trust_region"]},
        needed="published values: 0.01 to 0.05",
        gt=0,
        le=1,
        description="The student's share: ema mixes it into the weights at each step, trust_region into the log-probs.",
    )
    every: int | None = setting(
        None,
        when={"weights": ["synced"]},
        needed="in updates; published: once an epoch",
        ge=1,
        description="The updates after which it becomes the student again.",
    )
