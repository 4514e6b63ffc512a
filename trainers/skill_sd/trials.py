"""Trials: does the teacher that reads a skill tell right episodes from wrong ones better than without it?

After a step each new skill is tried on right and wrong episodes of one task, none of which it was made of. The bank
drops a skill that lifts nowhere, and shows one only in a place where it has lifted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from opd.trainers.skill_sd.config import EPISODES_EACH
from opd.trainers.skill_sd.finding import Finder, teacher_text
from opd.trainers.skill_sd.makers import is_right, task_text
from opd.trainers.skill_sd.skill import Where, episode_name
from opd.types import Sample, Segment, TeacherView, Trajectory, TrajectoryGroup, to_sample

if TYPE_CHECKING:
    from torch import Tensor

    from opd.trainers.loop.play import Player

logger = logging.getLogger(__name__)

View = Callable[[Trajectory, Segment, str | None], TeacherView | None]
"""Returns the teacher's view of a segment, with a text of skills in its prompt or without (None); None: too long."""
Nats = Callable[[list[Sample]], list["Tensor"]]
"""`Player.divergences`: the student's log-prob less the teacher's, nats [tokens] a sample."""


class Trial(NamedTuple):
    """A skill, and a task's episodes that it should tell apart."""

    id: str
    """The skill's id."""
    text: str
    """Its text for the task's teacher."""
    where: Where
    right: Sequence[Trajectory]
    wrong: Sequence[Trajectory]


@dataclass(kw_only=True)
class Trials:
    """Tries the skills of a bank on the episodes of a step."""

    finder: Finder
    right_from: float | None
    """The reward from which an episode is right; None: the environment says so."""
    shown: int
    """The most skills that are tried on one task in a step."""
    most: int
    """The most trials in a step."""
    warned: bool = False
    """True: it was said that no trial fits."""

    def run(self, player: Player, groups: Sequence[TrajectoryGroup], view: View) -> dict[str, float]:
        """Try untried skills on this step's episodes, and enter what they lift in the bank. Return counts and means.

        The trials are shared out among the ranks, and each rank enters the results of all.
        """
        ranks = player.ranks
        trials = self.plan(groups, player.standing.steps)
        lifts = ranks.deal(ranks.gather(measure_lifts(ranks.share(trials), view, player.divergences)))
        if trials and lifts.count(None) == len(lifts):
            self._warn(len(trials))
        found: dict[str, dict[Where, list[float]]] = {}
        for trial, lift in zip(trials, lifts, strict=True):
            if lift is not None:
                found.setdefault(trial.id, {}).setdefault(trial.where, []).append(lift)
        bank = self.finder.bank
        dropped = [id for id, places in found.items() if bank.add_trials(id, places) is None]
        numbers: dict[str, float] = {"tried": len(found), "dropped": len(dropped)}
        for where in ("own", "like"):
            means = [fmean(places[where]) for places in found.values() if where in places]
            numbers |= {f"lift_{where}": fmean(means)} if means else {}
        return numbers

    def plan(self, groups: Sequence[TrajectoryGroup], step: int) -> list[Trial]:
        """Return at most `most` trials: untried skills for each task, on right and wrong episodes of this step.

        A skill is tried on no episode that it was made of, and on no task that went only right or only wrong.
        """
        trials: list[Trial] = []
        for group in groups:
            task = group.task.id
            for skill, where in self.finder.find_untried(task, task_text(group), self.shown):
                others = [e for e in group.usable if e.turns and episode_name(step, e) not in skill.source.episodes]
                right, wrong = ([e for e in others if is_right(e, self.right_from) is kind] for kind in (True, False))
                if right and wrong:
                    text = teacher_text(skill, task)
                    trials.append(Trial(skill.id, text, where, right[:EPISODES_EACH], wrong[:EPISODES_EACH]))
        return _spread(trials, self.most)

    def _warn(self, trials: int) -> None:
        """Warn, once a run, that no trial of a step fits: then no skill that was made is ever shown."""
        if not self.warned:
            logger.warning(
                "none of %d trials of skills fits skill_sd.max_teacher_tokens, and what is not tried is not shown; "
                "raise it, or lower skill_sd.skills.max_characters",
                trials,
            )
        self.warned = True


def measure_lifts(trials: Sequence[Trial], view: View, nats: Nats) -> list[float | None]:
    """Return each trial's lift in nats a token: the skill's mean gain on right episodes less that on wrong ones.

    None for a trial whose right or wrong episodes are all too long for the teacher.

    In expectation, and but for the mean over tokens, a lift is the covariance of success with log teacher(skill) /
    teacher, over the variance of success: the slope of the success rate where the policy starts to move from the
    teacher without the skill to the one with it. A skill that makes all likelier, or only its own way, has none.
    """
    found = iter(gains([(e, t.text) for t in trials for e in (*t.right, *t.wrong)], view, nats))
    lifts: list[float | None] = []
    for trial in trials:
        right, wrong = ([g for _ in kind if (g := next(found)) is not None] for kind in (trial.right, trial.wrong))
        lifts.append(fmean(right) - fmean(wrong) if right and wrong else None)
    return lifts


def gains(readings: Sequence[tuple[Trajectory, str]], view: View, nats: Nats) -> list[float | None]:
    """Return by how many nats a token the teacher finds each episode likelier with its text than without.

    None for an episode that is too long for the teacher. An episode is read once without a text, however many texts
    it is read with.
    """
    samples_of = {(id(e), read): _samples(e, read, view) for e, text in readings for read in (text, None)}
    gaps = iter(nats([sample for samples in samples_of.values() for sample in samples]))
    # A gap is the student's log-prob less the teacher's: in the difference of two the student's cancels.
    gap = {
        key: fmean(x for _ in samples for x in next(gaps).tolist()) for key, samples in samples_of.items() if samples
    }
    pairs = [((id(episode), None), (id(episode), text)) for episode, text in readings]
    return [gap[plain] - gap[shown] if plain in gap and shown in gap else None for plain, shown in pairs]


def _samples(episode: Trajectory, text: str | None, view: View) -> list[Sample]:
    """Return an episode's samples as its teacher sees them with the text; none if one of them is too long."""
    viewed = [(segment, view(episode, segment, text)) for segment in episode.segments()]
    if any(seen is None for _, seen in viewed):
        return []
    return [to_sample(episode, segment, view=seen, distill=1.0) for segment, seen in viewed]


def _spread(trials: Iterable[Trial], most: int) -> list[Trial]:
    """Choose at most `most` trials of as many skills and places as can be: the first of each before any second one."""
    rounds: dict[tuple[str, Where], int] = {}
    ordered: list[tuple[int, int, Trial]] = []
    for number, trial in enumerate(trials):
        key = (trial.id, trial.where)
        rounds[key] = rounds.get(key, -1) + 1
        ordered.append((rounds[key], number, trial))
    return [trial for _, _, trial in sorted(ordered, key=lambda entry: entry[:2])[:most]]
