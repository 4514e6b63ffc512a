"""The settings of the engines that generate. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import (
    Field,
    field_validator,
)

from opd.config import ServerAddress, Strict

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
    """The settings of vLLM, in this process (`rollout.engine: vllm`) or as servers (`vllm_server`)."""

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


@dataclass(frozen=True, slots=True)
class Limits:
    """The sizes that an engine must have room for: the longest sequence in tokens, and the sequences held at once."""

    max_length: int
    concurrency: int
