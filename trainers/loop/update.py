"""Makes a step's optimiser updates: cuts its samples into shares, and each share into micro-batches to train on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

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
"""Columns of the objective about the sampled tokens of each sample, by its index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Holds samples that are trained on at once."""

    objective: Callable[[], Objective]
    indices: list[int]
    """The indices of its samples."""
    lengths: list[int]
    """Sampled tokens of each of them."""
    last: bool
    """True for the last micro-batch of an update."""

    def facts(self, result: Objective) -> Facts:
        """Split the objective's columns by sample; return them under the samples' indices."""
        columns = {name: values.cpu().split(self.lengths) for name, values in result.facts.items()}
        return {i: {name: column[n] for name, column in columns.items()} for n, i in enumerate(self.indices)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Updated:
    """Holds what became of a step's updates."""

    losses: list[float]
    """One an update, of all ranks."""
    norms: list[float]
    """Gradient norms, one an update; of an update that was skipped, one that is not finite."""
    lr: float
    """The learning rate of the last update."""
    facts: Facts
    skipped: set[int]
    """Indices of the samples whose update was skipped."""

    @property
    def finite(self) -> bool:
        """True: every loss and every gradient norm is a number."""
        return all(map(math.isfinite, self.norms)) and all(map(math.isfinite, self.losses))

    def row(self) -> dict[str, float]:
        """Return the updates as metrics."""
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
    """Make the step's optimiser updates, each on its share of the samples.

    Args:
        taught: the teacher's hidden states by index of sample, where it was asked before.
        order: the tasks of all ranks' samples, in the order of the step.
        before_change: called before each change of the weights.
        meter: also measure the variance of the gradient.
    """
    updates, ranks = train.updates_per_step, models.backend.ranks
    if updates > 1:
        # A teacher that follows the student would change under what it said before the first update.
        taught = {}
        with timer("train"):
            samples = with_old_logprobs(models, samples)
    trained = {t for own in ranks.gather({s.task for s in samples}) for t in own}
    shares = shares_by_task(samples, [t for t in order if t in trained], updates)
    done = []
    for share in shares:
        batches = micro_batches(models, losses, samples, share, taught, timer, meter=meter)
        done.append(_update_once(models, batches, timer, before_change))
    return Updated(
        losses=[one.loss for one in done],
        norms=[one.norm for one in done],
        lr=done[-1].lr,
        facts={i: columns for one in done for i, columns in one.facts.items()},
        skipped={i for share, one in zip(shares, done, strict=True) if one.skipped for i in share},
    )


class _Update(NamedTuple):
    """Holds what became of one update."""

    loss: float
    """The loss, of all ranks."""
    norm: float
    """The gradient's norm; not finite: the backend has skipped the update."""
    lr: float
    facts: Facts

    @property
    def skipped(self) -> bool:
        return not math.isfinite(self.norm)


def _update_once(
    models: Models, batches: Iterator[MicroBatch], timer: Timer, before_change: Callable[[], None]
) -> _Update:
    """Add up the gradients of the micro-batches, then change the student's weights and let the teacher follow."""
    backend, total = models.backend, 0.0
    facts: Facts = {}
    for micro_batch in batches:
        with timer("train"):
            result = backend.train(micro_batch.objective, last=micro_batch.last)
            loss = float(result.loss.detach())
        total += loss
        facts |= micro_batch.facts(result)
    total = backend.ranks.sum([total])[0]
    with timer("train"):
        lr = backend.lr
        before_change()
        done = _Update(total, backend.step(), lr, facts)
        if not done.skipped:
            models.teacher.update()
    return done


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
    """Yield the micro-batches of the samples whose indices are in `share`, each with what its teacher says.

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
    """Measure how far the teacher is from the student at each sampled token, without training: nats [N] a sample."""
    facts: Facts = {}
    for micro_batch in micro_batches(models, losses, samples, range(len(samples)), {}, Timer()):
        facts |= micro_batch.facts(models.backend.look(micro_batch.objective))
    return [facts[i]["nats"] for i in range(len(samples))]


def _taught(models: Models, batch: Batch, known: list[Tensor] | None) -> Taught | None:
    """Return the teacher's side of a micro-batch: what it said before training, or what it says now.

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
