"""A step's optimiser updates: samples cut into shares, shares into micro-batches, and the gradients of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from opd.backends.config import TrainConfig
from opd.losses import Losses
from opd.objective.collate import Batch, microbatches, normalise
from opd.objective.objective import Objective, objective
from opd.teachers.teacher import Taught
from opd.trainers.loop.reading import Models, with_old_logprobs
from opd.trainers.loop.timer import Timer
from opd.types import Sample, Task

Facts = dict[int, dict[str, Tensor]]
"""What the objective found out about the sampled tokens of each sample, by its index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Samples that are trained on at once."""

    objective: Callable[[], Objective]
    indices: list[int]
    """Of its samples."""
    lengths: list[int]
    """Sampled tokens of each of them."""
    last: bool
    """True for the last micro-batch of an update."""

    def facts(self, result: Objective) -> Facts:
        """What the objective found out, by index of the sample."""
        columns = {name: values.cpu().split(self.lengths) for name, values in result.facts.items()}
        return {i: {name: column[n] for name, column in columns.items()} for n, i in enumerate(self.indices)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Updated:
    """What became of a step's updates."""

    losses: list[float]
    """One an update, of all ranks."""
    norms: list[float]
    """Gradient norms, one an update; of an update that was skipped, one that is not finite."""
    lr: float
    """Of the last update."""
    facts: Facts
    skipped: set[int]
    """Indices of the samples whose update was skipped."""

    @property
    def finite(self) -> bool:
        """True: every loss and every gradient norm is a number."""
        return all(map(math.isfinite, self.norms)) and all(map(math.isfinite, self.losses))

    def row(self) -> dict[str, float]:
        """The updates as metrics."""
        updates = len(self.losses)
        finite = [norm for norm in self.norms if math.isfinite(norm)]
        return {
            "train/loss": sum(self.losses) / updates,
            "train/lr": self.lr,
            "train/grad_norm": sum(finite) / len(finite) if finite else self.norms[-1],
            "train/skipped": float(updates - len(finite)),
        }


def update(
    models: Models,
    losses: Losses,
    train: TrainConfig,
    samples: list[Sample],
    taught: dict[int, Tensor],
    timer: Timer,
    *,
    order: Sequence[Task | None],
    before_change: Callable[[], None],
    meter: bool = False,
) -> Updated:
    """The step's optimiser updates, each on its share of the samples.

    Args:
        taught: the teacher's hidden states by index of sample, where it was asked before.
        order: the tasks of all ranks' samples, in the order of the step.
        before_change: called before each change of the weights.
        meter: also measure the variance of the gradient.
    """
    updates, backend = train.updates_per_step, models.backend
    ranks = backend.ranks
    if updates > 1:
        # A teacher that follows the student would change under what it said before the first update.
        taught = {}
        with timer("train"):
            samples = with_old_logprobs(models, samples)
    trained = {t for own in ranks.gather({s.task for s in samples}) for t in own}
    sums, norms = [], []
    facts: Facts = {}
    skipped: set[int] = set()
    for share in shares_by_task(samples, [t for t in order if t in trained], updates):
        total = 0.0
        for micro_batch in micro_batches(models, losses, samples, share, taught, timer, meter=meter):
            with timer("train"):
                result = backend.train(micro_batch.objective, last=micro_batch.last)
                loss = float(result.loss.detach())
            total += loss
            facts |= micro_batch.facts(result)
        sums.append(ranks.sum([total])[0])
        with timer("train"):
            lr = backend.lr
            before_change()
            norms.append(backend.step())
            if math.isfinite(norms[-1]):  # else the step was skipped
                models.teacher.update()
            else:
                skipped |= set(share)
    return Updated(losses=sums, norms=norms, lr=lr, facts=facts, skipped=skipped)


def micro_batches(
    models: Models,
    losses: Losses,
    samples: Sequence[Sample],
    share: Sequence[int],
    taught: dict[int, Tensor],
    timer: Timer,
    *,
    meter: bool = False,
) -> Iterator[MicroBatch]:
    """The micro-batches of the samples whose indices are in `share`, each with what its teacher says.

    There are equally many on all ranks.
    """
    ranks = models.backend.ranks
    scaled = normalise([samples[i] for i in share], losses, ranks.sum)
    if losses.distill and (served := models.teacher.served):
        with timer("teacher"):
            scaled = ranks.agree(lambda: served.asked(scaled))
    parts = microbatches(scaled, models.tokens_per_microbatch)
    # Sharded weights are gathered by all ranks together: each asks its teacher if any rank has to.
    teaches = any_rank(ranks.gather([any(scaled[i].teacher_view is not None for i in part) for part in parts]))
    known = ranks.any(bool(taught))
    for number, teach in enumerate(teaches):
        part = parts[number] if number < len(parts) else []
        own = [share[i] for i in part]
        batch = models.batch([scaled[i] for i in part])
        with timer("teacher"):
            theirs = None
            if losses.distill and teach:
                theirs = _taught(models, batch, [taught[i] for i in own if i in taught] if known else None)
        work = partial(objective, models.student, batch, losses, theirs, models.sampler, meter=meter)
        yield MicroBatch(objective=work, indices=own, lengths=batch.lengths, last=number == len(teaches) - 1)


def divergences(models: Models, losses: Losses, samples: Sequence[Sample]) -> list[Tensor]:
    """How far the teacher is from the student at each sampled token, without training: nats [tokens] a sample."""
    facts: Facts = {}
    for micro_batch in micro_batches(models, losses, samples, range(len(samples)), {}, Timer()):
        facts |= micro_batch.facts(models.backend.look(micro_batch.objective))
    return [facts[i]["nats"] for i in range(len(samples))]


def _taught(models: Models, batch: Batch, known: list[Tensor] | None) -> Taught | None:
    """The teacher's side of a micro-batch: what it said before training, or what it says now.

    None where it sees none of this rank's samples, and only takes part for the others' sake.
    """
    if known is not None:
        head = models.backend.look(models.teacher.head)
        return Taught(torch.cat(known), head) if known else None
    seen = batch if batch.teacher_ids is not None else models.batch([])
    taught = models.backend.look(lambda: models.teacher.teach(seen))
    return None if batch.teacher_ids is None else taught


def any_rank(flags: Sequence[Sequence[bool]]) -> list[bool]:
    """Element-wise `or` of lists of unequal length, as long as the longest of them."""
    return [any(own[n] for own in flags if n < len(own)) for n in range(max(map(len, flags)))]


def shares_by_task(samples: Sequence[Sample], order: Sequence[Task | None], count: int) -> list[list[int]]:
    """Cut the samples into `count` shares of about as many tasks each, no task in two of them; on any ranks alike.

    Returns the indices of each share's samples. `order` holds the tasks of all ranks' samples.
    """
    share_of = {task: position * count // len(order) for position, task in enumerate(order)}
    return [[i for i, s in enumerate(samples) if share_of[s.task] == n] for n in range(count)]
