"""The training loop. It knows steps, groups, samples and losses, and no method by name."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from opd.backends.base import Backend
from opd.backends.config import TrainConfig
from opd.engines.base import Sampling, Weights
from opd.engines.preflight import sampler_gap
from opd.episodes.config import RolloutConfig
from opd.episodes.scheduler import Opening, RolloutScheduler, derive_seed, task
from opd.errors import EngineError, HealthError
from opd.losses import Sampler
from opd.maths.logprobs import chunked_logprobs, chunked_scores
from opd.models.causal import CausalModel
from opd.objective.collate import Batch, Taught, collate, empty_batch, microbatches, normalise
from opd.objective.config import WeightingConfig
from opd.objective.objective import Objective, objective
from opd.teachers.teacher import Teacher
from opd.trainers.loop import metrics
from opd.trainers.loop.accounts import account
from opd.trainers.loop.health import Health
from opd.trainers.loop.method import Method
from opd.trainers.loop.weighting import weigh
from opd.types import Sample, Task, Trajectory, TrajectoryGroup

PHASES = ("rollout", "teacher", "train", "sync")
Facts = dict[int, dict[str, Tensor]]
"""What the objective found out about the sampled tokens of each sample, by its index."""


@dataclass(slots=True)
class Clock:
    """Wall seconds by phase of a step."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        since = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels run on after the call that started them has returned
        self.seconds[phase] += time.perf_counter() - since


@dataclass(kw_only=True)
class Loop:
    """The parts of a run, already built; `step` plays one round of episodes and trains on them."""

    seed: int
    method: Method
    student: CausalModel
    weights: Weights
    """The student's, for an engine that keeps its own copy."""
    teacher: Teacher
    rollouts: RolloutScheduler
    backend: Backend
    rollout: RolloutConfig
    train: TrainConfig
    sampler: Sampler
    pad_id: int
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    on_finish: Callable[[Trajectory], None] = lambda _: None
    stopping: Callable[[], bool] = lambda: False
    """Whether the run is to end early, on any rank; what takes long outside of a step asks now and then."""
    origin: str = ""
    """A fingerprint of all that stored data depends on."""
    version: int = 0
    """Steps that the student's weights have seen."""
    halfway: bool = False
    """Whether the step at hand has changed the weights already: what is saved now belongs to no step."""
    failed: EngineError | HealthError | None = None
    """What ended the last step after its last update. That step counts, and no other can follow it."""
    finite: bool = True
    """Whether the last step's losses and gradient norms were numbers."""
    synced: int | None = None
    """The version that the engine samples from; None before it was given any."""
    checks: int = 2
    """How often the sampler's log-probs are still to be compared with the student's: as the engine was started, and
    after its first update."""
    health: Health = field(init=False)

    def __post_init__(self) -> None:
        self.health = Health(self.train.give_up_after)

    @property
    def sampling(self) -> Sampling:
        """How training rollouts are drawn."""
        return Sampling(temperature=self.rollout.temperature, top_p=self.rollout.top_p, top_k=self.rollout.top_k)

    def sync(self) -> None:
        """Give the engine the student's weights, unless it has them. Before any rollout, in training or evaluation."""
        if self.synced != self.version:
            self.rollouts.engine.update_weights(self.weights, self.version)
            self.synced = self.version

    def step(self, number: int) -> tuple[dict[str, float], list[TrajectoryGroup]]:
        """Step `number` (from 0): rollouts, samples, updates. Returns its metrics and its episodes, of all ranks."""
        clock, ranks = Clock(), self.backend.ranks
        everyone: list[TrajectoryGroup] = []
        if self.method.dataset is None:
            with clock("sync"):
                self.sync()
            with clock("rollout"):
                everyone = self.rollout_step(number)
            self.rollouts.engine.sleep()
            self.synced = None  # an engine that sleeps may have given its weights up
            samples = [sample for group in ranks.share(everyone) for sample in self.method.annotate(group)]
            order: list[Task | None] = [group.task for group in everyone]
            if self.checks:
                self.preflight(samples)
        else:
            drawn = self.draw(self.method.dataset, number)
            samples, order = ranks.share(drawn), list(dict.fromkeys(sample.task for sample in drawn))
        samples, taught = self.weigh(samples, everyone, clock)
        row, facts, skipped = self.update(samples, taught, clock, order=order, meter=self._metered(number))
        self.version += 1
        with clock("teacher"):
            self._observe(everyone)
        self.halfway = False
        row |= self.method.metrics()
        row |= metrics.of_groups(everyone) | self._measured(everyone, samples, facts, skipped)
        row |= self._dropped()
        row |= {f"engine/{name}": value for name, value in self.rollouts.engine.metrics().items()}
        row |= {f"time/{phase}": seconds for phase, seconds in clock.seconds.items()}
        self.health.note_silence(number, row)
        self.health.note_unread(number, row)
        return row, everyone

    def _observe(self, groups: list[TrajectoryGroup]) -> None:
        """Let the method learn. The updates are made: an engine that is lost here ends the run, not the step."""
        try:
            self.method.observe(groups)
        except EngineError as error:
            if self.backend.ranks.world_size > 1:  # the others may not know
                raise
            self.failed = error

    def _measured(
        self, groups: list[TrajectoryGroup], samples: list[Sample], facts: Facts, skipped: set[int]
    ) -> dict[str, float]:
        """The metrics of samples and tokens, of all ranks; empty but on the first one, which tells them."""
        shares = self.backend.ranks.to_first((samples, facts, skipped))
        if not shares:
            return {}
        everyone = [sample for own, _, _ in shares for sample in own]
        starts = list(accumulate((len(own) for own, _, _ in shares), initial=0))[:-1]
        known = {n + i: found for n, (_, own, _) in zip(starts, shares, strict=True) for i, found in own.items()}
        lost = {n + i for n, (_, _, own) in zip(starts, shares, strict=True) for i in own}
        trained = [sample for i, sample in enumerate(everyone) if i not in lost]
        accounts = account(groups, trained, skipped=[everyone[i] for i in lost])
        return metrics.of_samples(everyone) | metrics.of_tokens(everyone, known) | accounts

    def _dropped(self) -> dict[str, float]:
        """What the method left out on all ranks, by reason."""
        total: Counter[str] = Counter()
        for own in self.backend.ranks.gather(dict(self.method.dropped)):
            total.update(own)
        self.method.dropped.clear()
        return {f"dropped/{reason}": float(count) for reason, count in total.items()}

    def rollout_step(self, number: int) -> list[TrajectoryGroup]:
        """The step's episodes, of all ranks: tasks are addressed by index, so that a restart loses and repeats none."""
        first = number * self.train.tasks_per_step
        tasks = [self.task(first + i) for i in range(self.train.tasks_per_step)]
        return self.play(tasks, seed=derive_seed("rollout", self.seed, number))

    def task(self, index: int) -> Task:
        """The `index`-th training task of this stage; where there are but so many, they come round again."""
        number = self.method.first_task + index
        return task(number % (self.train.tasks or number + 1), split="train", run_seed=self.seed)

    def play(
        self, tasks: Sequence[Task], *, seed: int, group_size: int | None = None, opening: Opening | None = None
    ) -> list[TrajectoryGroup]:
        """Episodes of these tasks, each rank playing its share; all of them, in the order of the tasks, on all ranks.

        `group_size` is by default the run's; for `opening` see `opd.episodes.scheduler`. Raises HealthError, on all
        ranks, where too many rounds in a row brought nothing (`train.give_up_after`).
        """
        self.sync()
        ranks = self.backend.ranks
        own = self.rollouts.run(
            ranks.share(tasks),
            group_size=group_size or self.rollout.group_size,
            sampling=self.sampling,
            seed=seed,
            opening=opening,
            on_finish=self.on_finish,
        )
        everyone = ranks.deal(ranks.gather(own))
        self.health.played(everyone)
        return everyone

    def draw(self, dataset: Sequence[Sample], number: int) -> list[Sample]:
        """Step `number`'s samples of a stored set: every pass goes over all of them, in an order of its own."""
        size, total = self.train.tasks_per_step, len(dataset)
        orders: dict[int, list[int]] = {}
        drawn = []
        for i in range(number * size, (number + 1) * size):
            turn, place = divmod(i, total)
            if turn not in orders:
                orders[turn] = np.random.default_rng(derive_seed("pass", self.seed, turn)).permutation(total).tolist()
            drawn.append(dataset[orders[turn][place]])
        return drawn

    def preflight(self, samples: list[Sample]) -> None:
        """Compare the log-probs of the shortest samples with the student's. Raises ModelError if they differ.

        Done again at the next step where no rank has any sample.
        """
        ranks = self.backend.ranks
        if not ranks.any(bool(samples)):
            return
        few = sorted(samples, key=lambda s: len(s.token_ids))[:4]
        batch = self._collate(few) if few else self._empty()
        theirs = self.rollout.vllm.dtype if self.rollout.engine != "transformers" else "auto"
        dtype = None if theirs == "auto" else getattr(torch, theirs)
        ranks.agree(
            lambda: self.backend.look(lambda: sampler_gap(self.student, batch, self.sampling, engine_dtype=dtype))
        )
        self.checks -= 1

    def weigh(
        self, samples: list[Sample], groups: list[TrajectoryGroup], clock: Clock
    ) -> tuple[list[Sample], dict[int, Tensor]]:
        """The weights that depend on the whole step, or on what the teacher says.

        Returns the samples and, where the teacher was asked, its hidden states by sample, for training.
        """
        taught: dict[int, Tensor] = {}
        if self.method.needs_scores or self.weighting.needs_scores:
            with clock("teacher"):
                samples, taught = self._scored(samples)
        all_sum = self.backend.ranks.sum
        samples = self.method.weigh(samples, all_sum)
        return weigh(samples, self.weighting, metrics.pass_rates(groups), all_sum), taught

    def update(
        self,
        samples: list[Sample],
        taught: dict[int, Tensor],
        clock: Clock,
        *,
        order: Sequence[Task | None],
        meter: bool = False,
    ) -> tuple[dict[str, float], Facts, set[int]]:
        """The step's optimiser updates, each on its share of the samples.

        Returns their metrics, the facts, and the indices of samples whose update was skipped.

        `order` is that of the tasks of all ranks.
        """
        updates, ranks = self.train.updates_per_step, self.backend.ranks
        if updates > 1:
            # A teacher that follows the student would change under what it said before the first update.
            taught = {}
            with clock("train"):
                samples = self._with_old_logprobs(samples)
        trained = {t for own in ranks.gather({s.task for s in samples}) for t in own}
        losses, norms = [], []
        facts: Facts = {}
        skipped: set[int] = set()
        for share in _shares(samples, [t for t in order if t in trained], updates):
            total = 0.0
            for part, loss in self._train(samples, share, taught, clock, meter=meter):
                total += loss
                facts |= part
            losses.append(ranks.sum([total])[0])
            with clock("train"):
                lr, self.halfway = self.backend.lr, True
                norms.append(self.backend.step())
                if math.isfinite(norms[-1]):  # else the step was skipped
                    self.teacher.update()
                else:
                    skipped |= set(share)
        finite = [norm for norm in norms if math.isfinite(norm)]
        self.finite = len(finite) == updates and all(map(math.isfinite, losses))
        if not self.backend.scales_loss:
            self.failed = self.health.updated(losses, norms)
        row = {
            "train/loss": sum(losses) / updates,
            "train/lr": lr,
            "train/grad_norm": sum(finite) / len(finite) if finite else norms[-1],
            "train/skipped": float(updates - len(finite)),
        }
        return row, facts, skipped

    def nats(self, samples: list[Sample]) -> list[Tensor]:
        """How far the teacher is from the student at each sampled token, without training: [tokens] a sample."""
        facts: Facts = {}
        for turn in self._turns(samples, list(range(len(samples))), {}, Clock()):
            facts |= turn.facts(self.backend.look(turn.objective))
        return [facts[i]["nats"] for i in range(len(samples))]

    def _train(
        self, samples: list[Sample], share: list[int], taught: dict[int, Tensor], clock: Clock, *, meter: bool
    ) -> Iterator[tuple[Facts, float]]:
        """Add the gradients of the samples whose indices are in `share`, a micro-batch at a time."""
        for turn in self._turns(samples, share, taught, clock, meter=meter):
            with clock("train"):
                result = self.backend.train(turn.objective, last=turn.last)
                loss = float(result.loss.detach())
            yield turn.facts(result), loss

    def _turns(
        self, samples: list[Sample], share: list[int], taught: dict[int, Tensor], clock: Clock, *, meter: bool = False
    ) -> Iterator[_Turn]:
        """The micro-batches of a share, the same number on all ranks, each with what its teacher says."""
        losses, ranks = self.method.losses, self.backend.ranks
        scaled = normalise([samples[i] for i in share], losses, ranks.sum)
        if losses.distill and (served := self.teacher.served):
            with clock("teacher"):
                scaled = ranks.agree(lambda: served.asked(scaled))
        parts = microbatches(scaled, self.train.tokens_per_microbatch)
        # Sharded weights are gathered by all ranks together: each asks its teacher if any rank has to.
        teaches = _longest(ranks.gather([any(scaled[i].teacher_view is not None for i in part) for part in parts]))
        known = ranks.any(bool(taught))
        for number, teach in enumerate(teaches):
            part = parts[number] if number < len(parts) else []
            own = [share[i] for i in part]
            batch = self._collate([scaled[i] for i in part]) if part else self._empty()
            with clock("teacher"):
                theirs = None
                if losses.distill and teach:
                    theirs = self._taught(batch, [taught[i] for i in own if i in taught] if known else None)
            work = partial(objective, self.student, batch, losses, theirs, self.sampler, meter=meter)
            yield _Turn(objective=work, indices=own, lengths=batch.lengths, last=number == len(teaches) - 1)

    def _taught(self, batch: Batch, known: list[Tensor] | None) -> Taught | None:
        """The teacher's side of a micro-batch: what it said before training, or what it says now.

        None where it sees none of this rank's samples, and only takes part for the others' sake.
        """
        if known is not None:
            head = self.backend.look(self.teacher.head)
            return Taught(torch.cat(known), head) if known else None
        seen = batch if batch.teacher_ids is not None else self._empty()
        taught = self.backend.look(lambda: self.teacher.teach(seen))
        return None if batch.teacher_ids is None else taught

    def _scored(self, samples: list[Sample]) -> tuple[list[Sample], dict[int, Tensor]]:
        """The samples with the teacher's log-probs and entropies, and its hidden states by index of the sample."""

        def said(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            taught = self.teacher.teach(batch)
            scores = chunked_scores(*taught, batch.targets, temperature=self.sampler.temperature)
            return taught.hidden, scores.logprobs.cpu(), scores.entropy.cpu()

        scored, hidden = list(samples), {}
        viewed = [i for i, s in enumerate(samples) if s.teacher_view is not None]
        for part, (states, logprobs, entropy) in self.looked(samples, viewed, said):
            for i, own, likely, unsure in zip(part, states, logprobs, entropy, strict=True):
                hidden[i] = own
                scored[i] = replace(
                    samples[i],
                    teacher_logprobs=samples[i].spread(likely.tolist()),
                    teacher_entropy=samples[i].spread(unsure.tolist()),
                )
        return scored, hidden

    def _with_old_logprobs(self, samples: list[Sample]) -> list[Sample]:
        """The samples with the log-probs of the student as it is before the first update."""

        def said(batch: Batch) -> tuple[Tensor]:
            hidden = self.student(batch.input_ids, batch.rows)
            head = self.student.head()
            return (chunked_logprobs(hidden, head, batch.targets, temperature=self.sampler.temperature).cpu(),)

        known = list(samples)
        for part, (logprobs,) in self.looked(samples, list(range(len(samples))), said):
            for i, values in zip(part, logprobs, strict=True):
                known[i] = replace(samples[i], old_logprobs=samples[i].spread(values.tolist()))
        return known

    def looked(
        self, samples: list[Sample], indices: list[int], work: Callable[[Batch], tuple[Tensor, ...]]
    ) -> Iterator[tuple[list[int], list[Sequence[Tensor]]]]:
        """What `work`, without training, finds out of each token: columns [N, ...], cut by a micro-batch's samples.

        Yields the indices of the samples and, for each column, its parts; on all ranks equally often.
        """
        parts = microbatches([samples[i] for i in indices], self.train.tokens_per_microbatch)
        for number in range(self.backend.ranks.most(len(parts))):
            part = [indices[i] for i in parts[number]] if number < len(parts) else []
            batch = self._collate([samples[i] for i in part]) if part else self._empty()
            columns = self.backend.look(partial(work, batch))
            yield part, [column.split(batch.lengths) if part else () for column in columns]

    def _collate(self, samples: list[Sample]) -> Batch:
        return collate(samples, self.pad_id).to(self.backend.device)

    def _empty(self) -> Batch:
        """For a rank that has nothing to do while another one does."""
        return empty_batch(self.pad_id).to(self.backend.device)

    def _metered(self, number: int) -> bool:
        every = self.train.variance_every
        return bool(every) and number % every == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """One micro-batch, ready to be trained on."""

    objective: Callable[[], Objective]
    indices: list[int]
    """Of its samples."""
    lengths: list[int]
    last: bool
    """Of its update."""

    def facts(self, result: Objective) -> Facts:
        """What the objective found out, by index of the sample."""
        columns = {name: values.cpu().split(self.lengths) for name, values in result.facts.items()}
        return {i: {name: column[n] for name, column in columns.items()} for n, i in enumerate(self.indices)}


def _longest(flags: list[list[bool]]) -> list[bool]:
    """For each number, whether it holds of any list that is so long."""
    return [any(own[n] for own in flags if n < len(own)) for n in range(max(map(len, flags)))]


def _shares(samples: list[Sample], order: Sequence[Task | None], count: int) -> list[list[int]]:
    """Indices cut into `count` shares of about as many tasks each, no task in two of them; on any ranks alike.

    `order` holds the tasks of all ranks' samples.
    """
    share_of = {task: position * count // len(order) for position, task in enumerate(order)}
    return [[i for i, s in enumerate(samples) if share_of[s.task] == n] for n in range(count)]
