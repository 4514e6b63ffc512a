"""How far a student's next-token distribution is from a teacher's: exact values and exact gradients, in nats.

`token_divergence` reads logits; the chunked functions read hidden states and never hold `[N, V]` logits.
The gradient reaches the student alone. Who the teacher is, which tokens count and what the sum is divided
by is decided elsewhere (`opd.objective.objective`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd.errors import ConfigError, DataError
from opd.losses import SUPPORTS, Divergence, unknown
from opd.maths.head import (
    Head,
    Projection,
    Projector,
    compute_dtype,
    per_token,
    projections,
    row_block,
    tiles,
    weighted_sum,
)
from opd.maths.logprobs import entropy_of

LEAST_TAIL = 1e-7
"""Stored log-probs are rounded, so that k of them may add up to 1: less than this is not taken for the rest."""

KERNEL = True
"""On a GPU, do a tile's work in one kernel (`opd.maths.kernels`); False does it operation by operation, as on a CPU."""


class WeightedDivergence(NamedTuple):
    """What a training step needs of a divergence: the sum that trains, and values to log, without gradient."""

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
    """Divergence of each position: [..., V], [..., V] -> [...] nats, float32 or wider, never negative.

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
        student, teacher = _restrict(divergence, student, teacher, _top_ids(divergence, student, teacher))
    values: Tensor = _FromLogProbs.apply(student, teacher, divergence)
    return _finite(values)


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
    """`token_divergence` of hidden states `[N, H]` and `[N, H']`, without their logits.

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
    """`chunked_divergence` with `weights`: the weighted sum, and what there is to log beside it."""
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
    """`weighted_divergence` from a teacher of whom only the likeliest entries are known: ids and log-probs [N, k].

    The log-probs are the teacher's at the divergence's temperature, and k is its `top_k`. With `tail` all other
    entries together are one more; its mass under the teacher is what the k leave of 1, at least `LEAST_TAIL`. Of the
    entropies only the student's is known.

    Raises:
        ConfigError: a support that is not the teacher's, or a temperature that is not said.
        DataError: shapes that do not match.
    """
    if divergence.support != "teacher":
        raise ConfigError("divergence.support = student, but only the teacher's likeliest entries are stored")
    if top_ids.shape != top_logprobs.shape or top_ids.ndim != 2 or len(top_ids) != len(student_hidden):
        shapes = [list(t.shape) for t in (student_hidden, top_ids, top_logprobs)]
        raise DataError(f"hidden states, ids and log-probs of the top k do not match: {shapes}")
    if top_ids.shape[1] != divergence.top_k:
        raise DataError(f"the top {top_ids.shape[1]} are stored, but divergence.top_k = {divergence.top_k}")
    student = Projection.of(student_hidden, student_head, _temperature(divergence), chunk_size)
    if top_ids.shape[1] == student.head.vocabulary:  # the whole vocabulary leaves no tail
        divergence = replace(divergence, tail=False)
    teacher = top_logprobs.detach().to(student.dtype)
    mass = teacher.exp().sum(-1, keepdim=True)
    if divergence.tail:
        teacher = torch.cat([teacher, (1 - mass).clamp(min=LEAST_TAIL).log()], -1)
    else:
        teacher = teacher.log_softmax(-1)
    columns = torch.zeros(4, len(student_hidden), dtype=student.dtype, device=student_hidden.device)
    logged = _Logged(*columns)
    logged.teacher_entropy.fill_(torch.nan)
    logged.kept.copy_(mass.squeeze(-1).clamp(max=1))
    start = partial(_StoredTile, divergence, top_ids, teacher, logged)
    total, values = weighted_sum(student_hidden, student, start, weights)
    return WeightedDivergence(total, _finite(values), *logged)


def _temperature(divergence: Divergence) -> float:
    if divergence.temperature is None:
        raise ConfigError("divergence.temperature = None is the sampling temperature, which is not known here; say it")
    return divergence.temperature


def _top_ids(divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """The entries that are told apart: log-probs [..., V], [..., V] -> [..., top_k]. Raises ConfigError."""
    vocabulary = student.shape[-1]
    if divergence.top_k is None or divergence.top_k > vocabulary:
        raise ConfigError(f"divergence.top_k = {divergence.top_k}: must be at most the vocabulary's {vocabulary}")
    if divergence.support == "teacher":
        chosen = teacher
    elif divergence.support == "student":
        chosen = student
    else:
        raise unknown("divergence.support", divergence.support, SUPPORTS)
    return chosen.detach().topk(divergence.top_k, dim=-1).indices


def _restrict(divergence: Divergence, student: Tensor, teacher: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs [..., V] -> [..., k + 1] with a tail, [..., k] renormalised without."""
    if divergence.tail:
        return _with_tail(student, ids), _with_tail(teacher, ids)
    kept = [side.gather(-1, ids) for side in (student, teacher)]
    if any(side.isneginf().all(-1).any() for side in kept):
        raise DataError(f"one side has no mass on the top {divergence.top_k} of the {divergence.support}: use the tail")
    return kept[0].log_softmax(-1), kept[1].log_softmax(-1)


def _total(divergence: Divergence, summands: Tensor) -> Tensor:
    """[..., V] -> [...]; rounding may leave a sum of -1e-17, which is no divergence."""
    total = summands.sum(-1)
    return total if divergence.clip is not None else total.clamp_(min=0)


class _FromLogProbs(torch.autograd.Function):
    """Values from log-probs, those of a top k included; differentiates by the student's log-probs."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        student, teacher, divergence = args
        formula, beta = divergence.formula, divergence.beta
        summands, slope = formula.summands(student, teacher, student.exp(), teacher.exp(), beta)
        ctx.save_for_backward(slope)
        return _total(divergence, summands)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (slope,) = ctx.saved_tensors
        return slope * grads[0].unsqueeze(-1), None, None


class _Logged(NamedTuple):
    """What a sweep notes of each token beside its value: [N] each."""

    clipped: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    kept: Tensor


class _DivergenceTile:
    """The divergence of a tile: projects the teacher's hidden states beside the student's."""

    def __init__(
        self, divergence: Divergence, teacher: Projection, hidden: Tensor, logged: _Logged, narrow: torch.dtype
    ) -> None:
        self.divergence, self.hidden, self.logged, self.narrow = divergence, hidden, logged, narrow
        self.projector = Projector(teacher)

    def __call__(self, logits: Tensor, rows: slice, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        teacher_logits = self.projector.logits(self.hidden[rows])
        values = logits.new_empty(len(logits))
        logged = _Logged(*(column[rows] for column in self.logged))
        if (kernel := _kernel_for(self.divergence, logits)) is not None:
            arguments = (logits, teacher_logits, weights, self.narrow, values, *logged[:3])
            return values, kernel(self.divergence, *arguments)
        work = self._full if self.divergence.top_k is None else self._top_k
        for part in tiles(len(logits), row_block(logits)):
            noted = _Logged(*(column[part] for column in logged))
            weight = None if weights is None else weights[part, None]
            values[part] = work(logits[part], teacher_logits[part], weight, noted)
        return values, logits

    def _full(self, logits: Tensor, teacher_logits: Tensor, weight: Tensor | None, noted: _Logged) -> Tensor:
        """Some rows: [n, V], [n, V] -> [n]; `logits` becomes the gradient."""
        found = _full_rows(self.divergence, logits, teacher_logits, weight)
        noted.student_entropy.copy_(found.student_entropy)
        noted.teacher_entropy.copy_(found.teacher_entropy)
        if found.clipped is not None:
            noted.clipped.copy_(found.clipped)
        if found.gradient is not None:
            logits.copy_(found.gradient)
        return found.values

    def _top_k(self, logits: Tensor, teacher_logits: Tensor, weight: Tensor | None, noted: _Logged) -> Tensor:
        """As `_full`; the way back, through a sort and a tail, is left to autograd."""
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_(weight is not None)
            student, teacher = leaf.log_softmax(-1), teacher_logits.log_softmax(-1)
            ids = _top_ids(self.divergence, student, teacher)
            told = _restrict(self.divergence, student, teacher, ids)
            values: Tensor = _FromLogProbs.apply(*told, self.divergence)
        student = student.detach()
        p, q = student.exp(), teacher.exp()
        noted.kept.copy_(torch.minimum(p.gather(-1, ids).sum(-1), q.gather(-1, ids).sum(-1)))
        noted.student_entropy.copy_(entropy_of(student, p))
        noted.teacher_entropy.copy_(entropy_of(teacher, q))
        if weight is not None:
            (gradient,) = torch.autograd.grad(values, leaf, weight.squeeze(-1))
            logits.copy_(gradient)
        return values.detach()


class _StoredTile:
    """The divergence of a tile from what is known of the teacher: its likeliest ids, and their log-probs and tail."""

    def __init__(self, divergence: Divergence, ids: Tensor, teacher: Tensor, logged: _Logged) -> None:
        self.divergence, self.ids, self.teacher, self.logged = divergence, ids, teacher, logged

    def __call__(self, logits: Tensor, rows: slice, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        values = logits.new_empty(len(logits))
        for part in tiles(len(logits), row_block(logits)):
            ids, teacher = self.ids[rows][part], self.teacher[rows][part]
            with torch.enable_grad():
                leaf = logits[part].detach().requires_grad_(weights is not None)
                student = leaf.log_softmax(-1)
                told = _with_tail(student, ids) if self.divergence.tail else student.gather(-1, ids).log_softmax(-1)
                found: Tensor = _FromLogProbs.apply(told, teacher, self.divergence)
            own = student.detach()
            p = own.exp()
            kept = self.logged.kept[rows][part]
            kept.copy_(torch.minimum(kept, p.gather(-1, ids).sum(-1)))
            self.logged.student_entropy[rows][part].copy_(entropy_of(own, p))
            if weights is not None:
                (gradient,) = torch.autograd.grad(found, leaf, weights[part])
                logits[part].copy_(gradient)
            values[part] = found.detach()
        return values, logits


class _Rows(NamedTuple):
    """What becomes of some rows: [n] each, but for the gradient by the student's logits, [n, V]."""

    values: Tensor
    gradient: Tensor | None
    clipped: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor


def _full_rows(divergence: Divergence, logits: Tensor, teacher_logits: Tensor, weight: Tensor | None) -> _Rows:
    """Some rows over the full vocabulary: [n, V], [n, V] and, where a gradient is wanted, [n, 1]."""
    student, teacher = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    p, q = student.exp(), teacher.exp()
    summands, slope = divergence.formula.summands(student, teacher, p, q, divergence.beta)
    clipped = gradient = None
    if divergence.clip is not None:
        cut = summands > divergence.clip
        summands.clamp_(max=divergence.clip)
        slope.masked_fill_(cut, 0)
        clipped = cut.sum(-1, dtype=p.dtype) / cut.shape[-1]
    entropies = entropy_of(student, p), entropy_of(teacher, q)
    values = _total(divergence, summands)
    if weight is not None:
        # The way back through the log-softmax: slope - p * sum(slope).
        gradient = slope.addcmul_(p, slope.sum(-1, keepdim=True), value=-1).mul_(weight)
    return _Rows(values, gradient, clipped, *entropies)


def _kernel_for(divergence: Divergence, logits: Tensor) -> Callable[..., Tensor] | None:
    """The kernel, if it can and knows the divergence; what it does not know is done operation by operation."""
    if divergence.top_k is not None or (kernel := _kernel(logits)) is None:
        return None
    from opd.maths.kernels import KINDS

    return kernel if divergence.formula.name in KINDS else None


def _kernel(logits: Tensor) -> Callable[..., Tensor] | None:
    """`opd.maths.kernels.divergence_rows`, which does what `_full_rows` does, if it can for such logits."""
    return _compiled_for(logits.device) if KERNEL and logits.is_cuda and logits.dtype == torch.float32 else None


@cache
def _compiled_for(device: torch.device) -> Callable[..., Tensor] | None:
    """None where Triton is missing or does not work, which is said, and on cards that are too old for it.

    It comes with torch for Linux, and needs a C compiler, Python's headers and a folder to write to.
    """
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from opd.maths.kernels import divergence_rows

        tiny = torch.zeros(2, 16, device=device)
        columns = torch.empty(4, 2, device=device)
        divergence_rows(Divergence("forward_kl"), tiny, tiny.clone(), None, tiny.dtype, *columns)
    except Exception as error:  # whatever a compiler says
        warnings.warn(f"divergences run operation by operation, three times as slow: {error!r}", stacklevel=2)
        return None
    return divergence_rows


def _prepare(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    divergence: Divergence,
    chunk_size: int | None,
) -> tuple[Projection, partial[_DivergenceTile], _Logged]:
    """The student's projection, what begins a sweep, and where the sweep notes what it sees."""
    sides = (student_hidden, student_head, teacher_hidden, teacher_head)
    student, teacher = projections(*sides, _temperature(divergence), chunk_size)
    columns = torch.zeros(4, len(student_hidden), dtype=student.dtype, device=student_hidden.device)
    logged = _Logged(*columns)
    logged.kept.fill_(1)
    start = partial(_DivergenceTile, divergence, teacher, teacher_hidden.detach(), logged, student.narrow)
    return student, start, logged


def _with_tail(logprobs: Tensor, ids: Tensor) -> Tensor:
    """The log-probs at `ids`, then the log of the mass of all others, summed (1 - kept mass would cancel)."""
    rest = logprobs.scatter(-1, ids, -torch.inf)
    # A tail without mass: logsumexp's own gradient would be nan there.
    empty = rest.isneginf().all(-1, keepdim=True)
    tail = rest.masked_fill(empty, 0).logsumexp(-1, keepdim=True).masked_fill(empty, -torch.inf)
    return torch.cat([logprobs.gather(-1, ids), tail], dim=-1)


def _finite(values: Tensor) -> Tensor:
    """The values, unless one is infinite. (A nan is a diverged model's, and stays to be seen.)"""
    infinite = values.isinf()
    if infinite.any():
        raise DataError(
            f"the divergence is infinite at {int(infinite.sum())} of {values.numel()} positions: one side excludes "
            "(-inf) a token that the other allows. Mask both sides alike, or use jsd, which is always finite"
        )
    return values
