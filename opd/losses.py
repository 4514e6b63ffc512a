"""What a method asks of the objective: which components, in which form. Plain data, no torch.

loss = sum over components of coef * sum_t weight_t * loss_t / denominator, where weights stand on the
samples (`opd.types.Sample`) and the denominator is taken over all micro-batches and ranks of the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "mixed_kl"]
Reduction = Literal["token_mean", "sequence_mean", "sequence_sum"]
Level = Literal["token", "sequence"]
Form = Literal["policy_gradient", "k2", "k3", "weighted_k3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The clipped surrogate of the samples' advantages (`opd.policy.policy_loss`), at the sampling temperature."""

    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    level: Level = "token"
    entropy: float = 0.0
    """Bonus on the student's entropy, in the same weights; needs one more projection."""
    coef: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Distill:
    """The exact divergence between teacher and student, over the full vocabulary or over its top k."""

    kind: Divergence
    temperature: float | None
    """Divides both sides' logits; None: the sampling temperature, at which a stored teacher's word was taken."""
    beta: float = 0.5
    clip: float | None = None
    """OPSD's point-wise clip: no vocabulary entry adds more than this many nats."""
    top_k: int | None = None
    support: Literal["teacher", "student"] = "teacher"
    tail: bool = True
    max_ratio: float | None = None
    """SDPO's correction where the student has moved since the rollouts: a token counts by its ratio of student to
    old policy, detached, at most this."""
    coef: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledDistill:
    """The teacher's word on the sampled token alone, at the sampling temperature.

    `policy_gradient`: minus advantage times log-prob, with a baseline (`opd.advantage`); the others:
    `opd.estimators`. On average over samples all but `k3`, whose gradient is the forward KL's, train the reverse KL.
    """

    form: Form = "policy_gradient"
    baseline: Literal["full", "top_k", "optimal"] | None = None
    top_k: int | None = None
    renormalise: bool = False
    clip: float | None = None
    """Bound on the absolute advantage."""
    max_ratio: float | None = None
    """Bound on the ratio of student to old policy, which multiplies `policy_gradient` (detached) and `weighted_k3`."""
    coef: float = 1.0

    @property
    def needs_distributions(self) -> bool:
        """Whether the sampled token's log-prob under the teacher is not enough."""
        return self.baseline is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossEntropy:
    """Minus the log-prob of the tokens as they stand (SFT)."""

    coef: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """A method's components and how their sums become means.

    `token_mean` counts the tokens whose weight is not zero; `sequence_mean` gives every sequence the same
    say, whatever its length; `sequence_sum` adds up a sequence's tokens, divides them by the constant `length`
    (Dr. GRPO), and takes the mean over sequences. With `shared`, one count over all components divides each.
    """

    policy: Policy | None = None
    distill: Distill | SampledDistill | None = None
    ce: CrossEntropy | None = None
    reduction: Reduction = "token_mean"
    length: float = 1.0
    shared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What to do about tokens that the sampler drew with another probability than the trainer gives them."""

    mode: Literal["truncate", "mask"] = "truncate"
    level: Level = "token"
    low: float = 0.0
    high: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How the rollouts were drawn, as far as a loss must know."""

    temperature: float = 1.0
    correction: Correction | None = None
    """None: the sampler is the trainer's own network, or is taken to be."""
    measured: bool = False
    """Whether the gap between sampler and trainer is told even where no loss asks for log-probs."""
