"""The settings of the objective: corrections for the sampler, and weightings. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from opd.config import Strict, setting
from opd.objective.weightings import Weighting, find_weighting


class CorrectionConfig(Strict):
    """Importance weights for tokens that the sampler drew with another probability than the trainer gives them."""

    mode: Literal["auto", "none", "truncate", "mask"] = Field(
        "auto",
        description="truncate: weigh a token by trainer over sampler, at most `high`; mask: drop it outside of `low` "
        "to `high`; auto: truncate, unless the engine samples from the trainer's own network.",
    )
    level: Literal["token", "sequence"] = Field(
        "token", description="Ratio of each token, or of the whole sequence (the product of its tokens')."
    )
    low: float = setting(0.5, when={"mode": ["mask"]}, ge=0, lt=1, description="The least ratio that is kept.")
    high: float = Field(2.0, gt=1, description="The greatest weight (truncate) or ratio (mask).")


class PassRateWeighting(Strict):
    """PACED: learn most from the tasks at the edge of what the student can do."""

    alpha: float = Field(1.0, ge=0, description="Exponent of the share of solved episodes.")
    beta: float = Field(1.0, ge=0, description="Exponent of the share of unsolved episodes.")
    normalise: bool = Field(True, description="Divide by the mean over the step, so that the step keeps its size.")
    on: Literal["distilled", "all"] = Field(
        "distilled", description="Distilled tokens (the paper), or those of every component: rewards too, then."
    )


class StepWeighting(Strict):
    """SOD: distil less at turns where the student has left the teacher's ground."""

    epsilon: float = Field(1e-6, gt=0, description="Added to the mean gap of a turn.")
    most: float = Field(1.2, ge=1, description="Greatest weight of a turn.")


class WeightingFunction(Strict):
    """A weighting that lives outside of this repository (`opd.objective.weightings`)."""

    name: str = Field(description="my_package.my_module:my_function, or the name that an installed package gives it.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="The function's arguments beside the samples.")

    @model_validator(mode="after")
    def _is_there(self) -> WeightingFunction:
        self.found.check_kwargs(self.kwargs)
        return self

    @property
    def found(self) -> Weighting:
        """The registered function. Raises ConfigError where there is none."""
        return find_weighting(self.name)


class WeightingConfig(Strict):
    """Factors on the weights of any method, for its distilled tokens or for all: some tokens count for more."""

    entropy: float | None = Field(
        None,
        gt=0,
        description="SRPO: exp(-this * entropy of the teacher) over its mean, on distilled tokens.",
    )
    pass_rate: PassRateWeighting | None = Field(
        None, description="PACED: by the pass rate, on distilled tokens or all."
    )
    steps: StepWeighting | None = Field(None, description="SOD: by the divergence of each turn, on distilled tokens.")
    turns: list[float] | None = Field(
        None,
        min_length=1,
        description="A weight for each turn, on every component; the last stands for all after it, 0 masks.",
    )

    functions: list[WeightingFunction] = Field(
        default_factory=list, description="Weightings of your own, laid over the others one after the other."
    )

    @field_validator("turns")
    @classmethod
    def _weights_are_weights(cls, turns: list[float] | None) -> list[float] | None:
        if turns is not None and (min(turns) < 0 or not any(turns)):
            raise ValueError(f"weighting.turns = {turns}: weights must not be negative, nor all 0")
        return turns

    @property
    def needs_scores(self) -> bool:
        """True if the weights depend on the teacher's scores: it must then be asked first."""
        own = any(function.found.needs_scores for function in self.functions)
        return self.entropy is not None or self.steps is not None or own
