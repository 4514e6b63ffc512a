"""Measures how much better a sampled token or trajectory was than expected: advantages. They are always detached.

Rewards and logits in, advantages out. What they multiply (clipped ratios, weight streams, denominators) is
in `opd.objective.objective`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from opd.errors import ConfigError, DataError
from opd.losses import BASELINES, Baseline, Divergence, check_known, unknown
from opd.maths.divergence import token_divergence
from opd.maths.head import Head, compute_dtype, logit_blocks, projections
from opd.maths.logprobs import entropy_of

Scale = Literal["std", "none"]
SCALES: tuple[Scale, ...] = ("std", "none")
"""Those that have a formula."""

STD_EPSILON = 1e-6
"""Added to the standard deviation of a group's rewards, as the common implementations of GRPO do."""


def group_advantage(rewards: Tensor | Sequence[float], *, scale: Scale = "std", leave_one_out: bool = False) -> Tensor:
    """Subtract from the rewards of one group what the group expects: [..., G] -> [..., G], float32 or wider.

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
    check_known("advantage scale", scale, SCALES)
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
    if scale == "std":
        return advantages / (rewards.std(-1, keepdim=True) + STD_EPSILON) if size > 1 else advantages
    if scale == "none":
        return advantages
    raise unknown("advantage scale", scale, SCALES)


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
    """Return what the teacher thinks of a sampled token: [..., V], [..., V], [...] -> [...] nats.

    `log teacher - log student`, minus the `state_baseline`. Times the gradient of the token's log-prob, its mean
    under the student is minus the gradient of KL(student || teacher), whatever the baseline: that depends on
    the state alone. Logits are taken at temperature 1: divide both by the *sampling* temperature first, and
    sample without top-p or top-k, or this mean no longer holds.

    Args:
        baseline, top_k, renormalise: see `state_baseline`; with None nothing is subtracted.
        clip: bound on the absolute advantage (Lightning OPD, arXiv 2604.13010). The mean above no longer holds.

    Raises:
        ConfigError: an option that is unknown, out of range or without effect.
        DataError: shapes that differ, or an advantage that is infinite.
    """
    if clip is not None and not clip > 0:
        raise ConfigError(f"advantage clip = {clip}: must be positive, or None for no clipping")
    _check_shapes(student_logits, teacher_logits, token_ids)
    student, teacher = _logprobs(student_logits, teacher_logits)
    ids = token_ids.unsqueeze(-1)
    advantage = (teacher.gather(-1, ids) - student.gather(-1, ids)).squeeze(-1)
    if baseline is None:
        _check_options(baseline, top_k, renormalise, student.shape[-1])
    else:
        advantage -= state_baseline(student, teacher, baseline, top_k=top_k, renormalise=renormalise)
    if clip is not None:
        advantage = advantage.clamp(-clip, clip)
    if advantage.isinf().any():
        raise DataError("an advantage is infinite: one side excludes (-inf) a token that the other allows; set a clip")
    return advantage


@torch.no_grad()
def state_baseline(
    student_logits: Tensor,
    teacher_logits: Tensor,
    baseline: Baseline,
    *,
    top_k: int | None = None,
    renormalise: bool = False,
) -> Tensor:
    """Return what to compare a sampled token's `log teacher - log student` with: [..., V], [..., V] -> [...] nats.

    `full`: its mean under the student in closed form, minus KL(student || teacher). The advantage then has mean
    0, and a second moment that is lower by KL squared (vOPD, arXiv 2605.07865).

    `top_k`: minus the KL on the student's `top_k` likeliest entries; with `renormalise` both sides are made
    distributions on these first (vOPD's code), otherwise the sum stops after them.

    `optimal`: the mean weighted by each token's squared gradient of its log-prob by the logits,
    `1 - 2 p + sum(p squared)`: of all baselines the one whose gradient by the logits varies least. Where the
    student is nearly sure the likeliest token has next to no gradient, so `full`, which it dominates, is far from
    this one and may do worse than nothing (measured in docs/divergences.md).

    Raises:
        ConfigError: an option that is unknown, out of range or without effect.
        DataError: shapes that differ, or a baseline that is infinite.
    """
    _check_options(baseline, top_k, renormalise, student_logits.shape[-1])
    student, teacher = _logprobs(student_logits, teacher_logits)
    if baseline == "full":
        return -token_divergence(student, teacher, Divergence("reverse_kl"))
    if renormalise:
        kept = Divergence("reverse_kl", top_k=top_k, support="student", tail=False)
        return -token_divergence(student, teacher, kept)
    value = _mean_reward(student, teacher, baseline, top_k)
    if value.isinf().any():
        raise DataError("a baseline is infinite: the teacher excludes (-inf) a token that the student may sample")
    return value


def _mean_reward(student: Tensor, teacher: Tensor, baseline: Literal["top_k", "optimal"], top_k: int | None) -> Tensor:
    """Average `log teacher - log student` of log-probs [..., V] over the entries that the baseline counts: [...]."""
    p = student.exp()
    rewards = torch.where(p > 0, teacher - student, 0)
    if baseline == "top_k":
        top = p.topk(top_k or 0, dim=-1)
        return (top.values * rewards.gather(-1, top.indices)).sum(-1)
    if baseline == "optimal":
        weights = p * squared_scores(p)
        return (weights * rewards).sum(-1) / weights.sum(-1).clamp(min=torch.finfo(p.dtype).tiny)
    raise unknown("baseline", baseline, BASELINES)


def squared_scores(p: Tensor) -> Tensor:
    """Square the length of the gradient of each token's log-prob by the logits: probabilities [..., V] -> [..., V]."""
    return 1 - 2 * p + p.square().sum(-1, keepdim=True)


class Advantages(NamedTuple):
    """Holds what the teacher thinks of sampled tokens and of the states before them, detached: [N] nats each."""

    values: Tensor
    """The advantages: less the baseline, clipped."""
    gap: Tensor
    """`log student - log teacher` of the sampled tokens."""
    teacher_entropy: Tensor


@torch.no_grad()
def chunked_advantages(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    baseline: Baseline | None = None,
    top_k: int | None = None,
    renormalise: bool = False,
    clip: float | None = None,
) -> Advantages:
    """Compute `distillation_advantage` of hidden states [N, H] and [N, H'], without their logits, and values to log.

    `temperature` is the sampling temperature; `chunk_size` as in `opd.maths.divergence.chunked_divergence`.
    """
    student, teacher = projections(student_hidden, student_head, teacher_hidden, teacher_head, temperature, chunk_size)
    if token_ids.shape != student_hidden.shape[:1]:
        raise DataError(f"{list(token_ids.shape)} token ids for {len(student_hidden)} hidden states")
    result = Advantages(*torch.empty(3, len(student_hidden), dtype=student.dtype, device=student_hidden.device))
    for rows, *logits in logit_blocks(student_hidden, student, teacher_hidden, teacher):
        ours, theirs = _logprobs(*logits)
        result.values[rows] = distillation_advantage(
            ours, theirs, token_ids[rows], baseline=baseline, top_k=top_k, renormalise=renormalise, clip=clip
        )
        result.gap[rows] = (ours - theirs).gather(-1, token_ids[rows, None]).squeeze(-1)
        result.teacher_entropy[rows] = entropy_of(theirs, theirs.exp())
    return result


def _logprobs(*logits: Tensor) -> list[Tensor]:
    dtype = compute_dtype(*logits)
    return [side.to(dtype).log_softmax(-1) for side in logits]


def _check_shapes(student_logits: Tensor, teacher_logits: Tensor, token_ids: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape or student_logits.shape[:-1] != token_ids.shape:
        shapes = [list(t.shape) for t in (student_logits, teacher_logits, token_ids)]
        raise DataError(f"student logits, teacher logits and token ids do not match: {shapes}")


def _check_options(baseline: Baseline | None, top_k: int | None, renormalise: bool, vocabulary: int) -> None:
    if baseline is not None and baseline not in BASELINES:
        raise ConfigError(f"baseline = {baseline!r} is unknown. Allowed: {', '.join(BASELINES)}, or None")
    if (baseline == "top_k") != (top_k is not None):
        raise ConfigError(f"baseline = {baseline!r} with top_k = {top_k}: the one needs the other")
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise ConfigError(f"top_k = {top_k}: must be between 1 and the vocabulary's {vocabulary}")
    if renormalise and baseline != "top_k":
        raise ConfigError(f"renormalise = True has no effect with baseline = {baseline!r}; it needs top_k")
