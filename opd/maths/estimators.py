"""Estimates divergences from the sampled token alone, where no more than its log-prob is known.

With `gap = student log-prob - teacher log-prob` of a token that the student sampled, the usual names are
k1 = gap, k2 = gap squared / 2 and k3 = exp(-gap) - 1 + gap. As *values* all estimate KL(student ||
teacher): k1 and k3 without bias, k2 nearly. As *losses* they are three different things, because the
gradient of an estimate is not an estimate of the gradient (METHODS 0.3; the tests enumerate it):

    loss back-propagated       expected gradient
    k1                         0: the teacher drops out. Refused here
    k2                         of KL(student || teacher)
    k3                         of KL(teacher || student)
    ratio * k3                 of KL(student || teacher)

The policy-gradient form (an advantage times a log-prob) is `opd.maths.advantage.distillation_advantage`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from opd.errors import ConfigError, DataError
from opd.losses import check_known, unknown

Estimator = Literal["k1", "k2", "k3"]
EstimatorLoss = Literal["k1", "k2", "k3", "weighted_k3"]
"""With k1, so that asking for it is answered with the reason."""
ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3")
"""Those that have a formula."""


@torch.no_grad()
def estimate(student_logprobs: Tensor, teacher_logprobs: Tensor, kind: Estimator) -> Tensor:
    """Estimate KL(student || teacher) at each sampled token, to log: [...], [...] -> [...] nats, without gradient.

    Raises:
        ConfigError: an unknown kind.
        DataError: shapes that differ.
    """
    check_known("estimator", kind, ESTIMATORS)
    return _value(_gap(student_logprobs, teacher_logprobs), kind)


def estimator_loss(
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    kind: EstimatorLoss,
    *,
    sampler_logprobs: Tensor | None = None,
    max_ratio: float | None = None,
) -> Tensor:
    """Compute a loss for each sampled token whose expected gradient is known: [...], [...] -> [...] nats.

    `weighted_k3` (Skill-SD, arXiv 2604.10674) multiplies by `ratio = exp(student - sampler)`, *with* its
    gradient. The sampler is the policy that drew the tokens; None says that it is the student as it is now,
    and then the ratio is 1 in value but not in gradient.

    Args:
        max_ratio: bound on the ratio, of `weighted_k3` alone; a token beyond it is weighted by the bound, and
            only k3's own gradient is left.

    Raises:
        ConfigError: an unknown kind, k1, or an option without effect.
        DataError: shapes that differ.
    """
    if kind == "k1":
        raise ConfigError(
            "estimator = 'k1' cannot be a loss: its expected gradient is 0, whoever teaches. Use 'k2', or the "
            "policy component with opd.maths.advantage.distillation_advantage, for the gradient of the reverse KL"
        )
    if kind not in ("k2", "k3", "weighted_k3"):
        raise ConfigError(f"estimator = {kind!r} is unknown as a loss. Allowed: k2, k3, weighted_k3")
    if kind != "weighted_k3" and (sampler_logprobs is not None or max_ratio is not None):
        raise ConfigError(f"sampler_logprobs and max_ratio have no effect on {kind!r}; they belong to weighted_k3")
    gap = _gap(student_logprobs, teacher_logprobs)
    if kind != "weighted_k3":
        return _value(gap, kind)
    sampler = student_logprobs if sampler_logprobs is None else sampler_logprobs
    ratio = (student_logprobs - sampler.detach()).exp()
    if max_ratio is not None:
        ratio = ratio.clamp(max=max_ratio)
    return ratio * _value(gap, "k3")


def _gap(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    if student_logprobs.shape != teacher_logprobs.shape:
        raise DataError(f"{list(student_logprobs.shape)} student log-probs, {list(teacher_logprobs.shape)} teacher's")
    return student_logprobs - teacher_logprobs.detach()


def _value(gap: Tensor, kind: Estimator) -> Tensor:
    if kind == "k1":
        return gap
    if kind == "k2":
        return gap.square() / 2
    if kind == "k3":
        # expm1 keeps a small gap's k3, about gap squared / 2, from drowning in the rounding of 1.
        return torch.expm1(-gap) + gap
    raise unknown("estimator", kind, ESTIMATORS)
