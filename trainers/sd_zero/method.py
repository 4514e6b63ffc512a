"""SD-Zero: a model learns to revise its attempts once it is told how they went, then teaches itself without.

Source: Self-Distillation Zero (arXiv 2604.12002) and its released code, which disagree; `variant` takes either side.
Here an attempt may have many turns: what is revised, and what the teacher sees, is the whole episode with what the
tools answered, and a cue that tells the outcome. Left out: the code's clean-up of revisions (suffixes, flattery).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from opd.losses import Distill, Divergence, Losses, check_known
from opd.trainers.loop.method import Method
from opd.trainers.loop.registry import register
from opd.trainers.loop.stage import Stage
from opd.trainers.sd_zero.config import SdZeroConfig
from opd.trainers.sd_zero.phases import Phase, revising
from opd.trainers.sd_zero.revisions import Part
from opd.types import Sample, TrajectoryGroup, to_sample


@register("sd_zero", SdZeroConfig)
class SdZero(Method):
    """Self-revision from a binary reward, then self-distillation of the reviser (SD-Zero)."""

    @classmethod
    def stages(cls, config: SdZeroConfig) -> Sequence[Stage]:
        both: dict[Part, float] = {"generation": config.generation, "revision": config.revision}
        if not config.revisions:
            both = {"attempt": config.generation}
        parts = {part: weight for part, weight in both.items() if weight}
        split = [parts] if config.variant == "paper" else [{part: weight} for part, weight in parts.items()]
        first = [revising(config, part, collects=n == 0) for n, part in enumerate(split)]
        second = [_distilling(config)]
        return {"revision": first, "distillation": second, "both": first + second}[config.phases]


def _distilling(config: SdZeroConfig) -> Stage:
    """Return the stage of phase 2."""
    return Stage(
        make=partial(Distilling, config),
        first_task=config.questions if config.phases == "both" else 0,
        over=config.distilling,
        losses=Distilling.losses(config),
        teacher=config.teacher,
    )


class Distilling(Phase):
    """Runs phase 2: the reviser, who sees the attempt and its outcome, scores the attempt's own tokens."""

    @staticmethod
    def losses(config: SdZeroConfig) -> Losses:
        temperature = config.temperature
        if config.variant == "paper":
            return Losses(distill=Distill(divergence=Divergence("reverse_kl", temperature=temperature)))
        check_known("sd_zero.variant", config.variant, ("paper", "code"))
        return Losses(distill=Distill(divergence=Divergence("mixed_kl", top_k=64, tail=False, temperature=temperature)))

    def annotate(self, group: TrajectoryGroup) -> list[Sample]:
        samples = []
        for attempt in group.usable:
            viewed = [(segment, self.reviser.view(attempt, segment)) for segment in attempt.segments()]
            too_long = any(len(view.token_ids) > self.config.max_teacher_tokens for _, view in viewed)
            self.dropped["too_long"] += too_long
            if not too_long:
                samples += [to_sample(attempt, s, view=view, distill=1.0, route="distill") for s, view in viewed]
        return samples
