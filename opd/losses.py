"""What a method asks of the objective: which components, in which form. Plain data, no torch.

loss = sum over components of coef * sum_t weight_t * loss_t / denominator, where weights stand on the
samples (`opd.types.Sample`) and the denominator is taken over all micro-batches and ranks of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
Reduction = Literal["token_mean", "sequence_mean"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distill:
    """The exact divergence between teacher and student over the full vocabulary."""

    kind: Divergence
    temperature: float
    beta: float = 0.5
    clip: float | None = None
    """OPSD's point-wise clip: no vocabulary entry adds more than this many nats."""
    coef: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """Minus the log-prob of the tokens as they stand (SFT)."""

    coef: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """A method's components and how their sums become means.

    `token_mean` counts the tokens whose weight is not zero; `sequence_mean` gives every sequence the same
    say, whatever its length. With `shared`, one count over all components divides each of them.
    """

    distill: Distill | None = None
    ce: CrossEntropy | None = None
    reduction: Reduction = "token_mean"
    shared: bool = False
