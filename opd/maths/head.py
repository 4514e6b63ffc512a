"""Computes losses of `[N, V]` logits that never exist: a head is applied to hidden states a tile of tokens at a time.

A tile loss gets a tile of logits and puts its gradient in their place; this file does the rest: the
projections, the gradients of hidden states and head, and the two ways of joining autograd. The losses of a
tile are in `opd.maths.divergence_tiles` and `opd.maths.logprobs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from opd.errors import ConfigError, DataError

TILE_BYTES = {"cpu": 128 * 2**20, "accelerator": 512 * 2**20}
"""Size of one tile of logits, of which there are two. The whole head and its gradient pass through memory for each
tile, so tiles must not be small. On an H100 twice as much is 4% faster, half as much a fifth slower."""

BLOCK_BYTES = {"cpu": 2**20, "accelerator": 128 * 2**20}
"""The bytes of a tile that are worked on at once, with half a dozen temporaries of that size: on a CPU they stay in the
cache, elsewhere they only have to be few enough launches and little enough memory. A kernel (`opd.maths.kernels`) needs
neither."""

CAST_ROWS = 16384
"""Rows of a 16-bit head that are widened at a time where the hardware has no mixed product (CPU)."""

HALF_WEIGHT = 6
"""With a head in float16 the largest weight of a token is brought to just under 2 to this power while gradients are
computed: far enough above the least float16 (6e-8) that entries of a gradient are not lost, and below the largest
(65,504) by more than a slope is long."""


@dataclass(frozen=True, eq=False, slots=True)
class Head:
    """Turns hidden states into logits: `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`.

    Without `softcap` (Gemma's final logit soft-capping) there is no tanh; `scale` is a constant factor on
    the logits (Cohere's `logit_scale`, Granite's inverse `logits_scaling`).
    """

    weight: Tensor
    """[V, H]; may be the tied embedding, and may be frozen."""
    bias: Tensor | None = None
    """[V]"""
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise DataError(
                f"a head's weight is [vocabulary, hidden], got shape {list(self.weight.shape)} (gather a sharded one)"
            )
        if self.softcap is not None and self.softcap <= 0:
            raise ConfigError(f"softcap = {self.softcap}: must be positive, or None for no soft-capping")

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]


class TileLoss(Protocol):
    """Computes per-token values of a tile of logits."""

    def __call__(self, logits: Tensor, rows: slice, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Turn [n, V] logits of the tokens `rows` into [n] values and the gradient [n, V], in the memory of `logits`.

        The gradient is that of the sum of `weights` [n] times the values, in the type of `logits` or in
        `Projection.narrow`; without `weights` what stands there means nothing.
        """
        ...


class Gradients(NamedTuple):
    """Holds gradients in the order of the inputs; None where an input does not require one."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def scaled(self, factor: Tensor, dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
        """Multiply each by `factor`, *in place*, then cast it to the type of its input."""
        return Gradients(*(None if g is None else g.mul_(factor) for g in self)).cast(dtypes)

    def cast(self, dtypes: list[torch.dtype | None]) -> list[Tensor | None]:
        return [None if g is None else g.to(dtype) for g, dtype in zip(self, dtypes, strict=True)]


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any of them is, else float32: 16-bit log-softmaxes are too coarse for a divergence."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_temperature(temperature: float) -> None:
    """Raises ConfigError unless logits can be divided by it."""
    if not temperature > 0:
        raise ConfigError(f"temperature = {temperature}: must be positive")


def row_block(logits: Tensor) -> int:
    """Return the number of a tile's rows to work on at once."""
    rows = BLOCK_BYTES[_kind(logits.device)] // (logits.shape[-1] * logits.element_size())
    # A softmax is shared out by rows: at least one for each thread.
    return max(rows, torch.get_num_threads() if logits.device.type == "cpu" else 1)


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "accelerator"


def tiles(tokens: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` tokens that cover `0..tokens`."""
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Projection:
    """Holds a head and says how it is to be applied."""

    head: Head
    temperature: float
    dtype: torch.dtype
    """The type of the products, the logits and the gradients while they are summed."""
    size: int
    """Tokens in a tile."""

    @property
    def operand(self) -> torch.dtype:
        """The type of what is multiplied: 16 bits where the hardware takes them for a float32 product."""
        weight = self.head.weight
        mixed = weight.is_cuda and self.dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16)
        return weight.dtype if mixed else self.dtype

    @property
    def narrow(self) -> torch.dtype:
        """The type in which a tile's gradient may be handed over: the operand's, if it only enters products."""
        return self.operand if self.head.bias is None and self.head.softcap is None else self.dtype

    @staticmethod
    def of(
        hidden: Tensor, head: Head | Tensor, temperature: float, chunk_size: int | None, *, beside: Tensor | None = None
    ) -> Projection:
        """Plan how to apply `head` to `hidden`, in a type that also holds what `beside` does.

        `chunk_size` tokens in a tile or, by default, as many as `TILE_BYTES` hold.
        """
        head = head if isinstance(head, Head) else Head(head)
        if hidden.ndim != 2 or hidden.shape[1] != head.weight.shape[1]:
            raise DataError(f"hidden states {list(hidden.shape)} for a head's weight {list(head.weight.shape)}")
        check_temperature(temperature)
        dtype = compute_dtype(hidden, hidden if beside is None else beside)
        if chunk_size is None:
            chunk_size = TILE_BYTES[_kind(hidden.device)] // (head.vocabulary * dtype.itemsize)
        elif chunk_size < 1:
            raise ConfigError(f"chunk_size = {chunk_size}: must be at least 1, or None for a size that was measured")
        return Projection(head=head, temperature=temperature, dtype=dtype, size=max(1, min(chunk_size, len(hidden))))


def projections(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    temperature: float,
    chunk_size: int | None,
) -> tuple[Projection, Projection]:
    """Plan both sides, in the same type and tiles. Raises DataError where they do not belong together."""
    student = Projection.of(student_hidden, student_head, temperature, chunk_size, beside=teacher_hidden)
    teacher = Projection.of(teacher_hidden, teacher_head, temperature, student.size, beside=student_hidden)
    if len(student_hidden) != len(teacher_hidden):
        raise DataError(f"{len(student_hidden)} student tokens, but {len(teacher_hidden)} of the teacher")
    if student.head.vocabulary != teacher.head.vocabulary:
        raise DataError(f"vocabularies differ: student {student.head.vocabulary}, teacher {teacher.head.vocabulary}")
    return student, teacher


class Projector:
    """Applies a head: computes logits of a tile, and the way back, in one buffer that is used again."""

    def __init__(self, projection: Projection) -> None:
        head = self.head = projection.head
        self.factor = head.scale / projection.temperature
        self.cap = None if head.softcap is None else head.softcap / projection.temperature
        shape = (projection.size, head.vocabulary)
        self.buffer = torch.empty(shape, dtype=projection.dtype, device=head.weight.device)
        self.slope: Tensor | None = None
        self.operand = projection.operand

    def logits(self, hidden: Tensor) -> Tensor:
        """Project [n, H] to [n, V], over the temperature. The result is valid until the next call."""
        logits, hidden = self.buffer[: len(hidden)], hidden.to(self.operand)
        for rows, block in self._blocks():
            _add_product(logits[:, rows], hidden, block.t(), self.factor, keep=False)
        if self.head.bias is not None:
            logits.add_(self.head.bias, alpha=self.factor)
        if self.cap is not None:
            logits.div_(self.cap).tanh_()
            self.slope = 1 - logits.square()
            logits *= self.cap
        return logits

    def pull_back(self, gradient: Tensor, hidden: Tensor, rows: slice, into: Gradients) -> None:
        """Add what `gradient` [n, V] on the last logits means for hidden states `rows`, weight and bias.

        The first tile's is not added to the weight's: it is the first to stand there.
        """
        if self.slope is not None:
            gradient *= self.slope
        if into.bias is not None:
            into.bias.add_(gradient.sum(0), alpha=self.factor)
        # Once for both products: the gradient is as large as the tile.
        gradient, hidden = gradient.to(self.operand), hidden.to(self.operand)
        for block_rows, block in self._blocks():
            part = gradient[:, block_rows]
            if into.hidden is not None:
                _add_product(into.hidden[rows], part, block, self.factor)
            if into.weight is not None:
                _add_product(into.weight[block_rows], part.t(), hidden, self.factor, keep=rows.start > 0)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the weight in the type of the products: whole, or widened a block of rows at a time."""
        weight = self.head.weight
        if weight.dtype == self.operand:
            yield slice(0, len(weight)), weight
        else:
            for rows in tiles(len(weight), CAST_ROWS):
                yield rows, weight[rows].to(self.operand)


def _add_product(out: Tensor, a: Tensor, b: Tensor, factor: float, *, keep: bool = True) -> None:
    """Compute out += factor * a @ b, summed and stored in the type of `out`. Without `keep` it is not read before."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=int(keep), alpha=factor)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(keep), alpha=factor, out=out)


def sweep(
    hidden: Tensor,
    projection: Projection,
    start: Callable[[], TileLoss],
    weights: Tensor | None = None,
    needs: Sequence[bool] = (False, False, False),
) -> tuple[Tensor, Gradients]:
    """Compute the values [N] of all tokens.

    With `weights` [N], also the gradients of their weighted sum that are needed.
    """
    dtype, head = projection.dtype, projection.head
    # The weight's, by far the largest, is first written by the first tile, if there is one.
    makers = (torch.zeros_like, torch.empty_like if len(hidden) else torch.zeros_like, torch.zeros_like)
    inputs = zip(makers, (hidden, head.weight, head.bias), needs, strict=True)
    gradients = Gradients(*(make(t, dtype=dtype) if n and t is not None else None for make, t, n in inputs))
    values = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
    scale = None
    if weights is not None and len(weights) and head.weight.dtype == torch.float16:
        # A power of two, known to the device alone: reading it would make the host wait.
        scale = torch.exp2(HALF_WEIGHT - torch.frexp(weights.abs().max()).exponent.clamp(min=-100))
        weights = weights * scale
    projector, loss = Projector(projection), start()
    for rows in tiles(len(hidden), projection.size):
        logits = projector.logits(hidden[rows])
        values[rows], gradient = loss(logits, rows, None if weights is None else weights[rows])
        if weights is not None:
            projector.pull_back(gradient, hidden[rows], rows, gradients)
    if scale is not None:
        gradients = Gradients(*(None if g is None else g.div_(scale) for g in gradients))
    return values, gradients


def logit_blocks(
    student_hidden: Tensor, student: Projection, teacher_hidden: Tensor, teacher: Projection
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield the logits of both sides, a few rows at a time: (tokens, [n, V], [n, V]).

    For what needs no gradient. A block is valid until the next one.
    """
    projectors = Projector(student), Projector(teacher)
    for rows in tiles(len(student_hidden), student.size):
        tile, teacher_tile = projectors[0].logits(student_hidden[rows]), projectors[1].logits(teacher_hidden[rows])
        for part in tiles(len(tile), row_block(tile)):
            yield slice(rows.start + part.start, rows.start + part.stop), tile[part], teacher_tile[part]


def per_token(hidden: Tensor, projection: Projection, start: Callable[[], TileLoss]) -> Tensor:
    """Compute values [N], whose backward pass projects every tile again. `start` begins a sweep over the tiles."""
    head = projection.head
    values: Tensor = _PerToken.apply(hidden, head.weight, head.bias, projection, start)
    return values


def weighted_sum(
    hidden: Tensor, projection: Projection, start: Callable[[], TileLoss], weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sum of `weights` [N] times values, and the values [N], which have no gradient.

    The gradients of the sum are taken at once, on the way forward.
    """
    if weights.shape != hidden.shape[:1]:
        raise DataError(f"weights {list(weights.shape)} for {len(hidden)} tokens")
    if weights.requires_grad:
        raise DataError("weights get no gradient: detach them, or weigh the per-token values")
    head, weights = projection.head, weights.to(projection.dtype)
    total, values = _WeightedSum.apply(
        hidden, head.weight, head.bias, projection, start, weights, torch.is_grad_enabled()
    )
    return total, values


class _WeightedSum(torch.autograd.Function):
    """Returns (sum of weights times values, values). The gradients are taken on the way forward, tile by tile."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        hidden, weight, bias, projection, start, weights, grad_enabled = args
        needs = ctx.needs_input_grad[:3] if grad_enabled else (False, False, False)
        values, ctx.gradients = sweep(hidden, projection, start, weights if any(needs) else None, needs)
        ctx.dtypes = [hidden.dtype, weight.dtype, None if bias is None else bias.dtype]
        ctx.mark_non_differentiable(values)
        return (values * weights).sum(), values

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            # They are scaled in place: a copy of the head's would be the largest tensor of the step.
            raise RuntimeError("a weighted sum is back-propagated once; compute it again, or use per-token values")
        return *gradients.scaled(grads[0], ctx.dtypes), None, None, None, None


class _PerToken(torch.autograd.Function):
    """Returns values [N]. The backward pass, which alone knows their weights, projects again."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        hidden, weight, bias, projection, start = args
        ctx.save_for_backward(hidden, weight, bias)
        ctx.projection, ctx.start = projection, start
        return sweep(hidden, projection, start)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inputs = ctx.saved_tensors
        _, gradients = sweep(inputs[0], ctx.projection, ctx.start, grads[0], ctx.needs_input_grad[:3])
        return *gradients.cast([None if t is None else t.dtype for t in inputs]), None, None
