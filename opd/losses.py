"""What a method asks of the objective: which components, in which form. Plain data, no torch.

loss = sum over components of coef * sum_t weight_t * loss_t / denominator, where weights stand on the
samples (`opd.types.Sample`) and the denominator is taken over all micro-batches and ranks of the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Never

from opd.errors import ConfigError

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "mixed_kl"]
"""`forward_kl` is KL(teacher || student), `reverse_kl` is KL(student || teacher), `jsd` lies between, and `mixed_kl` is
`(1 - beta)` of the first and `beta` of the second."""
Support = Literal["teacher", "student"]
Form = Literal["policy_gradient", "k2", "k3", "weighted_k3"]
Baseline = Literal["full", "top_k", "optimal"]
Level = Literal["token", "sequence"]
Mode = Literal["truncate", "mask"]
Reduction = Literal["token_mean", "sequence_mean", "sequence_sum"]

# What there is a formula for. A name that stands in one of the types above alone is refused, before torch is imported.
DIVERGENCES: tuple[Divergence, ...] = ("forward_kl", "reverse_kl", "jsd", "mixed_kl")
SUPPORTS: tuple[Support, ...] = ("teacher", "student")
FORMS: tuple[Form, ...] = ("policy_gradient", "k2", "k3", "weighted_k3")
BASELINES: tuple[Baseline, ...] = ("full", "top_k", "optimal")
LEVELS: tuple[Level, ...] = ("token", "sequence")
MODES: tuple[Mode, ...] = ("truncate", "mask")
REDUCTIONS: tuple[Reduction, ...] = ("token_mean", "sequence_mean", "sequence_sum")


def check_known(setting: str, value: object, known: Iterable[str]) -> None:
    """Raises ConfigError, which names the setting, its value and what is known, for a value that is not known."""
    if value not in (names := tuple(known)):
        raise _unknown(setting, value, names)


def unknown(setting: str, value: Never, known: Iterable[str]) -> ConfigError:
    """What to raise where a chain of branches over the names of a type ends, and none of them took the name.

    A type checker refuses the call itself as soon as the type holds a name that has no branch.
    """
    return _unknown(setting, value, known)


def _unknown(setting: str, value: object, known: Iterable[str]) -> ConfigError:
    return ConfigError(f"{setting} = {value!r} is unknown. Allowed: {', '.join(known)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The clipped surrogate of the samples' advantages, at the sampling temperature (`opd.maths.policy`)."""

    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    level: Level = "token"
    entropy: float = 0.0
    """Bonus on the student's entropy, in the same weights; needs one more projection."""
    coef: float = 1.0

    def __post_init__(self) -> None:
        check_known("ratio level", self.level, LEVELS)


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
    support: Support = "teacher"
    tail: bool = True
    max_ratio: float | None = None
    """SDPO's correction where the student has moved since the rollouts: a token counts by its ratio of student to
    old policy, detached, at most this."""
    coef: float = 1.0

    def __post_init__(self) -> None:
        check_known("divergence kind", self.kind, DIVERGENCES)
        check_known("support", self.support, SUPPORTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledDistill:
    """The teacher's word on the sampled token alone, at the sampling temperature.

    `policy_gradient`: minus advantage times log-prob, with a baseline (`opd.maths.advantage`); the others:
    `opd.maths.estimators`. On average over samples all but `k3`, whose gradient is the forward KL's, train the
    reverse KL.
    """

    form: Form = "policy_gradient"
    baseline: Baseline | None = None
    top_k: int | None = None
    renormalise: bool = False
    clip: float | None = None
    """Bound on the absolute advantage."""
    max_ratio: float | None = None
    """Bound on the ratio of student to old policy, which multiplies `policy_gradient` (detached) and `weighted_k3`."""
    coef: float = 1.0

    def __post_init__(self) -> None:
        check_known("form of the sampled divergence", self.form, FORMS)
        if self.baseline is not None:
            check_known("baseline", self.baseline, BASELINES)

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

    def __post_init__(self) -> None:
        check_known("reduction", self.reduction, REDUCTIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What to do about tokens that the sampler drew with another probability than the trainer gives them."""

    mode: Mode = "truncate"
    level: Level = "token"
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        check_known("correction mode", self.mode, MODES)
        check_known("correction level", self.level, LEVELS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """How the rollouts were drawn, as far as a loss must know."""

    temperature: float = 1.0
    correction: Correction | None = None
    """None: the sampler is the trainer's own network, or is taken to be."""
    measured: bool = False
    """Whether the gap between sampler and trainer is told even where no loss asks for log-probs."""
