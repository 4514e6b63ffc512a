"""Computes how far a student's next-token distribution is from a teacher's: exact values and gradients, in nats.

`token_divergence` reads logits; the chunked functions read hidden states and never hold `[N, V]` logits:
`opd.maths.divergence_tiles` does the work on one tile of them.

The gradient reaches the student alone. Who the teacher is, which tokens count and what the sum is divided
by is decided elsewhere (`opd.objective.objective`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from opd.errors import ConfigError, DataError
from opd.losses import Divergence
from opd.maths.divergence_tiles import DivergenceTile, Logged, StoredTile, divergence_of
from opd.maths.head import Head, Projection, compute_dtype, per_token, projections, weighted_sum
from opd.maths.top_k import choose_top, complete, restrict


class WeightedDivergence(NamedTuple):
    """Holds what a training step needs of a divergence: the sum that trains, and values to log, without gradient."""

    total: Tensor
    """Scalar: the sum of weights times values. The only part with a gradient."""
    per_token: Tensor
    """[N] nats."""
    clipped: Tensor
    """[N] share of the vocabulary's entries that `clip` cut; zeros without it."""
    student_entropy: Tensor
    """[N] nats, at the temperature of the divergence."""
    teacher_entropy: Tensor
    """[N] nats, at the temperature of the divergence."""
    kept: Tensor
    """[N] probability that the top k hold, on the side where that is less; ones without `top_k`."""


def token_divergence(student_logits: Tensor, teacher_logits: Tensor, divergence: Divergence) -> Tensor:
    """Compute the divergence at each position: [..., V], [..., V] -> [...] nats, float32 or wider, never negative.

    The gradient reaches the student only. An entry that is -inf on both sides adds nothing, to the value or to the
    gradient. A `clip` is for `chunked_divergence`.

    Raises:
        ConfigError: a clip, a temperature that is not said, or a `top_k` beyond the vocabulary.
        DataError: shapes that differ, or a divergence that is infinite.
    """
    if divergence.clip is not None:
        raise ConfigError(f"divergence.clip = {divergence.clip} is for hidden states; use chunked_divergence")
    temperature = _temperature(divergence)
    if student_logits.shape != teacher_logits.shape:
        raise DataError(f"student logits {list(student_logits.shape)}, teacher logits {list(teacher_logits.shape)}")
    dtype = compute_dtype(student_logits, teacher_logits)
    student = (student_logits.to(dtype) / temperature).log_softmax(-1)
    teacher = (teacher_logits.detach().to(dtype) / temperature).log_softmax(-1)
    if divergence.top_k is not None:
        student, teacher = restrict(divergence, student, teacher, choose_top(divergence, student, teacher))
    return _finite(divergence_of(student, teacher, divergence))


def chunked_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    divergence: Divergence,
    *,
    weights: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Compute `token_divergence` of hidden states `[N, H]` and `[N, H']`, without their logits.

    Without `weights`: per-token values `[N]`; the backward pass projects again. With `weights` `[N]`, which
    get no gradient: the scalar `sum(weights * values)`; its gradients are taken while a tile of logits is
    at hand, for as many products as the dense form, and it can be back-propagated once.
    `weighted_divergence` is the same with values to log.

    A head is a weight `[V, H]` or a `Head`. Gradients reach the student's hidden states, weight and bias
    where they require them, never the teacher. Computed in float32, or in float64 if hidden states are. A head
    that ZeRO-3 has sharded must be gathered around the call, inside the engine's forward pass. With `top_k` the
    projections, which cost most, are the same.

    Args:
        chunk_size: tokens in a tile; by default as many as `opd.maths.head.TILE_BYTES` hold.

    Raises:
        ConfigError: a temperature that is not said, or a `top_k` beyond the vocabulary.
        DataError: shapes or vocabularies that do not match, or a divergence that is infinite.
    """
    sides = (student_hidden, student_head, teacher_hidden, teacher_head)
    if weights is not None:
        return weighted_divergence(*sides, divergence, weights=weights, chunk_size=chunk_size).total
    student, start, _ = _prepare(*sides, divergence, chunk_size)
    return _finite(per_token(student_hidden, student, start))


def weighted_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    divergence: Divergence,
    *,
    weights: Tensor,
    chunk_size: int | None = None,
) -> WeightedDivergence:
    """Compute `chunked_divergence` with `weights`: the weighted sum, and what there is to log beside it."""
    sides = (student_hidden, student_head, teacher_hidden, teacher_head)
    student, start, logged = _prepare(*sides, divergence, chunk_size)
    total, values = weighted_sum(student_hidden, student, start, weights)
    return WeightedDivergence(total, _finite(values), *logged)


def stored_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    divergence: Divergence,
    *,
    weights: Tensor,
    chunk_size: int | None = None,
) -> WeightedDivergence:
    """Compute `weighted_divergence` where only the teacher's likeliest entries are known: ids and log-probs [N, k].

    The log-probs are the teacher's at the divergence's temperature, and k is its `top_k`. With `tail` all other
    entries together are one more, as `opd.maths.top_k.complete` says. Of the entropies only the student's is known.

    Raises:
        ConfigError: a support that is not the teacher's, or a temperature that is not said.
        DataError: shapes that do not match.
    """
    _check_stored(student_hidden, top_ids, top_logprobs, divergence)
    student = Projection.of(student_hidden, student_head, _temperature(divergence), chunk_size)
    if top_ids.shape[1] == student.head.vocabulary:  # the whole vocabulary leaves no tail
        divergence = replace(divergence, tail=False)
    stored = top_logprobs.detach().to(student.dtype)
    teacher = complete(stored, tail=divergence.tail)
    columns = torch.zeros(4, len(student_hidden), dtype=student.dtype, device=student_hidden.device)
    logged = Logged(*columns)
    logged.teacher_entropy.fill_(torch.nan)
    logged.kept.copy_(stored.exp().sum(-1).clamp(max=1))
    start = partial(StoredTile, divergence, top_ids, teacher, logged)
    total, values = weighted_sum(student_hidden, student, start, weights)
    return WeightedDivergence(total, _finite(values), *logged)


def _check_stored(hidden: Tensor, top_ids: Tensor, top_logprobs: Tensor, divergence: Divergence) -> None:
    """Raise as `stored_divergence` says, for entries that are not these tokens' or not this divergence's."""
    if divergence.support != "teacher":
        raise ConfigError("divergence.support = student, but only the teacher's likeliest entries are stored")
    if top_ids.shape != top_logprobs.shape or top_ids.ndim != 2 or len(top_ids) != len(hidden):
        shapes = [list(t.shape) for t in (hidden, top_ids, top_logprobs)]
        raise DataError(f"hidden states, ids and log-probs of the top k do not match: {shapes}")
    if top_ids.shape[1] != divergence.top_k:
        raise DataError(f"the top {top_ids.shape[1]} are stored, but divergence.top_k = {divergence.top_k}")


def _temperature(divergence: Divergence) -> float:
    if divergence.temperature is None:
        raise ConfigError("divergence.temperature = None is the sampling temperature, which is not known here; say it")
    return divergence.temperature


def _prepare(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    divergence: Divergence,
    chunk_size: int | None,
) -> tuple[Projection, partial[DivergenceTile], Logged]:
    """Return the student's projection, what begins a sweep, and where the sweep notes what it sees."""
    sides = (student_hidden, student_head, teacher_hidden, teacher_head)
    student, teacher = projections(*sides, _temperature(divergence), chunk_size)
    columns = torch.zeros(4, len(student_hidden), dtype=student.dtype, device=student_hidden.device)
    logged = Logged(*columns)
    logged.kept.fill_(1)
    start = partial(DivergenceTile, divergence, teacher, teacher_hidden.detach(), logged, student.narrow)
    return student, start, logged


def _finite(values: Tensor) -> Tensor:
    """Return the values; raise DataError if one is infinite. (A nan is a diverged model's, and stays to be seen.)"""
    infinite = values.isinf()
    if infinite.any():
        raise DataError(
            f"the divergence is infinite at {int(infinite.sum())} of {values.numel()} positions: one side excludes "
            "(-inf) a token that the other allows. Mask both sides alike, or use jsd, which is always finite"
        )
    return values
