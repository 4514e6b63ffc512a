"""Measures how noisy the sampled-token gradient is, state by state, in closed form: no sampling, no backward pass.

The gradient is the one by the student's logits, of one token sampled at each state. Everything below the logits is a
linear map of it, the same for all estimators, so their ratio is what is worth logging.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opd.errors import DataError
from opd.maths.advantage import Baseline, squared_scores, state_baseline
from opd.maths.head import Head, compute_dtype, logit_blocks, projections


class GradientVariance(NamedTuple):
    """Holds variances, summed over the vocabulary's axes, per state: [...] nats squared each."""

    plain: Tensor
    """Without a baseline."""
    baselined: Tensor
    """With the baseline that was asked for."""
    least: Tensor
    """With the best baseline that a state can have. (The exact full-vocabulary gradient has none at all.)"""

    @property
    def ratio(self) -> float:
        """The variance with the baseline over that without: below 1 is what a baseline is for."""
        return (self.baselined.sum() / self.plain.sum()).item()

    @property
    def reached(self) -> float:
        """The share reached of the reduction that the best baseline could give."""
        return ((self.plain - self.baselined).sum() / (self.plain - self.least).sum()).item()

    @property
    def raised(self) -> float:
        """The share of the states where the baseline makes the variance larger, by more than rounding."""
        return (self.baselined > self.plain * (1 + 1e-5)).double().mean().item()


@torch.no_grad()
def gradient_variance(
    student_logits: Tensor,
    teacher_logits: Tensor,
    baseline: Baseline,
    *,
    top_k: int | None = None,
    renormalise: bool = False,
) -> GradientVariance:
    """Compute the variance of the sampled-token gradient: [..., V], [..., V] -> [...], at temperature 1.

    With p the student's probabilities, r the log-ratio of a token, b the baseline and s the squared score of
    a token, the variance is `sum(p s (r - b) squared)` less the squared length of the mean, which no b changes.

    Raises:
        ConfigError: an option that is unknown, out of range or without effect.
        DataError: shapes that differ, or a variance that is infinite.
    """
    if student_logits.shape != teacher_logits.shape:
        raise DataError(f"student logits {list(student_logits.shape)}, teacher logits {list(teacher_logits.shape)}")
    dtype = compute_dtype(student_logits, teacher_logits)
    student, teacher = student_logits.to(dtype).log_softmax(-1), teacher_logits.to(dtype).log_softmax(-1)
    p = student.exp()
    rewards = torch.where(p > 0, teacher - student, 0)
    value = state_baseline(student, teacher, "full")
    mean = p * (rewards - value.unsqueeze(-1))
    weights = p * squared_scores(p)

    def variance(of: Tensor) -> Tensor:
        return (weights * (rewards - of.unsqueeze(-1)).square()).sum(-1) - mean.square().sum(-1)

    chosen = state_baseline(student, teacher, baseline, top_k=top_k, renormalise=renormalise)
    return GradientVariance(
        plain=variance(torch.zeros_like(value)),
        baselined=variance(chosen),
        least=variance(state_baseline(student, teacher, "optimal")),
    )


def chunked_gradient_variance(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    baseline: Baseline,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    top_k: int | None = None,
    renormalise: bool = False,
) -> GradientVariance:
    """Compute `gradient_variance` of hidden states [N, H] and [N, H'], without their logits: [N] each."""
    student, teacher = projections(student_hidden, student_head, teacher_hidden, teacher_head, temperature, chunk_size)
    result = GradientVariance(*torch.empty(3, len(student_hidden), dtype=student.dtype, device=student_hidden.device))
    with torch.no_grad():
        for rows, ours, theirs in logit_blocks(student_hidden, student, teacher_hidden, teacher):
            part = gradient_variance(ours, theirs, baseline, top_k=top_k, renormalise=renormalise)
            for whole, values in zip(result, part, strict=True):
                whole[rows] = values
    return result
