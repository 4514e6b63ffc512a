"""Policy gradients of sampled tokens: clipped ratios, and the correction for who really sampled them.

Three policies meet here. The *student* is what trains, and has a gradient. The *old* policy is the student
as it was when the rollouts were played: the same network in the trainer's arithmetic, so that its ratio to
the student is 1 until the first update. The *sampler* is what drew the tokens: the rollout engine, which may
compute in another type, or hold older weights. Everything is per token, `[N]`, and the sequences of a
micro-batch lie one after the other on that axis; `lengths` says where each ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opd.errors import ConfigError, DataError
from opd.losses import LEVELS, MODES, Correction, Level, unknown

LOG_RATIO_BOUND = 20.0
"""Log-ratios are cut here before they become ratios: e^20 is an outlier in any case, and e^89 is infinite."""


class PolicyLoss(NamedTuple):
    """Holds the clipped surrogate and what there is to log about it: [N] each."""

    values: Tensor
    """Minus the surrogate objective, with the student's gradient; not weighted."""
    ratio: Tensor
    """Student over old policy, detached: of the token, or of its sequence."""
    clipped: Tensor
    """1 where the clip is active (the token has no gradient), 0 elsewhere; detached."""


class Corrected(NamedTuple):
    """Holds importance weights for the gap between sampler and trainer: [N] each, detached."""

    weights: Tensor
    """The factors of the tokens' losses."""
    ratio: Tensor
    """Old policy over sampler, before truncation or mask."""
    limited: Tensor
    """1 where the weight is not the ratio, because it was truncated or masked."""


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.2,
    level: Level = "token",
    lengths: Sequence[int] | None = None,
) -> PolicyLoss:
    """Compute `-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)` at each token: [N], [N] -> [N].

    The surrogate of PPO as GRPO uses it (arXiv 2402.03300, equation 3), with bounds of their own on either side
    (DAPO, arXiv 2503.14476). None for a bound is no bound on that side.

    `level="sequence"` takes the geometric mean of the token ratios of a sequence as the ratio of each of its
    tokens (GSPO, arXiv 2507.18071). Each token keeps its own gradient and advantage, as in GSPO-token, which
    is GSPO itself where the advantage is the same along the sequence.

    Args:
        logprobs: of the sampled tokens under the student, with its gradient, at the sampling temperature.
        advantages: never differentiated.
        old_logprobs: None says that the student has not been updated since the rollouts: the ratio is 1 in
            value, and nothing is ever clipped.

    Raises:
        ConfigError: a bound outside its range, or an unknown level.
        DataError: shapes that differ, or a sequence level without lengths.
    """
    low, high = _ratio_bounds(clip_low, clip_high)
    old = logprobs.detach() if old_logprobs is None else old_logprobs.detach()
    _same_shape(logprobs, advantages, old)
    ratio = _log_ratio(logprobs, old, level, lengths).exp()
    bounded = ratio.clamp(low, high)
    advantages = advantages.detach()
    free, held = ratio * advantages, bounded * advantages
    return PolicyLoss(-torch.minimum(free, held), ratio.detach(), (held < free).to(ratio.dtype))


def _log_ratio(logprobs: Tensor, old: Tensor, level: Level, lengths: Sequence[int] | None) -> Tensor:
    """Take the log of student over old policy: of the token, or in value of its sequence and in gradient its own."""
    log_ratio = (logprobs - old).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if level == "sequence":
        return _mean_by_sequence(log_ratio.detach(), lengths) + logprobs - logprobs.detach()
    if level == "token":
        return log_ratio
    raise unknown("ratio level", level, LEVELS)


def _ratio_bounds(clip_low: float | None, clip_high: float | None) -> tuple[float, float]:
    """Return the least and the largest ratio that are not clipped. Raises ConfigError."""
    for name, bound in (("clip_low", clip_low), ("clip_high", clip_high)):
        if bound is not None and not bound > 0:
            raise ConfigError(f"{name} = {bound}: must be positive, or None for no clipping")
    if clip_low is not None and clip_low > 1:
        raise ConfigError(f"clip_low = {clip_low}: a ratio is never below 0, so at most 1")
    return 0.0 if clip_low is None else 1 - clip_low, math.inf if clip_high is None else 1 + clip_high


@torch.no_grad()
def importance_weights(
    old_logprobs: Tensor, sampler_logprobs: Tensor, correction: Correction, *, lengths: Sequence[int] | None = None
) -> Corrected:
    """Compute how much likelier the old policy was to draw each token than the sampler that drew it: [N], [N] -> [N].

    `truncate` bounds the ratio from above, which keeps the variance finite at the price of a bias;
    `mask` drops what lies outside of `low` to `high`. `level="sequence"` takes the ratio of the whole sequence, the
    product of its tokens', which alone corrects the distribution of the states, and varies with the length.

    Raises:
        ConfigError: an unknown level or mode.
        DataError: shapes that differ, or a sequence level without lengths.
    """
    _same_shape(old_logprobs, sampler_logprobs)
    log_ratio = old_logprobs - sampler_logprobs
    if correction.level == "sequence":
        log_ratio = _sum_by_sequence(log_ratio, lengths)
    elif correction.level != "token":
        raise unknown("correction level", correction.level, LEVELS)
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    if correction.mode == "truncate":
        weights = ratio.clamp(max=correction.high)
    elif correction.mode == "mask":
        weights = torch.where((ratio >= correction.low) & (ratio <= correction.high), ratio, 0)
    else:
        raise unknown("correction mode", correction.mode, MODES)
    return Corrected(weights, ratio, (weights != ratio).to(ratio.dtype))


def _same_shape(*tensors: Tensor) -> None:
    shapes = [list(t.shape) for t in tensors]
    if any(shape != shapes[0] for shape in shapes) or len(shapes[0]) != 1:
        raise DataError(f"log-probs and advantages must all be [tokens], got {shapes}")


def _sum_by_sequence(values: Tensor, lengths: Sequence[int] | None) -> Tensor:
    """Give each token the sum over its sequence: [N] -> [N]."""
    if lengths is None or sum(lengths) != len(values):
        raise DataError(f"a ratio by sequence needs lengths that add up to {len(values)} tokens, got {lengths}")
    counts = torch.tensor(lengths, dtype=torch.long, device=values.device)
    owner = torch.arange(len(lengths), device=values.device).repeat_interleave(counts)
    return values.new_zeros(len(lengths)).index_add_(0, owner, values)[owner]


def _mean_by_sequence(values: Tensor, lengths: Sequence[int] | None) -> Tensor:
    return _sum_by_sequence(values, lengths) / _sum_by_sequence(torch.ones_like(values), lengths)
