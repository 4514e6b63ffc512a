"""What each of many ranks holds and sends when DeepSpeed trains, from a model's shapes alone.

What follows from counting (weights, gradients, optimiser, teacher, cache, traffic) is exact up to padding and what
torch adds, and is held against real allocations in tests; activations are a rule of thumb. `opd train --dry-run`
prints it, and the tables of docs/scaling.md come from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd.backends import deepspeed_json
from opd.episodes.config import RolloutConfig
from opd.launch.plan.memory import (
    BYTES,
    ModelSize,
    Part,
    activations,
    cache_of_rollouts,
    external_bytes,
    teacher_in_words,
    tile_bytes,
)
from opd.models.config import ModelConfig
from opd.teachers.config import TeacherConfig

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
_DEFAULT_BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`, in elements, where its JSON says nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How DeepSpeed divides a run among ranks."""

    stage: int
    ranks: int
    bucket: int | None = None
    """Elements in a bucket of gradients; None: as wide as the model, squared ("auto")."""
    optimizer_on: str | None = None
    """cpu or nvme where the optimiser is offloaded."""
    weights_on: str | None = None

    @staticmethod
    def of(data: Mapping[str, Any], ranks: int) -> Sharding:
        """Read it from a DeepSpeed JSON, for so many ranks."""
        bucket = (data.get("zero_optimization") or {}).get("reduce_bucket_size", _DEFAULT_BUCKET)
        return Sharding(
            stage=deepspeed_json.stage(data),
            ranks=ranks,
            bucket=None if bucket == deepspeed_json.AUTO else int(bucket),
            optimizer_on=deepspeed_json.offloads(data, "optimizer"),
            weights_on=deepspeed_json.offloads(data, "param"),
        )

    def share(self, from_stage: int) -> float:
        """Return the share of something that one rank holds, if ZeRO divides it from this stage on."""
        return 1 / self.ranks if self.stage >= from_stage else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The settings that sizes depend on."""

    model: ModelConfig
    rollout: RolloutConfig
    teacher: TeacherConfig | None
    tokens_per_microbatch: int
    episodes: int
    """The most episodes that one rank plays at once."""
    embedded: bool
    """True: the embedded engine samples, and with ZeRO-3 holds a whole copy of the model. False: vLLM samples."""
    gpu: bool

    @property
    def width(self) -> int:
        """The bytes of a weight."""
        dtype = self.model.dtype
        return BYTES[dtype if dtype != "auto" else "bfloat16" if self.gpu else "float32"]

    def trained(self, size: ModelSize) -> int:
        return size.parameters if self.model.lora is None else size.adapters(self.model.lora)

    def weights(self, size: ModelSize) -> int:
        """Parameters, adapters included."""
        return size.parameters + (size.adapters(self.model.lora) if self.model.lora else 0)


def device_memory(size: ModelSize, work: Work, sharding: Sharding) -> list[Part]:
    """Return the parts of the peak on one rank's device, in bytes; their sum is an upper estimate."""
    width, trained = work.width, work.trained(size)
    copies = {"live": 0, "frozen": width, "synced": width, "trust_region": width, "ema": 4}
    teaching = work.teacher.weights if work.teacher else "none"
    other = round(external_bytes(work.teacher, width) * sharding.share(3)) if work.teacher else 0
    tokens = work.tokens_per_microbatch // 2 if work.teacher else work.tokens_per_microbatch
    tile = tile_bytes(tokens, size.vocabulary, gpu=work.gpu)
    parts = [
        Part("weights", _on_device(work.weights(size) * width * sharding.share(3), sharding.weights_on)),
        Part("gradients", round(trained * width * sharding.share(2))),
        Part("optimiser", _on_device(_optimizer_bytes(work, trained, sharding), sharding.optimizer_on), "float32"),
        Part(
            "teacher",
            round(trained * copies.get(teaching, 0) * sharding.share(3)) + other,
            teacher_in_words(work.teacher),
        ),
        Part("gathered", _gathered_bytes(size, work, sharding), "layers, heads, the head's gradient, buckets"),
        Part("activations", activations(size, tokens, width, work.model.gradient_checkpointing), "rough"),
        Part("logits", tile * (2 if work.teacher else 1), "a tile at a time, never all"),
        _cache(size, work),
    ]
    if work.embedded and sharding.stage == 3:
        parts.append(Part("copy for rollouts", work.weights(size) * width, "the embedded engine's, whole"))
    return parts


def host_memory(size: ModelSize, work: Work, sharding: Sharding) -> list[Part]:
    """Return what one rank keeps in its machine's memory (or on its disk), in bytes; nothing without offload."""
    trained = work.trained(size)
    parts = []
    if sharding.optimizer_on:
        parts.append(Part("optimiser", round(_optimizer_bytes(work, trained, sharding)), sharding.optimizer_on))
    if sharding.weights_on:
        parts.append(Part("weights", round(work.weights(size) * work.width / sharding.ranks), sharding.weights_on))
    return parts


def traffic(size: ModelSize, work: Work, sharding: Sharding, *, microbatches: int, updates: int = 1) -> list[Part]:
    """Return the bytes that one rank sends in a step, by ring algorithms; `microbatches` on each rank an update."""
    if sharding.ranks == 1:
        return []
    ring = (sharding.ranks - 1) / sharding.ranks
    whole = work.weights(size) * work.width * ring
    trained = work.trained(size) * work.width * ring
    passes = {0: 2.0, 1: 1.0, 2: float(microbatches), 3: float(microbatches)}[sharding.stage]
    parts = [Part("gradients", round(updates * passes * trained), "reduced")]
    if sharding.stage in (1, 2):
        parts.append(Part("weights", round(updates * trained), "gathered after the update"))
    if sharding.stage == 3:
        parts.append(Part("weights", round(updates * microbatches * 2 * whole), "gathered forward and backward"))
        if work.teacher:
            passes = 2 if work.teacher.weights == "trust_region" else 1
            parts.append(
                Part("teacher", round(updates * microbatches * passes * whole), "gathered for its forward pass")
            )
        if work.embedded:
            parts.append(Part("engine", round(whole), "gathered for the rollouts' copy"))
    return parts


def _on_device(size: float, elsewhere: str | None) -> int:
    return 0 if elsewhere else round(size)


def _optimizer_bytes(work: Work, trained: int, sharding: Sharding) -> float:
    """Return the bytes of two moments, and of float32 weights that are updated (ZeRO-0 in float32 has no others)."""
    copies = 2 if sharding.stage == 0 and work.width == 4 else 3
    return copies * 4 * trained * sharding.share(1)


def _gathered_bytes(size: ModelSize, work: Work, sharding: Sharding) -> int:
    """Return the bytes whole for a moment: the head's float32 gradient; with ZeRO-3 also two layers and the heads."""
    head = size.vocabulary * size.hidden
    gradient = 0 if work.model.lora else 4 * head
    bucket = (sharding.bucket if sharding.bucket is not None else size.hidden**2) * work.width
    bucket = 0 if sharding.stage == 0 else min(bucket, work.trained(size) * work.width)
    # A trust region lays the heads of two teachers side by side, unless no head trains.
    mixed = 2 if work.teacher and work.teacher.weights == "trust_region" and not work.model.lora else 0
    if sharding.stage < 3:
        return gradient + bucket + mixed * head * work.width
    heads = head * work.width * (mixed + (2 if work.teacher else 1))
    return gradient + bucket + heads + 2 * largest_layer(size) * work.width


def largest_layer(size: ModelSize) -> int:
    """Count the parameters of the largest layer, or of the largest weight outside of the layers."""
    layers: dict[str, int] = {}
    for name, shape in size.shapes.items():
        found = _LAYER.search(name)
        key = found.group(1) if found else name
        layers[key] = layers.get(key, 0) + math.prod(shape)
    return max(layers.values())


def _cache(size: ModelSize, work: Work) -> Part:
    if not work.embedded:
        return Part("cache of rollouts", 0, "another process's")
    return cache_of_rollouts(size, work.rollout, work.episodes, work.width)
