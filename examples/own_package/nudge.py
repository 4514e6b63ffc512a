"""A method, a divergence, a weighting and an environment of one's own, outside of the repository."""

from functools import partial

from pydantic import Field

from opd.envs.worlds.lookup import LookupEnv
from opd.losses import Distill, Divergence, Losses
from opd.maths.formulas import formula, times_log_ratio
from opd.objective.weightings import weighting
from opd.teachers.config import TeacherConfig
from opd.teachers.privileged import in_first_user_message
from opd.trainers import Method, register, to_sample
from opd.trainers.parts.forms import DivergenceConfig, DivergenceSetting


class ShortLookup(LookupEnv):
    """Questions of one or two look-ups; a teacher may see the first of them."""

    def __init__(self):
        super().__init__(hops=(1, 2))

    def start(self, rng, split, index):
        start = super().start(rng, split, index)
        start.privileged["first"] = self.plan[0]
        return start


@formula()
def symmetric_kl(student, teacher, p, q):
    """KL(teacher || student) + KL(student || teacher)."""
    value = times_log_ratio(p, student, teacher)
    return value + times_log_ratio(q, teacher, student), value + p - q


@weighting()
def fade(samples, *, half_life=4.0):
    """Count the tokens of later turns for less."""
    return [[0.5 ** (turn / half_life) for turn in sample.turn] for sample in samples]


class NudgeConfig(DivergenceConfig):
    """Settings of the method nudge."""

    hint: str = Field("{prompt}\n\nBegin with {first}.", description="What the teacher reads: {prompt} and {first}.")
    divergence: DivergenceSetting = Field(Divergence("reverse_kl"), description="From the teacher to the student.")


@register("nudge", NudgeConfig)
class Nudge(Method):
    """Self-distillation from a teacher that is told where to begin."""

    @staticmethod
    def losses(config):
        return Losses(distill=Distill(divergence=config.divergence))

    @staticmethod
    def teacher(config):
        return TeacherConfig(weights="frozen")

    def annotate(self, group):
        pairs = [(trajectory, segment) for trajectory in group.usable for segment in trajectory.segments()]
        return [to_sample(t, s, view=self._view(t, s), distill=1.0, route="distill") for t, s in pairs]

    def _view(self, trajectory, segment):
        fill = partial(self.config.hint.replace, "{first}", trajectory.privileged["first"])

        def nudged(turn, messages):
            known = turn == segment.start
            return in_first_user_message(messages, lambda p: fill().replace("{prompt}", p)) if known else messages

        return self.chat.view(trajectory, segment, nudged)
