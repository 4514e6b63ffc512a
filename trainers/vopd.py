"""vOPD: on-policy distillation from the sampled token alone, with a control variate in closed form.

Source: vOPD (arXiv 2605.07865) and its released code. The advantage of a token is its log-ratio of teacher to student
plus KL(student || teacher), which is what a token is expected to lose there: the mean of the gradient stays, its
variance falls. `baseline: full` takes the KL over the vocabulary, `top_k` over the student's likeliest entries with
both sides renormalised. All else is `trainers/opd.py`.

The theory asks for tokens that were drawn from the whole distribution: leave `rollout.top_p` and `rollout.top_k` alone.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from opd.trainers.loop.registry import register
from opd.trainers.opd import Opd, OpdConfig


class VopdConfig(OpdConfig):
    """Settings of `method: vopd`."""

    baseline: Literal["full", "top_k", "optimal"] | None = Field(
        "full",
        description="What is taken off a token's log-ratio: its mean over the vocabulary, over the student's "
        "`baseline_top_k` renormalised, or the one of least variance; null is opd.",
    )


@register("vopd", VopdConfig)
class Vopd(Opd):
    """On-policy distillation from sampled tokens with a control variate (vOPD)."""
