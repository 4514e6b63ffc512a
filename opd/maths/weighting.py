"""Weighs tokens and samples, so that some count for more or less.

These weights multiply the weight streams of any method. Each is a plain function of what is known before the loss:
entropies, pass rates, gaps, turn numbers. None has a gradient. A weight whose mean is not 1 changes the size of the
step with it: divide by the mean over the whole step, and over all ranks, where that is not meant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd.errors import ConfigError, DataError


def entropy_weights(entropy: Tensor, *, beta: float = 1.0) -> Tensor:
    """Trust a teacher less where it is unsure: `exp(-beta * entropy)`, [N] nats -> [N] in (0, 1].

    SRPO (arXiv 2604.02288) takes the entropy of the teacher over the full vocabulary, and divides these
    weights by their mean over all distilled tokens of the step.
    """
    return (-beta * entropy.detach()).exp()


def pass_rate_weight(pass_rate: float, *, alpha: float = 1.0, beta: float = 1.0) -> float:
    """Give most weight to tasks at the edge of what the student can do: `p ** alpha * (1 - p) ** beta`.

    `pass_rate` is the share of a group's trajectories that succeeded. With few of them it is often 0 or 1,
    and then the task counts for nothing. At the defaults the mean is at most 1/4. (PACED, arXiv 2603.11178.)
    """
    if not 0 <= pass_rate <= 1:
        raise DataError(f"pass rate = {pass_rate}: must be between 0 and 1")
    if alpha < 0 or beta < 0:
        raise ConfigError(f"pass-rate exponents alpha = {alpha}, beta = {beta}: must not be negative")
    return float(pass_rate**alpha * (1 - pass_rate) ** beta)


def step_weights(gap: Tensor, turn: Tensor, *, epsilon: float = 1e-6, most: float = 1.2) -> Tensor:
    """Distil less at turns where the student has left the teacher's ground: [N], [N] -> [N].

    For the sampled tokens of *one* trajectory in their order: `gap` is |student log-prob - teacher log-prob|,
    `turn` the turn each belongs to. With d the mean gap of a turn, its weight is `(d of the first turn +
    epsilon) / (d + epsilon)`, at most `most`. The product over steps of SOD (arXiv 2605.07725) telescopes to this.
    """
    if gap.shape != turn.shape or gap.ndim != 1:
        raise DataError(f"gaps {list(gap.shape)} and turns {list(turn.shape)}: both must be [tokens]")
    if (turn.diff() < 0).any():
        raise DataError(f"the turns of one trajectory must not decrease, got {turn.tolist()}")
    if len(turn) == 0:
        return gap.detach().clone()
    _, index, count = turn.unique_consecutive(return_inverse=True, return_counts=True)
    mean: Tensor = gap.new_zeros(len(count)).index_add_(0, index, gap.detach()) / count
    weights = ((mean[0] + epsilon) / (mean + epsilon)).clamp(max=most)
    return weights[index]


def turn_weights(turn: Tensor, weights: Sequence[float]) -> Tensor:
    """Give each token the weight of the turn that it belongs to: [N] -> [N]. A weight of 0 masks a turn."""
    table = torch.tensor(weights, dtype=torch.float32, device=turn.device)
    if len(turn) and not 0 <= turn.min() <= turn.max() < len(table):
        raise DataError(f"turn {int(turn.max())} has no weight: there are {len(table)}, for turns from 0")
    return table[turn]
