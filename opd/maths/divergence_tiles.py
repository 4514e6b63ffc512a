"""Does the work on a tile of logits: its rows' divergences, their gradients by the student's logits, values to log.

`opd.maths.head` makes the tiles and calls this file's classes on them; `opd.maths.divergence` says which. On a GPU a
kernel may do the work (`opd.maths.kernels`); whether it does is decided here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd.losses import Divergence
from opd.maths.head import Projection, Projector, row_block, tiles
from opd.maths.logprobs import entropy_of
from opd.maths.top_k import choose_top, restrict, with_tail

KERNEL = True
"""On a GPU, do a tile's work in one kernel (`opd.maths.kernels`); False does it operation by operation, as on a CPU."""


class Logged(NamedTuple):
    """Holds what a sweep notes of each token beside its value: [N] each."""

    clipped: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    kept: Tensor


def divergence_of(student: Tensor, teacher: Tensor, divergence: Divergence) -> Tensor:
    """Compute the divergence of log-probs [..., V], [..., V], those of a top k included -> [...] nats.

    The student's get a gradient.
    """
    values: Tensor = _FromLogProbs.apply(student, teacher, divergence)
    return values


class _FromLogProbs(torch.autograd.Function):
    """Computes values from log-probs and keeps their slopes by the student's for the way back."""

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


def _total(divergence: Divergence, summands: Tensor) -> Tensor:
    """Sum [..., V] -> [...]; rounding may leave a sum of -1e-17, which is no divergence."""
    total = summands.sum(-1)
    return total if divergence.clip is not None else total.clamp_(min=0)


class DivergenceTile:
    """Computes the divergence of a tile, for which it projects the teacher's hidden states beside the student's."""

    def __init__(
        self, divergence: Divergence, teacher: Projection, hidden: Tensor, logged: Logged, narrow: torch.dtype
    ) -> None:
        self.divergence, self.hidden, self.logged, self.narrow = divergence, hidden, logged, narrow
        self.projector = Projector(teacher)

    def __call__(self, logits: Tensor, rows: slice, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        teacher_logits = self.projector.logits(self.hidden[rows])
        values = logits.new_empty(len(logits))
        logged = Logged(*(column[rows] for column in self.logged))
        if (kernel := _kernel_for(self.divergence, logits)) is not None:
            arguments = (logits, teacher_logits, weights, self.narrow, values, *logged[:3])
            return values, kernel(self.divergence, *arguments)
        work = self._full if self.divergence.top_k is None else self._top_k
        for part in tiles(len(logits), row_block(logits)):
            noted = Logged(*(column[part] for column in logged))
            weight = None if weights is None else weights[part, None]
            values[part] = work(logits[part], teacher_logits[part], weight, noted)
        return values, logits

    def _full(self, logits: Tensor, teacher_logits: Tensor, weight: Tensor | None, noted: Logged) -> Tensor:
        """Compute some rows: [n, V], [n, V] -> [n]; `logits` becomes the gradient."""
        found = _full_rows(self.divergence, logits, teacher_logits, weight)
        noted.student_entropy.copy_(found.student_entropy)
        noted.teacher_entropy.copy_(found.teacher_entropy)
        if found.clipped is not None:
            noted.clipped.copy_(found.clipped)
        if found.gradient is not None:
            logits.copy_(found.gradient)
        return found.values

    def _top_k(self, logits: Tensor, teacher_logits: Tensor, weight: Tensor | None, noted: Logged) -> Tensor:
        """Do as `_full` does; the way back, through a sort and a tail, is left to autograd."""
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_(weight is not None)
            student, teacher = leaf.log_softmax(-1), teacher_logits.log_softmax(-1)
            ids = choose_top(self.divergence, student, teacher)
            told = restrict(self.divergence, student, teacher, ids)
            values = divergence_of(*told, self.divergence)
        student = student.detach()
        p, q = student.exp(), teacher.exp()
        noted.kept.copy_(torch.minimum(p.gather(-1, ids).sum(-1), q.gather(-1, ids).sum(-1)))
        noted.student_entropy.copy_(entropy_of(student, p))
        noted.teacher_entropy.copy_(entropy_of(teacher, q))
        if weight is not None:
            (gradient,) = torch.autograd.grad(values, leaf, weight.squeeze(-1))
            logits.copy_(gradient)
        return values.detach()


class StoredTile:
    """Computes the divergence of a tile from the teacher's likeliest ids, and their log-probs and tail."""

    def __init__(self, divergence: Divergence, ids: Tensor, teacher: Tensor, logged: Logged) -> None:
        self.divergence, self.ids, self.teacher, self.logged = divergence, ids, teacher, logged

    def __call__(self, logits: Tensor, rows: slice, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        values = logits.new_empty(len(logits))
        for part in tiles(len(logits), row_block(logits)):
            ids, teacher = self.ids[rows][part], self.teacher[rows][part]
            with torch.enable_grad():
                leaf = logits[part].detach().requires_grad_(weights is not None)
                student = leaf.log_softmax(-1)
                told = with_tail(student, ids) if self.divergence.tail else student.gather(-1, ids).log_softmax(-1)
                found = divergence_of(told, teacher, self.divergence)
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
    """Holds what some rows give: [n] each, but for the gradient by the student's logits, [n, V]."""

    values: Tensor
    gradient: Tensor | None
    clipped: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor


def _full_rows(divergence: Divergence, logits: Tensor, teacher_logits: Tensor, weight: Tensor | None) -> _Rows:
    """Compute rows over the full vocabulary: logits [n, V], [n, V] and, where a gradient is wanted, weights [n, 1]."""
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
    """Return the kernel if it can do such logits and knows the divergence; None: operation by operation."""
    if divergence.top_k is not None or (kernel := _kernel(logits)) is None:
        return None
    from opd.maths.kernels import KINDS

    return kernel if divergence.formula.name in KINDS else None


def _kernel(logits: Tensor) -> Callable[..., Tensor] | None:
    """Return `opd.maths.kernels.divergence_rows`, which does what `_full_rows` does, if it can for such logits."""
    return _compiled_for(logits.device) if KERNEL and logits.is_cuda and logits.dtype == torch.float32 else None


@cache
def _compiled_for(device: torch.device) -> Callable[..., Tensor] | None:
    """Return the kernel; None where Triton is missing or does not work, with a warning, and on cards too old for it.

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
