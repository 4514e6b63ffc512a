"""How far a student's next-token distribution is from a teacher's: exact values and exact gradients, in nats.

`token_divergence` reads logits; the chunked functions read hidden states and never hold `[N, V]` logits.
The gradient reaches the student alone. Who the teacher is, which tokens count and what the sum is divided
by is decided elsewhere (`opd.objective.objective`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd.errors import ConfigError, DataError
from opd.losses import DIVERGENCES, SUPPORTS, Support, check_known, unknown
from opd.losses import Divergence as Kind
from opd.maths.head import (
    Head,
    Projection,
    Projector,
    check_temperature,
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


def token_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: Kind,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    support: Support = "teacher",
    tail: bool = True,
) -> Tensor:
    """Divergence of each position: [..., V], [..., V] -> [...] nats, float32 or wider, never negative.

    `jsd` is `beta * KL(teacher || mix) + (1 - beta) * KL(student || mix)` with the mixture `mix = beta *
    teacher + (1 - beta) * student`; at `beta` 0 and 1, where that is 0, it is by convention the forward
    and the reverse KL themselves (as in OPSD, SDPO and TRL). The gradient reaches the student only.

    An entry that is -inf on both sides adds nothing, to the value or to the gradient.

    Args:
        temperature: divides the logits of both sides.
        top_k: only the `top_k` likeliest entries of `support` are told apart. With `tail` all others
            together are one more entry (SDPO, arXiv 2601.20802, equation 11), which bounds the full value from
            below; without it both sides are renormalised, and what happens elsewhere is not seen.

    Raises:
        ConfigError: an unknown kind, or an option outside its range.
        DataError: shapes that differ, or a divergence that is infinite.
    """
    rule = _Rule.of(kind, beta, None, top_k, support, tail)
    check_temperature(temperature)
    if student_logits.shape != teacher_logits.shape:
        raise DataError(f"student logits {list(student_logits.shape)}, teacher logits {list(teacher_logits.shape)}")
    dtype = compute_dtype(student_logits, teacher_logits)
    student = (student_logits.to(dtype) / temperature).log_softmax(-1)
    teacher = (teacher_logits.detach().to(dtype) / temperature).log_softmax(-1)
    return _finite(rule(student, teacher))


def chunked_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    kind: Kind,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    weights: Tensor | None = None,
    clip: float | None = None,
    top_k: int | None = None,
    support: Support = "teacher",
    tail: bool = True,
) -> Tensor:
    """`token_divergence` of hidden states `[N, H]` and `[N, H']`, without their logits.

    Without `weights`: per-token values `[N]`; the backward pass projects again. With `weights` `[N]`, which
    get no gradient: the scalar `sum(weights * values)`; its gradients are taken while a tile of logits is
    at hand, for as many products as the dense form, and it can be back-propagated once.
    `weighted_divergence` is the same with values to log.

    A head is a weight `[V, H]` or a `Head`. Gradients reach the student's hidden states, weight and bias
    where they require them, never the teacher. Computed in float32, or in float64 if hidden states are. A head
    that ZeRO-3 has sharded must be gathered around the call, inside the engine's forward pass.

    Args:
        chunk_size: tokens in a tile; by default as many as `opd.maths.head.TILE_BYTES` hold.
        clip: bound from above on each vocabulary entry's summand, before the sum over the vocabulary (OPSD,
            arXiv 2601.18734). The value may then be negative, and a clipped entry loses its pull. Not with `top_k`.
        top_k, support, tail: as for `token_divergence`; the projections, which cost most, are the same.

    Raises:
        ConfigError: an unknown kind, or an option outside its range.
        DataError: shapes or vocabularies that do not match, or a divergence that is infinite.
    """
    if weights is not None:
        return weighted_divergence(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            kind,
            weights=weights,
            beta=beta,
            temperature=temperature,
            chunk_size=chunk_size,
            clip=clip,
            top_k=top_k,
            support=support,
            tail=tail,
        ).total
    rule = _Rule.of(kind, beta, clip, top_k, support, tail)
    sides = (student_hidden, student_head, teacher_hidden, teacher_head)
    student, start, _ = _prepare(*sides, rule, temperature, chunk_size)
    return _finite(per_token(student_hidden, student, start))


def weighted_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    kind: Kind,
    *,
    weights: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    clip: float | None = None,
    top_k: int | None = None,
    support: Support = "teacher",
    tail: bool = True,
) -> WeightedDivergence:
    """`chunked_divergence` with `weights`: the weighted sum, and what there is to log beside it."""
    rule = _Rule.of(kind, beta, clip, top_k, support, tail)
    sides = (student_hidden, student_head, teacher_hidden, teacher_head)
    student, start, logged = _prepare(*sides, rule, temperature, chunk_size)
    total, values = weighted_sum(student_hidden, student, start, weights)
    return WeightedDivergence(total, _finite(values), *logged)


def stored_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    kind: Kind,
    *,
    weights: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    tail: bool = True,
    chunk_size: int | None = None,
) -> WeightedDivergence:
    """`weighted_divergence` from a teacher of whom only the likeliest entries are known: ids and log-probs [N, k].

    The log-probs are the teacher's at `temperature`. With `tail` all other entries together are one more; its mass
    under the teacher is what the k leave of 1, at least `LEAST_TAIL`. Of the entropies only the student's is known.

    Raises:
        ConfigError: an unknown kind, or an option outside its range.
        DataError: shapes that do not match.
    """
    if top_ids.shape != top_logprobs.shape or top_ids.ndim != 2 or len(top_ids) != len(student_hidden):
        shapes = [list(t.shape) for t in (student_hidden, top_ids, top_logprobs)]
        raise DataError(f"hidden states, ids and log-probs of the top k do not match: {shapes}")
    student = Projection.of(student_hidden, student_head, temperature, chunk_size)
    tail = tail and top_ids.shape[1] < student.head.vocabulary  # the whole vocabulary leaves no tail
    rule = _Rule.of(kind, beta, None, top_ids.shape[1], "teacher", tail)
    teacher = top_logprobs.detach().to(student.dtype)
    mass = teacher.exp().sum(-1, keepdim=True)
    teacher = torch.cat([teacher, (1 - mass).clamp(min=LEAST_TAIL).log()], -1) if tail else teacher.log_softmax(-1)
    columns = torch.zeros(4, len(student_hidden), dtype=student.dtype, device=student_hidden.device)
    logged = _Logged(*columns)
    logged.teacher_entropy.fill_(torch.nan)
    logged.kept.copy_(mass.squeeze(-1).clamp(max=1))
    total, values = weighted_sum(student_hidden, student, partial(_StoredTile, rule, top_ids, teacher, logged), weights)
    return WeightedDivergence(total, _finite(values), *logged)


@dataclass(frozen=True, slots=True)
class _Rule:
    """A divergence, entry by entry of the vocabulary or of what is told apart of it."""

    kind: Kind
    beta: float
    clip: float | None
    top_k: int | None
    support: Support
    tail: bool

    @staticmethod
    def of(kind: Kind, beta: float, clip: float | None, top_k: int | None, support: Support, tail: bool) -> _Rule:
        """Checked, with the ends of `jsd` and `mixed_kl` replaced by the two KLs that they stand for."""
        check_known("divergence kind", kind, DIVERGENCES)
        if not 0 <= beta <= 1:
            raise ConfigError(f"divergence beta = {beta}: must be between 0 and 1")
        if clip is not None and not clip > 0:
            raise ConfigError(f"divergence clip = {clip}: must be positive, or None for no clipping")
        if clip is not None and top_k is not None:
            raise ConfigError(f"clip = {clip} with top_k = {top_k}: the clip is for entries of the whole vocabulary")
        check_known("support", support, SUPPORTS)
        if kind in ("jsd", "mixed_kl") and beta in (0, 1):
            kind = "reverse_kl" if beta else "forward_kl"
        return _Rule(kind, beta, clip, top_k, support, tail)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Log-probs [..., V], [..., V] -> [...], with a gradient for the student's."""
        if self.top_k is not None:
            student, teacher = self.restrict(student, teacher, self.ids(student, teacher))
        values: Tensor = _FromLogProbs.apply(student, teacher, self)
        return values

    def ids(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The entries that are told apart: log-probs [..., V], [..., V] -> [..., top_k]."""
        vocabulary = student.shape[-1]
        if self.top_k is None or not 1 <= self.top_k <= vocabulary:
            raise ConfigError(f"top_k = {self.top_k}: must be between 1 and the vocabulary's {vocabulary}")
        if self.support == "teacher":
            chosen = teacher
        elif self.support == "student":
            chosen = student
        else:
            raise unknown("support", self.support, SUPPORTS)
        return chosen.detach().topk(self.top_k, dim=-1).indices

    def restrict(self, student: Tensor, teacher: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs [..., V] -> [..., k + 1] with a tail, [..., k] renormalised without."""
        if self.tail:
            return _with_tail(student, ids), _with_tail(teacher, ids)
        kept = [side.gather(-1, ids) for side in (student, teacher)]
        if any(side.isneginf().all(-1).any() for side in kept):
            raise DataError(f"one side has no mass on the top {self.top_k} of the {self.support}: use the tail")
        return kept[0].log_softmax(-1), kept[1].log_softmax(-1)

    def summands(self, student: Tensor, teacher: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """The entries' summands and the derivatives of their sum by the student's log-probs, before the clip.

        Log-probs of both sides and their exponentials `p` (student) and `q` (teacher), all [..., V]. Each kind has a
        branch of its own; raises ConfigError for one that has none.
        """
        if self.kind == "forward_kl":
            return _times_log_ratio(q, teacher, student), -q
        if self.kind == "reverse_kl":
            value = _times_log_ratio(p, student, teacher)
            return value, value + p
        if self.kind == "mixed_kl":
            value = _times_log_ratio(p, student, teacher).mul_(self.beta)
            slope = value.add(p, alpha=self.beta).sub_(q, alpha=1 - self.beta)
            return value.add_(_times_log_ratio(q, teacher, student).mul_(1 - self.beta)), slope
        if self.kind == "jsd":
            mix = torch.lerp(p, q, self.beta).log_()
            slope = _times_log_ratio(p, student, mix).mul_(1 - self.beta)
            return _times_log_ratio(q, teacher, mix).mul_(self.beta).add_(slope), slope
        raise unknown("divergence kind", self.kind, DIVERGENCES)

    def total(self, summands: Tensor) -> Tensor:
        """[..., V] -> [...]; rounding may leave a sum of -1e-17, which is no divergence."""
        total = summands.sum(-1)
        return total if self.clip is not None else total.clamp_(min=0)


def _times_log_ratio(p: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """p * (numerator - denominator), and 0 where p is 0, whatever the logarithms are."""
    return (numerator - denominator).mul_(p).masked_fill_(p == 0, 0)


class _FromLogProbs(torch.autograd.Function):
    """Values of a rule from log-probs; differentiates by the student's log-probs."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        student, teacher, rule = args
        summands, slope = rule.summands(student, teacher, student.exp(), teacher.exp())
        ctx.save_for_backward(slope)
        total: Tensor = rule.total(summands)
        return total

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

    def __init__(self, rule: _Rule, teacher: Projection, hidden: Tensor, logged: _Logged, narrow: torch.dtype) -> None:
        self.rule, self.hidden, self.logged, self.narrow = rule, hidden, logged, narrow
        self.projector = Projector(teacher)

    def __call__(self, logits: Tensor, rows: slice, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        teacher_logits = self.projector.logits(self.hidden[rows])
        values = logits.new_empty(len(logits))
        logged = _Logged(*(column[rows] for column in self.logged))
        if (kernel := _kernel_for(self.rule, logits)) is not None:
            rule = (self.rule.kind, self.rule.beta, self.rule.clip)
            return values, kernel(*rule, logits, teacher_logits, weights, self.narrow, values, *logged[:3])
        work = self._full if self.rule.top_k is None else self._top_k
        for part in tiles(len(logits), row_block(logits)):
            noted = _Logged(*(column[part] for column in logged))
            weight = None if weights is None else weights[part, None]
            values[part] = work(logits[part], teacher_logits[part], weight, noted)
        return values, logits

    def _full(self, logits: Tensor, teacher_logits: Tensor, weight: Tensor | None, noted: _Logged) -> Tensor:
        """Some rows: [n, V], [n, V] -> [n]; `logits` becomes the gradient."""
        found = _full_rows(self.rule, logits, teacher_logits, weight)
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
            ids = self.rule.ids(student, teacher)
            values: Tensor = _FromLogProbs.apply(*self.rule.restrict(student, teacher, ids), self.rule)
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

    def __init__(self, rule: _Rule, ids: Tensor, teacher: Tensor, logged: _Logged) -> None:
        self.rule, self.ids, self.teacher, self.logged = rule, ids, teacher, logged

    def __call__(self, logits: Tensor, rows: slice, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        values = logits.new_empty(len(logits))
        for part in tiles(len(logits), row_block(logits)):
            ids, teacher = self.ids[rows][part], self.teacher[rows][part]
            with torch.enable_grad():
                leaf = logits[part].detach().requires_grad_(weights is not None)
                student = leaf.log_softmax(-1)
                told = _with_tail(student, ids) if self.rule.tail else student.gather(-1, ids).log_softmax(-1)
                found: Tensor = _FromLogProbs.apply(told, teacher, self.rule)
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


def _full_rows(rule: _Rule, logits: Tensor, teacher_logits: Tensor, weight: Tensor | None) -> _Rows:
    """Some rows over the full vocabulary: [n, V], [n, V] and, where a gradient is wanted, [n, 1]."""
    student, teacher = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    p, q = student.exp(), teacher.exp()
    summands, slope = rule.summands(student, teacher, p, q)
    clipped = gradient = None
    if rule.clip is not None:
        cut = summands > rule.clip
        summands.clamp_(max=rule.clip)
        slope.masked_fill_(cut, 0)
        clipped = cut.sum(-1, dtype=p.dtype) / cut.shape[-1]
    entropies = entropy_of(student, p), entropy_of(teacher, q)
    values = rule.total(summands)
    if weight is not None:
        # The way back through the log-softmax: slope - p * sum(slope).
        gradient = slope.addcmul_(p, slope.sum(-1, keepdim=True), value=-1).mul_(weight)
    return _Rows(values, gradient, clipped, *entropies)


def _kernel_for(rule: _Rule, logits: Tensor) -> Callable[..., Tensor] | None:
    """The kernel, if it can and knows the divergence; what it does not know is done operation by operation."""
    if rule.top_k is not None or (kernel := _kernel(logits)) is None:
        return None
    from opd.maths.kernels import KINDS

    return kernel if rule.kind in KINDS else None


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
        divergence_rows(
            "forward_kl", 0.5, None, tiny, tiny.clone(), None, tiny.dtype, *torch.empty(4, 2, device=device)
        )
    except Exception as error:  # whatever a compiler says
        warnings.warn(f"divergences run operation by operation, three times as slow: {error!r}", stacklevel=2)
        return None
    return divergence_rows


def _prepare(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    rule: _Rule,
    temperature: float,
    chunk_size: int | None,
) -> tuple[Projection, partial[_DivergenceTile], _Logged]:
    """The student's projection, what begins a sweep, and where the sweep notes what it sees."""
    student, teacher = projections(student_hidden, student_head, teacher_hidden, teacher_head, temperature, chunk_size)
    columns = torch.zeros(4, len(student_hidden), dtype=student.dtype, device=student_hidden.device)
    logged = _Logged(*columns)
    logged.kept.fill_(1)
    start = partial(_DivergenceTile, rule, teacher, teacher_hidden.detach(), logged, student.narrow)
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
