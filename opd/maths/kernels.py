"""Computes the full divergence of a tile of logits on a GPU in one launch (Triton): a program for each row.

The formulas are those of `opd.maths.formulas`, which `opd.maths.divergence_tiles` runs on all other devices; it calls
this file where it can. It is imported where a GPU is at work and nowhere else.

A row of 150,000 entries is too long to be kept, so a program reads it two or three times: for the normalisers; where
the gradient needs it, for the sum of the slopes; for everything else. A GPU does this as fast as its memory delivers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opd.losses import Divergence, check_known

KINDS = ("forward_kl", "reverse_kl", "jsd", "mixed_kl")
"""The divergences that the kernel below has a branch for. `opd.maths.divergence_tiles` does any other by itself."""
BLOCK = 2048
"""Entries of a row that are worked on at once."""
WARPS = 8


def divergence_rows(
    divergence: Divergence,
    logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor | None,
    narrow: torch.dtype,
    values: Tensor,
    clipped: Tensor,
    student_entropy: Tensor,
    teacher_entropy: Tensor,
) -> Tensor:
    """Launch the kernel on logits [n, V], [n, V] float32, both contiguous; return the gradient [n, V].

    Fills the last four, [n] float32 each.

    With `weights` [n] the gradient, in the type `narrow`, takes the place of `logits`: it is a view of that memory,
    and a row of it begins where the row of `logits` did. Without, what is returned means nothing.

    The logits are divided by the temperature already, and what the divergence says of its top k is not looked at.

    Raises ConfigError for a divergence that is not among `KINDS`.
    Long because the kernel takes each tensor and number by itself.
    """
    kind, clip = divergence.formula.name, divergence.clip
    check_known("divergence.kind of the GPU kernel", kind, KINDS)
    tokens, vocabulary = logits.shape
    gradient = logits if narrow == logits.dtype else logits.view(narrow)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _divergence_rows[(tokens,)](
            logits,
            teacher_logits,
            # Autograd may hand over one weight for all.
            values if weights is None else weights.contiguous(),
            gradient,
            values,
            clipped,
            student_entropy,
            teacher_entropy,
            0.0 if divergence.beta is None else divergence.beta,
            0.0 if clip is None else clip,
            gradient.stride(0),
            VOCABULARY=vocabulary,
            KIND=kind,
            CLIP=clip is not None,
            GRADIENT=weights is not None,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return gradient[:, :vocabulary]


# The columns begin at any token, and no tile should compile anew for where its own begin.
@triton.jit(do_not_specialize_on_alignment=["weights", "values", "clipped", "student_entropy", "teacher_entropy"])
def _divergence_rows(
    logits,
    teacher_logits,
    weights,
    gradient,
    values,
    clipped,
    student_entropy,
    teacher_entropy,
    beta,
    clip,
    gradient_stride,
    VOCABULARY: tl.constexpr,
    KIND: tl.constexpr,
    CLIP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Do one row: value, share that is clipped, both entropies and, where it is wanted, the gradient.

    Long because a launch runs one function, and the sweeps share what they found in registers.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * VOCABULARY
    teacher_logits += row * VOCABULARY
    gradient += row * gradient_stride
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], tl.float32)
    # The sum of the slopes of reverse and mixed KL follows from the reverse KL, and that from the first sweep.
    FROM_KL: tl.constexpr = GRADIENT and not CLIP and (KIND == "reverse_kl" or KIND == "mixed_kl")

    # Each lane has its own maximum, so that no thread waits for another. Of the old maximum and the new entry one is
    # the new maximum: one exponential tells how much the other counts beside it. (No infinite start: inf - inf.)
    student_max = zeros - 3e38
    teacher_max = zeros - 3e38
    student_sum = zeros
    teacher_sum = zeros
    distance = zeros
    for start in range(0, VOCABULARY, BLOCK):
        at = start + lanes
        x = tl.load(logits + at, mask=at < VOCABULARY, other=-float("inf"))
        y = tl.load(teacher_logits + at, mask=at < VOCABULARY, other=-float("inf"))
        e = tl.exp(-tl.abs(x - student_max))
        if FROM_KL:
            # What one side excludes is infinite or nothing; the last sweep tells.
            d = tl.where((x == -float("inf")) | (y == -float("inf")), 0.0, x - y)
            distance = tl.where(x > student_max, distance * e + d, distance + d * e)
        student_sum = tl.where(x > student_max, student_sum * e + 1, student_sum + e)
        student_max = tl.where(x > student_max, x, student_max)
        e = tl.exp(-tl.abs(y - teacher_max))
        teacher_sum = tl.where(y > teacher_max, teacher_sum * e + 1, teacher_sum + e)
        teacher_max = tl.where(y > teacher_max, y, teacher_max)
    m = tl.max(student_max, 0)
    factor = tl.exp(student_max - m)
    total = tl.sum(student_sum * factor, 0)
    log_sum = tl.log(total)
    teacher_m = tl.max(teacher_max, 0)
    teacher_log_sum = tl.log(tl.sum(teacher_sum * tl.exp(teacher_max - teacher_m), 0))

    weight = 0.0
    slopes = -1.0  # of the forward KL: minus the teacher's probabilities
    if GRADIENT:
        weight = tl.load(weights + row)
        if FROM_KL:
            reverse = tl.sum(distance * factor, 0) / total - (m - teacher_m) - (log_sum - teacher_log_sum)
            slopes = reverse + 1 if KIND == "reverse_kl" else beta * (reverse + 1) - (1 - beta)
        elif CLIP or KIND != "forward_kl":
            sums = zeros
            for start in range(0, VOCABULARY, BLOCK):
                at = start + lanes
                x = tl.load(logits + at, mask=at < VOCABULARY, other=-float("inf"))
                y = tl.load(teacher_logits + at, mask=at < VOCABULARY, other=-float("inf"))
                s, t = x - m - log_sum, y - teacher_m - teacher_log_sum
                summand, slope = _summands(s, t, tl.exp(s), tl.exp(t), beta, KIND)
                sums += tl.where(summand > clip, 0.0, slope) if CLIP else slope
            slopes = tl.sum(sums, 0)

    value = zeros
    cuts = zeros
    student_negative = zeros
    teacher_negative = zeros
    for start in range(0, VOCABULARY, BLOCK):
        at = start + lanes
        x = tl.load(logits + at, mask=at < VOCABULARY, other=-float("inf"))
        y = tl.load(teacher_logits + at, mask=at < VOCABULARY, other=-float("inf"))
        s, t = x - m - log_sum, y - teacher_m - teacher_log_sum
        p, q = tl.exp(s), tl.exp(t)
        student_negative += tl.where(p == 0, 0.0, p * s)
        teacher_negative += tl.where(q == 0, 0.0, q * t)
        summand, slope = _summands(s, t, p, q, beta, KIND)
        if CLIP:
            cut = summand > clip
            cuts += tl.where(cut, 1.0, 0.0)
            summand = tl.where(cut, clip, summand)
            slope = tl.where(cut, 0.0, slope)
        value += tl.where(at < VOCABULARY, summand, 0.0)
        if GRADIENT:
            # A narrower gradient lies over entries that all threads must have read by now, not this one alone.
            tl.debug_barrier()
            out = (slope - p * slopes) * weight
            tl.store(gradient + at, out.to(gradient.dtype.element_ty), mask=at < VOCABULARY)
    found = tl.sum(value, 0)
    if not CLIP:
        found = tl.where(found < 0, 0.0, found)  # only rounding makes it so
    else:
        tl.store(clipped + row, tl.sum(cuts, 0) / VOCABULARY)
    tl.store(values + row, found)
    tl.store(student_entropy + row, -tl.sum(student_negative, 0))
    tl.store(teacher_entropy + row, -tl.sum(teacher_negative, 0))


@triton.jit
def _summands(s, t, p, q, beta, KIND: tl.constexpr):
    """Do as `Formula.summands` does with log-probs of student and teacher, and their exponentials; a branch a kind."""
    if KIND == "forward_kl":
        value = _times(q, t - s)
        slope = -q
    elif KIND == "reverse_kl":
        value = _times(p, s - t)
        slope = value + p
    elif KIND == "mixed_kl":
        reverse = beta * _times(p, s - t)
        value = reverse + (1 - beta) * _times(q, t - s)
        slope = reverse + beta * p - (1 - beta) * q
    else:
        tl.static_assert(KIND == "jsd", "the kernel has no formula for this divergence")
        mix = (1 - beta) * p + beta * q
        # The mix of two probabilities, the smallest that there are, may be rounded to 0.
        log_mix = tl.where(mix == 0, 0.0, tl.log(mix))
        slope = tl.where(mix == 0, 0.0, (1 - beta) * _times(p, s - log_mix))
        value = tl.where(mix == 0, 0.0, slope + beta * _times(q, t - log_mix))
    return value, slope


@triton.jit
def _times(p, log_ratio):
    """Multiply; give 0 where `p` is 0, whatever the logarithms are."""
    return tl.where(p == 0, 0.0, p * log_ratio)
