"""Settings of the distance from a teacher that methods share, and the loss component that they ask for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from opd.config import Strict, setting
from opd.losses import Distill, Divergence, SampledDistill, unknown
from opd.teachers.config import TeacherConfig


def _from_kind(value: Any) -> Any:
    """Return the long form of a bare kind; any other value as it is."""
    return {"kind": value} if isinstance(value, str) else value


DivergenceSetting = Annotated[Divergence, BeforeValidator(_from_kind)]


class DivergenceConfig(Strict):
    """Settings with a divergence. `divergence: KIND` is short for `divergence: {kind: KIND}`.

    What a file leaves out of that section is the method's, where it can stand beside what the file says
    (`Divergence.completed`).
    """

    divergence: DivergenceSetting

    @field_validator("*", mode="before")
    @classmethod
    def _complete(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        default = cls.model_fields[info.field_name].get_default(call_default_factory=True, validated_data={})
        if not isinstance(default, Divergence):
            return value
        given = _from_kind(value)
        return default.completed(given) if isinstance(given, dict) else given


class OwnTeacherConfig(Strict):
    """Settings of a teacher that the method chooses by itself: in its section, a rate alone is that one's rate."""

    teacher: TeacherConfig

    @field_validator("teacher", mode="before")
    @classmethod
    def _what_is_left_out_stays(cls, teacher: Any) -> Any:
        if not isinstance(teacher, dict) or "weights" in teacher:
            return teacher
        default = cls.model_fields["teacher"].get_default(call_default_factory=True, validated_data={})
        return {**default.model_dump(), **teacher}


_FORMER = {"full": "form: exact with divergence.top_k: null", "top_k": "form: exact, with divergence.top_k entries"}
"""Forms of earlier versions, and what they are now."""


class FormConfig(DivergenceConfig):
    """The form of a divergence from the teacher; the defaults are SDPO's without rich feedback."""

    form: Literal["exact", "sampled"] = Field(
        "exact",
        description="exact: compare distributions, by `divergence`. sampled: the sampled token alone, a policy "
        "gradient, which on average trains the reverse KL.",
    )
    divergence: DivergenceSetting = setting(
        Divergence("jsd", top_k=100, support="student"),
        when={"form": ["exact"]},
        description="The divergence of student and teacher: its kind, and the entries that it compares.",
    )
    baseline: Literal["full", "top_k", "optimal"] | None = setting(
        None,
        when={"form": ["sampled"]},
        description="What is taken off a token's log-ratio to lower the variance (vOPD); top_k renormalises both sides "
        "on the student's `baseline_top_k` likeliest entries.",
    )
    baseline_top_k: int = setting(
        100, when={"form": ["sampled"], "baseline": ["top_k"]}, ge=1, description="Entries of baseline: top_k."
    )
    max_advantage: float | None = setting(
        None,
        when={"form": ["sampled"]},
        gt=0,
        description="Bound on the absolute log-ratio of a token, less the baseline.",
    )
    max_ratio: float | None = Field(
        2.0, gt=0, description="A token counts by its ratio of student to old policy, at most this; null: it does not."
    )
    reduction: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean", description="Mean over the step's tokens, or first within each sequence."
    )

    @field_validator("form", mode="before")
    @classmethod
    def _is_no_former_one(cls, form: Any) -> Any:
        if isinstance(form, str) and form in _FORMER:
            raise ValueError(f"{form} is now {_FORMER[form]}")
        return form

    def loss(self, *, coef: float = 1.0) -> Distill | SampledDistill:
        """Return the component that these settings ask for. Raises ConfigError for an unknown form."""
        if self.form == "exact":
            return Distill(divergence=self.divergence, max_ratio=self.max_ratio, coef=coef)
        if self.form != "sampled":
            raise unknown("form", self.form, ("exact", "sampled"))
        by_top_k = self.baseline == "top_k"
        return SampledDistill(
            baseline=self.baseline,
            top_k=self.baseline_top_k if by_top_k else None,
            renormalise=by_top_k,
            clip=self.max_advantage,
            max_ratio=self.max_ratio,
            coef=coef,
        )
