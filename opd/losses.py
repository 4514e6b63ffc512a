"""What a method asks of the objective: which components, in which form. Plain data, no torch.

loss = sum over components of coef * sum_t weight_t * loss_t / denominator, where weights stand on the
samples (`opd.types.Sample`) and the denominator is taken over all micro-batches and ranks of the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from math import inf
from typing import Annotated, Any, ClassVar, Literal, Never

from pydantic import ConfigDict, Field

from opd.config import OneOf
from opd.errors import ConfigError
from opd.maths.formulas import Formula, formula_of, kinds, with_beta

Support = Literal["teacher", "student"]
Form = Literal["policy_gradient", "k2", "k3", "weighted_k3"]
Baseline = Literal["full", "top_k", "optimal"]
Level = Literal["token", "sequence"]
Mode = Literal["truncate", "mask"]
Reduction = Literal["token_mean", "sequence_mean", "sequence_sum"]

# What there is code for. A name that stands in one of the types above alone is refused, before torch is imported.
# The divergences are not listed here: theirs is the table of `opd.maths.formulas`.
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


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far a teacher is from the student, and what of the vocabulary is compared.

    A method's settings hold it as a section, a component as a field, and `opd.maths.divergence` computes it. It is
    checked when it is made, without torch.

    Raises ConfigError for an unknown kind, for an option outside its range, and for one that would have no effect.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Annotated[
        str,
        OneOf(kinds, "package.module:name"),
        Field(description="The formula. Of your own: see docs/divergences.md."),
    ]
    _: KW_ONLY
    beta: Annotated[
        float | None,
        Field(
            description="Between 0 and 1, for a kind that has one (`kind` says what it does). By default the "
            "kind's own."
        ),
    ] = None
    top_k: Annotated[
        int | None,
        Field(
            description="Tell only so many entries apart, the likeliest of `support`; null compares the whole "
            "vocabulary."
        ),
    ] = None
    support: Annotated[Support, Field(description="With top_k: whose likeliest entries are told apart.")] = "teacher"
    tail: Annotated[
        bool,
        Field(
            description="With top_k: all other entries together are one more (SDPO, arXiv 2601.20802, equation 11), "
            "which bounds the full value from below; false renormalises both sides on the support, and what happens "
            "elsewhere is not seen."
        ),
    ] = True
    clip: Annotated[
        float | None,
        Field(
            description="Most nats that one vocabulary entry may add (OPSD's point-wise clip, arXiv 2601.18734); null "
            "is off. The value may then be negative, and a clipped entry loses its pull. Not with top_k."
        ),
    ] = None
    temperature: Annotated[
        float | None,
        Field(
            description="Divides the logits of both sides; null: the sampling temperature (rollout.temperature), at "
            "which what is stored of a teacher was taken."
        ),
    ] = 1.0

    def __post_init__(self) -> None:
        formula = formula_of(self.kind)
        if formula.beta is not None and self.beta is None:
            object.__setattr__(self, "beta", formula.beta)
        if formula.beta is None and self.beta is not None:
            raise ConfigError(
                f"divergence.beta is used by kind = {' or '.join(with_beta())} alone, but kind = {self.kind}; remove it"
            )
        if self.beta is not None and not 0 <= self.beta <= 1:
            raise ConfigError(f"divergence.beta = {self.beta}: must be between 0 and 1")
        if self.beta is not None and self.beta == formula.zero_at:
            raise ConfigError(
                f"divergence.beta = {self.beta:g}: {self.kind} is 0 there whatever the student does, so nothing is "
                "learned; set another"
            )
        if self.temperature is not None and not 0 < self.temperature < inf:
            raise ConfigError(f"divergence.temperature = {self.temperature}: must be positive")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"divergence.clip = {self.clip}: must be positive, or null for no clipping")
        check_known("divergence.support", self.support, SUPPORTS)
        self._check_top_k()

    def _check_top_k(self) -> None:
        if self.top_k is None:
            for name, value, default in (("support", self.support, "teacher"), ("tail", self.tail, True)):
                if value != default:
                    raise ConfigError(f"divergence.{name} is used with top_k alone; set divergence.top_k, or remove it")
        elif self.top_k < 1:
            raise ConfigError(f"divergence.top_k = {self.top_k}: must be at least 1, or null for the whole vocabulary")
        elif self.clip is not None:
            raise ConfigError(
                f"divergence.clip = {self.clip} with top_k = {self.top_k}: the clip is for entries of the whole "
                "vocabulary; remove one of them"
            )

    @property
    def formula(self) -> Formula:
        """What is computed: the kind's, or at the ends of its beta what stands there."""
        return formula_of(self.kind).at(self.beta)

    def completed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that a file gives, and for those that it leaves out this divergence's, where they can stand beside.

        Another kind has its own beta. A `top_k` that is given takes the place of a clip and the other way round, and
        without a `top_k` there is neither support nor tail.
        """
        own = asdict(self)
        if given.get("kind", self.kind) != self.kind:
            del own["beta"]
        if given.get("top_k") is not None:
            del own["clip"]
        if given.get("clip") is not None:
            del own["top_k"]
        if (own | dict(given)).get("top_k") is None:
            del own["support"], own["tail"]
        return own | dict(given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distill:
    """The exact divergence between teacher and student, over the full vocabulary or over its top k."""

    divergence: Divergence
    max_ratio: float | None = None
    """SDPO's correction where the student has moved since the rollouts: a token counts by its ratio of student to
    old policy, detached, at most this."""
    coef: float = 1.0


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
