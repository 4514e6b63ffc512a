"""How far from a teacher a token is: the settings that methods share, and the loss component that they ask for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from opd.config import Strict
from opd.losses import Distill, SampledDistill, unknown

_BELONGS = {
    "top_k": ("top_k", "sampled"),
    "support": ("top_k",),
    "tail": ("top_k",),
    "baseline": ("sampled",),
    "max_advantage": ("sampled",),
    "temperature": ("full", "top_k"),
}
"""Which forms use a setting that the others leave alone."""


class FormConfig(Strict):
    """The form of a divergence from the teacher; the defaults are SDPO's without rich feedback."""

    form: Literal["full", "top_k", "sampled"] = Field(
        "top_k",
        description="Compare whole distributions, or the `top_k` likeliest entries (of `support`) and the rest as one, "
        "or the sampled token alone (a policy gradient).",
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "jsd", description="forward_kl is KL(teacher || student), reverse_kl is KL(student || teacher)."
    )
    beta: float = Field(
        0.5, ge=0, le=1, description="jsd: the teacher's share of the mixture; 0 and 1 are the forward and reverse KL."
    )
    top_k: int = Field(100, ge=1, description="Entries of form: top_k, or of baseline: top_k.")
    support: Literal["student", "teacher"] = Field(
        "student", description="form: top_k: whose likeliest entries are told apart."
    )
    tail: bool = Field(
        True, description="form: top_k: keep what lies outside as one more entry; false renormalises both sides."
    )
    temperature: float = Field(1.0, gt=0, description="Divides both sides' logits, but for form: sampled.")
    baseline: Literal["full", "top_k", "optimal"] | None = Field(
        None,
        description="form: sampled: what is taken off a token's log-ratio to lower the variance (vOPD); top_k "
        "renormalises both sides on the student's likeliest entries.",
    )
    max_advantage: float | None = Field(
        None, gt=0, description="form: sampled: bound on the absolute log-ratio of a token, less the baseline."
    )
    max_ratio: float | None = Field(
        2.0, gt=0, description="A token counts by its ratio of student to old policy, at most this; null: it does not."
    )
    reduction: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean", description="Mean over the step's tokens, or first within each sequence."
    )

    @model_validator(mode="after")
    def _settings_belong_together(self) -> FormConfig:
        for name, forms in _BELONGS.items():
            idle = self.form not in forms or (name == "top_k" and self.form == "sampled" and self.baseline != "top_k")
            if idle and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} = {getattr(self, name)} has no effect with form = {self.form}; remove it")
        if self.form == "sampled" and self.divergence != "reverse_kl":
            raise ValueError(
                f"divergence = {self.divergence}, but form = sampled trains the reverse KL; set divergence: reverse_kl"
            )
        if self.divergence != "jsd" and self.beta != 0.5:
            raise ValueError(f"beta is used by jsd alone, but divergence = {self.divergence}; remove it")
        return self

    def loss(self, *, coef: float = 1.0) -> Distill | SampledDistill:
        """The component that these settings ask for. Raises ConfigError for a name that there is no formula for."""
        if self.form == "sampled":
            by_top_k = self.baseline == "top_k"
            return SampledDistill(
                baseline=self.baseline,
                top_k=self.top_k if by_top_k else None,
                renormalise=by_top_k,
                clip=self.max_advantage,
                max_ratio=self.max_ratio,
                coef=coef,
            )
        if self.form != "full" and self.form != "top_k":
            raise unknown("form", self.form, ("full", "top_k", "sampled"))
        return Distill(
            kind=self.divergence,
            beta=self.beta,
            temperature=self.temperature,
            top_k=self.top_k if self.form == "top_k" else None,
            support=self.support,
            tail=self.tail,
            max_ratio=self.max_ratio,
            coef=coef,
        )
