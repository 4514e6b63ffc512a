"""The training loop. It knows steps, groups, samples and losses, and no method by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd.backends.local import LocalBackend
from opd.collate import collate, microbatches, normalise
from opd.config import RolloutConfig, TrainConfig
from opd.engines.base import Sampling
from opd.modeling import CausalModel
from opd.objective import Objective, objective
from opd.preflight import sampler_gap
from opd.rollout import RolloutScheduler, derive_seed, task
from opd.teacher import Teacher
from opd.trainers import metrics
from opd.trainers.base import Method
from opd.types import Sample, Trajectory, TrajectoryGroup

PHASES = ("rollout", "teacher", "train", "sync")


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
    """The parts of a run, already built; `step` makes one optimiser update of them."""

    seed: int
    method: Method
    student: CausalModel
    teacher: Teacher
    rollouts: RolloutScheduler
    backend: LocalBackend
    rollout: RolloutConfig
    train: TrainConfig
    pad_id: int
    on_finish: Callable[[Trajectory], None] = lambda _: None
    checked: bool = False
    """Whether the sampler's log-probs were compared with the student's; done once, on the first samples."""

    @property
    def sampling(self) -> Sampling:
        """How training rollouts are drawn."""
        return Sampling(temperature=self.rollout.temperature, top_p=self.rollout.top_p, top_k=self.rollout.top_k)

    def preflight(self, samples: list[Sample]) -> None:
        """Compare the log-probs of the shortest samples with the student's. Raises ModelError if they differ."""
        few = sorted(samples, key=lambda s: len(s.token_ids))[:4]
        sampler_gap(self.student, collate(few, self.pad_id).to(self.backend.device), self.sampling)
        self.checked = True

    def step(self, number: int) -> tuple[dict[str, float], list[TrajectoryGroup]]:
        """Step `number` (from 0): rollouts, samples, one update. Returns its metrics and its episodes."""
        clock = Clock()
        with clock("rollout"):
            groups = self.play(number)
        samples = [sample for group in groups for sample in self.method.annotate(group)]
        if not self.checked and samples:
            self.preflight(samples)
        row, divergences = self.update(samples, clock)
        row["train/lr"] = self.backend.lr
        with clock("train"):
            norm = self.backend.step()
            self.teacher.update()
        with clock("sync"):
            self.rollouts.engine.weights_changed()
        self.method.observe(groups)
        row |= {"train/grad_norm": norm, "train/skipped": float(not math.isfinite(norm))}
        row |= metrics.of_groups(groups) | metrics.of_samples(samples, divergences)
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

    def update(self, samples: list[Sample], clock: Clock) -> tuple[dict[str, float], dict[int, Tensor]]:
        """Add the gradients of all samples.

        Returns the step's loss (and clipped share) as metrics and, by a sample's index, the nats between
        teacher and student at each of its sampled tokens.
        """
        total = 0.0
        clipped: list[Tensor] = []
        divergences: dict[int, Tensor] = {}
        for part, result in self._objectives(samples, clock):
            with clock("train"):
                self.backend.backward(result.loss)
                total += float(result.loss.detach())
            divergences |= part
            clipped += [] if result.clipped is None else [result.clipped]
        row = {"train/loss": self.backend.all_sum([total])[0]}
        if clipped:
            row["distill/clipped"] = float(torch.cat(clipped).mean())
        return row, divergences

    @torch.no_grad()
    def nats(self, samples: list[Sample]) -> list[Tensor]:
        """How far the teacher is from the student at each sampled token, without training: [tokens] a sample."""
        found: dict[int, Tensor] = {}
        for part, _ in self._objectives(samples, Clock()):
            found |= part
        return [found[i] for i in range(len(samples))]

    def _objectives(self, samples: list[Sample], clock: Clock) -> Iterator[tuple[dict[int, Tensor], Objective]]:
        losses = self.method.losses
        scaled = normalise(samples, losses, self.backend.all_sum)
        for part in microbatches(scaled, self.train.tokens_per_microbatch):
            batch = collate([scaled[i] for i in part], self.pad_id).to(self.backend.device)
            with clock("teacher"):
                taught = self.teacher.teach(batch) if losses.distill else None
            with clock("train"):
                result = objective(self.student, batch, losses, taught)
            nats = () if result.divergence is None else result.divergence.cpu().split(batch.lengths)
            yield dict(zip(part, nats, strict=bool(nats))), result
