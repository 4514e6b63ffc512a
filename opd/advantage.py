"""Advantages: how much better a sampled token or trajectory was than expected. Detached, always.

Rewards and logits in, advantages out. What they multiply (clipped ratios, weight streams, denominators) is
in `opd.objective`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from opd.divergence import token_divergence
from opd.errors import ConfigError, DataError
from opd.head import compute_dtype

Scale = Literal["std", "none"]
Baseline = Literal["full", "top_k"]

STD_EPSILON = 1e-6
"""Added to the standard deviation of a group's rewards, as the common implementations of GRPO do."""


def group_advantage(rewards: Tensor | Sequence[float], *, scale: Scale = "std", leave_one_out: bool = False) -> Tensor:
    """Rewards of one group, less what the group expects: [..., G] -> [..., G], float32 or wider.

    Equal rewards give exact zeros: such a group has no signal, and a caller may count it. So does G = 1.

    Args:
        scale: `std` divides by the sample standard deviation (n - 1) plus 1e-6, as GRPO (arXiv 2402.03300)
            does; `none` does not divide (Dr. GRPO, arXiv 2503.20783).
        leave_one_out: compare with the mean of the *other* members (RLOO, arXiv 2402.14740), which makes
            the expected gradient exact where the plain mean shrinks it by (G - 1) / G.

    Raises:
        ConfigError: an unknown scale.
        DataError: no rewards, or one that is not finite.
    """
    if scale not in get_args(Scale):
        raise ConfigError(f"advantage scale = {scale!r} is unknown. Allowed: {', '.join(get_args(Scale))}")
    if not isinstance(rewards, Tensor) or not rewards.is_floating_point():
        rewards = torch.as_tensor(rewards, dtype=torch.float64)
    rewards = rewards.detach().to(compute_dtype(rewards))
    if rewards.ndim == 0 or rewards.shape[-1] == 0:
        raise DataError("a group needs at least one reward")
    if not rewards.isfinite().all():
        raise DataError(f"rewards must be finite, got {rewards.tolist()}: leave out trajectories that failed")
    size = rewards.shape[-1]
    # Subtracting the mean of equal rewards leaves rounding, which the division would blow up to 1e-11.
    spread = rewards.amax(-1, keepdim=True) > rewards.amin(-1, keepdim=True)
    advantages = torch.where(spread, rewards - rewards.mean(-1, keepdim=True), 0)
    if size > 1 and leave_one_out:
        advantages = advantages * size / (size - 1)
    if size > 1 and scale == "std":
        advantages = advantages / (rewards.std(-1, keepdim=True) + STD_EPSILON)
    return advantages


@torch.no_grad()
def distillation_advantage(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    *,
    baseline: Baseline | None = None,
    top_k: int | None = None,
    renormalise: bool = False,
    clip: float | None = None,
) -> Tensor:
    """What the teacher thinks of a sampled token: [..., V], [..., V], [...] -> [...] nats.

    `log teacher - log student`, minus a baseline. Times the gradient of the token's log-prob, its mean under
    the student is minus the gradient of KL(student || teacher), with every baseline: a baseline depends on
    the state alone. Logits are taken at temperature 1: divide both by the *sampling* temperature first, and
    sample without top-p or top-k, or this mean no longer holds.

    Args:
        baseline: `full` is the value of the state in closed form, minus KL(student || teacher): the
            advantage's mean under the student is then 0 and its second moment lower by KL squared (vOPD, arXiv
            2605.07865). `top_k` takes the KL on the student's `top_k` likeliest entries alone. None: 0.
        renormalise: with `top_k`, make both sides distributions on these entries first (the published
            code's way); otherwise the sum stops after them.
        clip: bound on the absolute advantage (Lightning OPD, arXiv 2604.13010). The mean above no longer holds.

    Raises:
        ConfigError: an option that is unknown, out of range or without effect.
        DataError: shapes that differ, or an advantage that is infinite.
    """
    _check_options(baseline, top_k, renormalise, clip, student_logits.shape[-1])
    if student_logits.shape != teacher_logits.shape or student_logits.shape[:-1] != token_ids.shape:
        shapes = [list(t.shape) for t in (student_logits, teacher_logits, token_ids)]
        raise DataError(f"student logits, teacher logits and token ids do not match: {shapes}")
    dtype = compute_dtype(student_logits, teacher_logits)
    student, teacher = student_logits.to(dtype).log_softmax(-1), teacher_logits.to(dtype).log_softmax(-1)
    ids = token_ids.unsqueeze(-1)
    advantage = (teacher.gather(-1, ids) - student.gather(-1, ids)).squeeze(-1)
    if baseline == "full" or (baseline == "top_k" and renormalise):
        advantage += token_divergence(student, teacher, "reverse_kl", top_k=top_k, support="student", tail=False)
    elif top_k is not None:
        kept = student.topk(top_k, dim=-1)
        p = kept.values.exp()
        advantage += torch.where(p > 0, p * (kept.values - teacher.gather(-1, kept.indices)), 0).sum(-1)
    if clip is not None:
        advantage = advantage.clamp(-clip, clip)
    if advantage.isinf().any():
        raise DataError("an advantage is infinite: one side excludes (-inf) a token that the other allows; set a clip")
    return advantage


def _check_options(
    baseline: Baseline | None, top_k: int | None, renormalise: bool, clip: float | None, vocabulary: int
) -> None:
    if baseline is not None and baseline not in get_args(Baseline):
        raise ConfigError(f"baseline = {baseline!r} is unknown. Allowed: {', '.join(get_args(Baseline))}, or None")
    if (baseline == "top_k") != (top_k is not None):
        raise ConfigError(f"baseline = {baseline!r} with top_k = {top_k}: the one needs the other")
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise ConfigError(f"top_k = {top_k}: must be between 1 and the vocabulary's {vocabulary}")
    if renormalise and baseline != "top_k":
        raise ConfigError(f"renormalise = True has no effect with baseline = {baseline!r}; it needs top_k")
    if clip is not None and not clip > 0:
        raise ConfigError(f"advantage clip = {clip}: must be positive, or None for no clipping")
