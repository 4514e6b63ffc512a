"""The training loop. It knows steps, groups, samples and losses, and no method by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opd.backends.local import LocalBackend
from opd.collate import Batch, collate, microbatches, normalise
from opd.config import RolloutConfig, TrainConfig, WeightingConfig
from opd.engines.base import Sampling
from opd.logprobs import chunked_logprobs, chunked_scores
from opd.losses import Sampler
from opd.modeling import CausalModel
from opd.objective import Objective, objective
from opd.preflight import sampler_gap
from opd.rollout import RolloutScheduler, derive_seed, task
from opd.teacher import Taught, Teacher
from opd.trainers import metrics
from opd.trainers.base import Method
from opd.trainers.weighting import weigh
from opd.types import Sample, Trajectory, TrajectoryGroup

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
    teacher: Teacher
    rollouts: RolloutScheduler
    backend: LocalBackend
    rollout: RolloutConfig
    train: TrainConfig
    sampler: Sampler
    pad_id: int
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    on_finish: Callable[[Trajectory], None] = lambda _: None
    checked: bool = False
    """Whether the sampler's log-probs were compared with the student's; done once, on the first samples."""

    @property
    def sampling(self) -> Sampling:
        """How training rollouts are drawn."""
        return Sampling(temperature=self.rollout.temperature, top_p=self.rollout.top_p, top_k=self.rollout.top_k)

    def step(self, number: int) -> tuple[dict[str, float], list[TrajectoryGroup]]:
        """Step `number` (from 0): rollouts, samples, updates. Returns its metrics and its episodes."""
        clock = Clock()
        with clock("rollout"):
            groups = self.play(number)
        samples = [sample for group in groups for sample in self.method.annotate(group)]
        if not self.checked and samples:
            self.preflight(samples)
        samples, taught = self.weigh(samples, groups, clock)
        row, facts = self.update(samples, taught, clock, meter=self._metered(number))
        with clock("sync"):
            self.rollouts.engine.weights_changed()
        self.method.observe(groups)
        row |= metrics.of_groups(groups) | metrics.of_samples(samples) | metrics.of_tokens(samples, facts)
        row |= {f"time/{phase}": seconds for phase, seconds in clock.seconds.items()}
        return row, groups

    def play(self, number: int) -> list[TrajectoryGroup]:
        """The step's episodes: tasks are addressed by index, so that a restart loses and repeats none."""
        first = number * self.train.tasks_per_step
        tasks = [task(first + i, split="train", run_seed=self.seed) for i in range(self.train.tasks_per_step)]
        return self.rollouts.run(
            tasks,
            group_size=self.rollout.group_size,
            sampling=self.sampling,
            seed=derive_seed("rollout", self.seed, number),
            on_finish=self.on_finish,
        )

    def preflight(self, samples: list[Sample]) -> None:
        """Compare the log-probs of the shortest samples with the student's. Raises ModelError if they differ."""
        few = sorted(samples, key=lambda s: len(s.token_ids))[:4]
        sampler_gap(self.student, self._collate(few), self.sampling)
        self.checked = True

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
        samples = self.method.weigh(samples, self.backend.all_sum)
        return weigh(samples, self.weighting, metrics.pass_rates(groups), self.backend.all_sum), taught

    def update(
        self, samples: list[Sample], taught: dict[int, Tensor], clock: Clock, *, meter: bool = False
    ) -> tuple[dict[str, float], Facts]:
        """The step's optimiser updates, each on its share of the samples. Returns their metrics and the facts."""
        updates = self.train.updates_per_step
        if updates > 1:
            # A teacher that follows the student would change under what it said before the first update.
            taught = {}
            with clock("train"):
                samples = self._with_old_logprobs(samples)
        losses, norms = [], []
        facts: Facts = {}
        for share in _shares(samples, updates):
            total = 0.0
            for part, result in self._objectives(samples, share, taught, clock, meter=meter):
                with clock("train"):
                    self.backend.backward(result.loss)
                    total += float(result.loss.detach())
                facts |= part
            losses.append(self.backend.all_sum([total])[0])
            with clock("train"):
                lr = self.backend.lr
                norms.append(self.backend.step())
                self.teacher.update()
        finite = [norm for norm in norms if math.isfinite(norm)]
        row = {
            "train/loss": sum(losses) / updates,
            "train/lr": lr,
            "train/grad_norm": sum(finite) / len(finite) if finite else norms[-1],
            "train/skipped": float(updates - len(finite)),
        }
        return row, facts

    @torch.no_grad()
    def nats(self, samples: list[Sample]) -> list[Tensor]:
        """How far the teacher is from the student at each sampled token, without training: [tokens] a sample."""
        facts: Facts = {}
        for part, _ in self._objectives(samples, list(range(len(samples))), {}, Clock()):
            facts |= part
        return [facts[i]["nats"] for i in range(len(samples))]

    def _objectives(
        self, samples: list[Sample], share: list[int], taught: dict[int, Tensor], clock: Clock, *, meter: bool = False
    ) -> Iterator[tuple[Facts, Objective]]:
        """The loss of the samples whose indices are in `share`, a micro-batch at a time."""
        losses = self.method.losses
        scaled = normalise([samples[i] for i in share], losses, self.backend.all_sum)
        for part in microbatches(scaled, self.train.tokens_per_microbatch):
            batch = self._collate([scaled[i] for i in part])
            own = [share[i] for i in part]
            with clock("teacher"):
                theirs = self._taught(batch, [taught[i] for i in own if i in taught]) if losses.distill else None
            with clock("train"):
                result = objective(self.student, batch, losses, theirs, self.sampler, meter=meter)
            columns = {name: values.cpu().split(batch.lengths) for name, values in result.facts.items()}
            yield {i: {name: column[n] for name, column in columns.items()} for n, i in enumerate(own)}, result

    def _taught(self, batch: Batch, known: list[Tensor]) -> Taught | None:
        """The teacher's side of a micro-batch: what it said before training, or what it says now."""
        if batch.teacher_ids is None:
            return None
        return Taught(torch.cat(known), self.teacher.head()) if known else self.teacher.teach(batch)

    @torch.no_grad()
    def _scored(self, samples: list[Sample]) -> tuple[list[Sample], dict[int, Tensor]]:
        """The samples with the teacher's log-probs and entropies, and its hidden states by index of the sample."""
        scored, hidden = list(samples), {}
        for part in microbatches(samples, self.train.tokens_per_microbatch):
            seen = [i for i in part if samples[i].teacher_view is not None]
            if not seen:
                continue
            batch = self._collate([samples[i] for i in seen])
            taught = self.teacher.teach(batch)
            said = chunked_scores(*taught, batch.targets, temperature=self.sampler.temperature)
            columns = (
                values.split(batch.lengths) for values in (taught.hidden, said.logprobs.cpu(), said.entropy.cpu())
            )
            for i, states, logprobs, entropy in zip(seen, *columns, strict=True):
                hidden[i] = states
                scored[i] = replace(
                    samples[i],
                    teacher_logprobs=samples[i].spread(logprobs.tolist()),
                    teacher_entropy=samples[i].spread(entropy.tolist()),
                )
        return scored, hidden

    @torch.no_grad()
    def _with_old_logprobs(self, samples: list[Sample]) -> list[Sample]:
        """The samples with the log-probs of the student as it is before the first update."""
        known = list(samples)
        for part in microbatches(samples, self.train.tokens_per_microbatch):
            batch = self._collate([samples[i] for i in part])
            hidden = self.student(batch.input_ids, batch.rows)
            own = chunked_logprobs(hidden, self.student.head(), batch.targets, temperature=self.sampler.temperature)
            for i, values in zip(part, own.cpu().split(batch.lengths), strict=True):
                known[i] = replace(samples[i], old_logprobs=samples[i].spread(values.tolist()))
        return known

    def _collate(self, samples: list[Sample]) -> Batch:
        return collate(samples, self.pad_id).to(self.backend.device)

    def _metered(self, number: int) -> bool:
        every = self.train.variance_every
        return bool(every) and number % every == 0


def _shares(samples: list[Sample], count: int) -> list[list[int]]:
    """Indices cut into `count` shares of about as many tasks each, no task in two of them."""
    tasks = list(dict.fromkeys(s.task for s in samples))
    share_of = {task: position * count // len(tasks) for position, task in enumerate(tasks)}
    return [[i for i, s in enumerate(samples) if share_of[s.task] == n] for n in range(count)]
