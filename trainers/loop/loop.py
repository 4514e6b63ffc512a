"""The training loop. It knows steps, groups, samples and losses, and no method by name."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from opd.errors import DataError, EngineError, HealthError, Interrupted
from opd.losses import Losses
from opd.models.whole import holding_none, not_finite
from opd.objective.collate import check_fed
from opd.objective.config import WeightingConfig
from opd.trainers.loop import metrics
from opd.trainers.loop.accounts import account
from opd.trainers.loop.method import Method
from opd.trainers.loop.play import Player, draw
from opd.trainers.loop.reading import Models, check_sampler, probes, with_teacher_scores
from opd.trainers.loop.stage import Stage
from opd.trainers.loop.timer import Timer
from opd.trainers.loop.update import Updated, update
from opd.trainers.loop.weighting import weigh
from opd.types import Sample, Task, TrajectoryGroup


@dataclass(kw_only=True)
class Loop:
    """One stage of a run; `step` plays one round of episodes and trains on them."""

    method: Method
    player: Player
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    dataset: Sequence[Sample] | None = None
    """The samples that are trained on in place of episodes; `prepare` finds them. None: episodes are played."""
    halfway: bool = False
    """The step at hand has changed the weights already: what is saved now belongs to no step."""
    failed: EngineError | HealthError | None = None
    """The error that ended the last step after its last update. That step counts, and no other can follow it."""
    finite: bool = True
    """The last step's losses and gradient norms were numbers."""
    checks: int = 2
    """The comparisons of the sampler's log-probs with the student's that are left: at the start, after an update."""
    revived: int = 0
    """The engine's count of copies of the weights that came back (`RolloutEngine.revived`) when it was compared."""

    @property
    def stage(self) -> Stage:
        """The stage that runs."""
        return self.player.stage

    @property
    def models(self) -> Models:
        """The models of the stage."""
        return self.player.models

    def prepare(self, folder: Path) -> dict[str, float]:
        """Let the method make or find in `folder` what the stage needs before its first step; what it made, in
        numbers."""
        prepared = self.method.prepare(self.player, folder)
        self.dataset = prepared.dataset
        return dict(prepared.numbers)

    def step(self, number: int) -> tuple[dict[str, float], list[TrajectoryGroup]]:
        """Step `number` (from 0): rollouts, samples, updates. Returns its metrics and its episodes, of all ranks.
        Raises Interrupted where the run is to end before the first update: all is as it was before the step."""
        timer = Timer()
        with _left_as_it_was(self.method, self.player):
            groups = self._play(number, timer)
            samples, order = self._samples(number, groups)
            samples, taught = self._weigh(samples, groups, timer)
        updated = self._update(number, samples, taught, order, timer)
        self.player.version += 1
        with timer("teacher"):
            self._observe(groups)
        self.halfway = False
        row = updated.row() | self.method.metrics()
        row |= metrics.of_groups(groups) | self._measure(groups, samples, updated) | self._count_dropped()
        row |= {f"engine/{name}": value for name, value in self.player.scheduler.engine.metrics().items()}
        row |= timer.row()
        self.player.health.warn(number, row)
        return row, groups

    def _play(self, number: int, timer: Timer) -> list[TrajectoryGroup]:
        """The step's episodes, of all ranks; none where the stage trains on a stored set."""
        if self.dataset is not None:
            return []
        with timer("sync"):
            self.player.sync()
        with timer("rollout"):
            groups = self.player.play_step(number)
        check_engine(self, groups)
        return groups

    def _samples(self, number: int, groups: list[TrajectoryGroup]) -> tuple[list[Sample], list[Task | None]]:
        """This rank's samples, and the tasks of all ranks in the order of the step."""
        ranks = self.player.ranks
        if self.dataset is not None:
            drawn = draw(self.dataset, number, self.player.train.tasks_per_step, self.player.seed)
            return ranks.share(drawn), list(dict.fromkeys(sample.task for sample in drawn))
        samples = ranks.agree(lambda: annotated(self.method, ranks.share(groups), self.stage.losses))
        return samples, [group.task for group in groups]

    def _weigh(
        self, samples: list[Sample], groups: list[TrajectoryGroup], timer: Timer
    ) -> tuple[list[Sample], dict[int, Tensor]]:
        """The samples with the weights that depend on the whole step, or on what the teacher says.

        Also returns, where the teacher was asked, its hidden states by index of sample, for training.
        """
        taught: dict[int, Tensor] = {}
        if self.stage.needs_scores or self.weighting.needs_scores:
            with timer("teacher"):
                samples, taught = with_teacher_scores(self.models, samples, stopping=self.player.stopping)
        ranks = self.player.ranks
        samples = self.method.weigh(samples, ranks.sum)
        ranks.agree(lambda: check_fed(samples, self.stage.losses, of=type(self.method).__name__))
        return weigh(samples, self.weighting, metrics.pass_rates(groups), ranks.sum, ranks.agree), taught

    def _update(
        self,
        number: int,
        samples: list[Sample],
        taught: dict[int, Tensor],
        order: Sequence[Task | None],
        timer: Timer,
    ) -> Updated:
        """Make the step's updates, and note whether the run can go on after them."""
        train = self.player.train
        updated = update(
            self.models,
            self.stage.losses,
            train,
            samples,
            taught,
            timer,
            order=order,
            before_change=self._note_change,
            meter=bool(train.variance_every) and number % train.variance_every == 0,
        )
        self.finite = updated.finite
        if not self.models.backend.scales_loss:
            self.failed = blamed(self.player.health.updated(updated.losses, updated.norms), self.models)
        return updated

    def _note_change(self) -> None:
        self.halfway = True

    def _observe(self, groups: list[TrajectoryGroup]) -> None:
        """Let the method learn. The updates are made: an engine that is lost here ends the run, not the step."""
        try:
            self.method.observe(groups)
        except EngineError as error:
            if self.player.ranks.world_size > 1:  # the others may not know
                raise
            self.failed = error

    def _measure(self, groups: list[TrajectoryGroup], samples: list[Sample], updated: Updated) -> dict[str, float]:
        """The metrics of samples and tokens, of all ranks; empty but on the first one, which tells them."""
        shares = self.player.ranks.to_first((samples, updated.facts, updated.skipped))
        if not shares:
            return {}
        everyone = [sample for own, _, _ in shares for sample in own]
        starts = list(accumulate((len(own) for own, _, _ in shares), initial=0))[:-1]
        known = {n + i: found for n, (_, own, _) in zip(starts, shares, strict=True) for i, found in own.items()}
        lost = {n + i for n, (_, _, own) in zip(starts, shares, strict=True) for i in own}
        trained = [sample for i, sample in enumerate(everyone) if i not in lost]
        accounts = account(groups, trained, skipped=[everyone[i] for i in lost])
        return metrics.of_samples(everyone) | metrics.of_tokens(everyone, known) | accounts

    def _count_dropped(self) -> dict[str, float]:
        """Count what the method left out on all ranks, by reason; start again from 0."""
        total: Counter[str] = Counter()
        for own in self.player.ranks.gather(dict(self.method.dropped)):
            total.update(own)
        self.method.dropped.clear()
        return {f"dropped/{reason}": float(count) for reason, count in total.items()}


@contextmanager
def _left_as_it_was(method: Method, player: Player) -> Iterator[None]:
    """Take back what the part of a step before its updates has changed, if it is left: it will be taken anew.

    Raises Interrupted, on all ranks, where it was left or the run is to stop by its end.
    """
    state, streaks, drawn = copy.deepcopy(method.state_dict()), Counter(player.health.streaks), torch.get_rng_state()
    try:
        yield
        if player.stopping():
            raise Interrupted
    except Interrupted:
        method.load_state_dict(state)
        player.health.streaks = streaks
        torch.set_rng_state(drawn)
        raise


def check_engine(loop: Loop, groups: list[TrajectoryGroup]) -> None:
    """Compare the engine with the student where that is due (`Loop.checks`), and let it sleep."""
    player, revived = loop.player, loop.player.scheduler.engine.revived
    due = loop.checks > 0 or player.ranks.any(revived != loop.revived)
    asked = probes(player.scheduler.engine, player.ranks.share(groups), player.rollout) if due else []
    player.rest()  # first: the comparison may need its memory
    if due and check_sampler(loop.models, asked, player.rollout):
        loop.checks, loop.revived = max(0, loop.checks - 1), revived


def blamed(error: HealthError | None, models: Models) -> HealthError | None:
    """Return the error about updates that are not finite with the model that is to blame; None for none."""
    return None if error is None else HealthError(f"{error} {whose_numbers(models)}")


def whose_numbers(models: Models) -> str:
    """Say which model's weights are not finite, or that all are."""
    known = {"the student": not_finite(models.student)}
    if models.teacher.other is not None:
        known["the teacher"] = not_finite(models.teacher.other)
    found = [f"Of {who}, {holding_none(bad)}." for who, bad in known.items() if bad]
    return " ".join(found) or "All weights are finite: what the student or the teacher computes from them is not."


def annotated(method: Method, groups: Sequence[TrajectoryGroup], losses: Losses) -> list[Sample]:
    """Return the method's samples of these groups. Raises DataError for weights that cannot train (`check_fed`)."""
    samples: list[Sample] = []
    for group in groups:
        made = method.annotate(group)
        if not isinstance(made, list):
            raise DataError(f"annotate of {type(method).__name__} returned {type(made).__name__}, not a list")
        samples += made
    check_fed(samples, losses, of=type(method).__name__)
    return samples
