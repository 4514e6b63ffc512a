"""A check before the first update: the sampler's log-probs must be those of the trainer.

A wrong position, a stale cache or another temperature shows here as a gap of tenths of a nat; rounding alone is far
smaller.
"""

from __future__ import annotations

import torch

from opd.engines.base import Sampling
from opd.errors import ModelError
from opd.maths.logprobs import chunked_logprobs
from opd.models.causal import CausalModel
from opd.objective.collate import Batch

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""The largest mean gap in nats, by the type of the weights; 16-bit kernels differ by more than a sum's rounding."""


@torch.no_grad()
def sampler_gap(
    student: CausalModel, batch: Batch, sampling: Sampling, *, engine_dtype: torch.dtype | None = None
) -> float:
    """Measure the mean absolute difference, in nats, between the sampler's log-probs and the student's own.

    `engine_dtype` is the type that the engine computes in where it is not the student's.

    Raises ModelError beyond the tolerance. Truncated sampling (top-p, top-k) renormalises the sampler's
    log-probs, so that they cannot be compared; the gap is then nan, as it is of a batch without sampled tokens.
    """
    if sampling.top_p < 1 or sampling.top_k:
        return float("nan")
    own = chunked_logprobs(
        student(batch.input_ids, batch.rows), student.head(), batch.targets, temperature=sampling.temperature
    )
    if not len(own):
        return float("nan")
    gap = float((own - batch.sampler_logprobs).abs().mean())
    dtype = next(student.parameters()).dtype
    allowed = max(TOLERANCE[dtype], TOLERANCE[engine_dtype or dtype])
    if not gap <= allowed:
        raise ModelError(
            f"the rollout engine's log-probs differ from the trainer's by {gap:.3g} nats a token (allowed: {allowed}): "
            "the engine does not sample from the policy that trains. Check the engine's weights, type and temperature."
        )
    return gap
