"""The loss of one micro-batch, and what it tells about itself.

Only here do per-token values become a sum; the weights already carry every coefficient and denominator.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from opd.collate import Batch
from opd.divergence import chunked_logprobs, weighted_divergence
from opd.losses import Losses
from opd.modeling import CausalModel
from opd.teacher import Taught


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What one micro-batch adds to the step's loss."""

    loss: Tensor
    """Scalar, with a graph even where nothing trains, so that sharded gradients always reduce."""
    divergence: Tensor | None
    """[N] nats per sampled token, detached; None where nothing is distilled."""
    clipped: Tensor | None
    """[N] share of the vocabulary's entries that a point-wise clip cut; None without one."""


def objective(student: CausalModel, batch: Batch, losses: Losses, taught: Taught | None) -> Objective:
    """The student's forward pass, then every component that the method asked for."""
    hidden = student(batch.input_ids, batch.rows)
    loss = hidden.sum() * 0.0
    divergence = clipped = None
    if losses.distill:
        assert taught is not None
        part = weighted_divergence(
            hidden,
            student.head(),
            taught.hidden,
            taught.head,
            losses.distill.kind,
            beta=losses.distill.beta,
            temperature=losses.distill.temperature,
            clip=losses.distill.clip,
            weights=batch.distill_weight,
        )
        loss, divergence = loss + part.total, part.per_token
        clipped = part.clipped if losses.distill.clip is not None else None
    if losses.ce:
        loss = loss - chunked_logprobs(hidden, student.head(), batch.targets, weights=batch.ce_weight)
    return Objective(loss=loss, divergence=divergence, clipped=clipped)
