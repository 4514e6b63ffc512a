"""Plays: episodes of tasks, and what else a method asks of the engine and of the models, on all ranks together.

Here alone the engine is given weights and put to sleep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from torch import Tensor

from opd.backends.config import TrainConfig
from opd.engines.base import Request, Sampling, Weights, generate
from opd.episodes.config import RolloutConfig
from opd.episodes.episode import Opening
from opd.episodes.scheduler import RolloutScheduler
from opd.episodes.tasks import derive_seed, task
from opd.errors import Interrupted
from opd.grading import Trainer
from opd.models.identity import weights_fingerprint
from opd.ranks.ranks import Ranks
from opd.trainers.loop.health import Health
from opd.trainers.loop.progress import Progress
from opd.trainers.loop.reading import Models, evaluate_in_batches, own_scores
from opd.trainers.loop.stage import Stage
from opd.trainers.loop.update import divergences
from opd.types import Sample, Task, Trajectory, TrajectoryGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The standing of a run, in plain values."""

    seed: int
    settings: str
    """A fingerprint of all settings that stored data depends on."""
    rollout: RolloutConfig
    give_up_after: int
    """`train.give_up_after`."""
    steps: int
    """Steps that the student's weights have seen, in all stages."""
    updates: int
    """Updates that they have seen in this stage."""


@dataclass(kw_only=True)
class Player:
    """Answers what a method asks of a run. All ranks ask the same, in the same order.

    A method uses `play`, `generate`, `read`, `divergences`, `task`, `ranks`, `stopping`, `stopped`, `standing`,
    `fingerprint` and `progress`; the rest is for the loop and for whoever runs it.
    """

    stage: Stage
    models: Models
    scheduler: RolloutScheduler
    weights: Weights
    """The student's, for an engine that keeps its own copy."""
    rollout: RolloutConfig
    train: TrainConfig
    """The stage's own."""
    seed: int
    settings: str = ""
    on_finish: Callable[[Trajectory], None] = lambda _: None
    progress: Progress = Progress()  # noqa: RUF009  (frozen)
    stopped: Callable[[], bool] = lambda: False
    """True: this rank was told that the run is to end early. For what one rank does by itself."""
    stopping: Callable[[], bool] = lambda: False
    """True, on all ranks: the run is to end early. What takes long outside of a step asks now and then."""
    version: int = 0
    """Steps that the student's weights have seen."""
    synced: int | None = None
    """The version that the engine samples from; None before it was given any, and once it may have lost them."""
    health: Health = field(init=False)

    def __post_init__(self) -> None:
        self.health = Health(self.train.give_up_after)

    # -- for methods

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return self.models.backend.ranks

    @property
    def standing(self) -> Standing:
        """The standing of the run now."""
        return Standing(
            seed=self.seed,
            settings=self.settings,
            rollout=self.rollout,
            give_up_after=self.train.give_up_after,
            steps=self.version,
            updates=self.models.teacher.updates,
        )

    def fingerprint(self) -> str:
        """The fingerprint of the model's weights as they are now."""
        return weights_fingerprint(self.models.student)

    def task(self, index: int) -> Task:
        """The `index`-th training task of this stage; where there are but so many, they come round again."""
        number = self.stage.first_task + index
        return task(number % (self.train.tasks or number + 1), split="train", run_seed=self.seed)

    def play(
        self, tasks: Sequence[Task], *, seed: int, group_size: int | None = None, opening: Opening | None = None
    ) -> list[TrajectoryGroup]:
        """Episodes of these tasks, each rank playing its share; all of them, in the order of the tasks, on all ranks.

        `group_size` is by default the run's; for `opening` see `opd.episodes.episode`. Raises HealthError, on all
        ranks, where too many rounds in a row brought nothing (`train.give_up_after`), and Interrupted where the run is
        to end: the episodes are left.
        """
        self.sync()
        own: list[TrajectoryGroup] | None = None
        with suppress(Interrupted):
            own = self.scheduler.run(
                self.ranks.share(tasks),
                group_size=group_size or self.rollout.group_size,
                sampling=self.sampling,
                seed=seed,
                opening=opening,
                on_finish=self.on_finish,
                stopped=self.stopped,
                trainer=Trainer(step=self.version, steps=self.train.steps),
            )
        shares = [share for share in self.ranks.gather(own) if share is not None]
        if len(shares) < self.ranks.world_size:
            raise Interrupted
        everyone = self.ranks.deal(shares)
        self.health.played(everyone)
        return everyone

    def generate(self, prompts: Sequence[list[int]], *, max_tokens: int) -> list[list[int] | None]:
        """The model's likeliest answers to these prompts in token ids, on all ranks; None for a prompt that leaves no
        room for `max_tokens` in `rollout.max_length`. Each rank answers its share. The engine sleeps afterwards."""
        self.sync()
        engine, most = self.scheduler.engine, self.rollout.max_length
        engine.begin(Sampling(temperature=0.0), self.scheduler.chat.stop_ids)
        share = self.ranks.share(list(enumerate(prompts)))
        requests = [
            Request(session=number, prompt_ids=ids, seed=0, max_tokens=max_tokens)
            for number, ids in share
            if len(ids) + max_tokens <= most
        ]
        answers: dict[int, list[int]] = {}
        for completion in generate(engine, requests):
            answers[completion.session] = completion.token_ids
            engine.release(completion.session)
        self.rest()
        return self.ranks.deal(self.ranks.gather([answers.get(number) for number, _ in share]))

    def read(
        self, samples: Sequence[Sample], indices: Sequence[int], *, top_k: int = 0
    ) -> Iterator[tuple[list[int], list[Sequence[Tensor]]]]:
        """The model's own word on the sampled tokens of the samples at this rank's `indices`, without training.

        Yields, a micro-batch at a time and on all ranks equally often, the indices of its samples, and one tensor a
        sample of each of log-probs [N], entropies [N], and ids and log-probs [N, k] of the `top_k` likeliest entries.
        """
        return evaluate_in_batches(self.models, samples, indices, partial(own_scores, self.models, top_k))

    def divergences(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Measure how far the teacher is from the student at each sampled token, without training: nats [N] each."""
        return divergences(self.models, self.stage.losses, samples)

    # -- for the loop

    @property
    def sampling(self) -> Sampling:
        """The sampling settings of training rollouts."""
        return Sampling(temperature=self.rollout.temperature, top_p=self.rollout.top_p, top_k=self.rollout.top_k)

    def sync(self) -> None:
        """Give the engine the student's weights, unless it has them. Before any rollout, in training or evaluation."""
        if self.synced != self.version:
            self.scheduler.engine.update_weights(self.weights, self.version)
            self.synced = self.version

    def rest(self) -> None:
        """Let the engine sleep. It may give its weights up, so that it has none until the next `sync`."""
        self.scheduler.engine.sleep()
        self.synced = None

    def play_step(self, number: int) -> list[TrajectoryGroup]:
        """Step `number`'s episodes, of all ranks. Tasks are addressed by index: a restart loses and repeats none."""
        first = number * self.train.tasks_per_step
        tasks = [self.task(first + i) for i in range(self.train.tasks_per_step)]
        self.progress.expect(len(tasks) * self.rollout.group_size)
        return self.play(tasks, seed=derive_seed("rollout", self.seed, number))


def draw(dataset: Sequence[Sample], number: int, size: int, seed: int) -> list[Sample]:
    """Step `number`'s `size` samples of a stored set: every pass goes over all of them, in an order of its own."""
    total = len(dataset)
    orders: dict[int, list[int]] = {}
    drawn = []
    for i in range(number * size, (number + 1) * size):
        passed, place = divmod(i, total)
        if passed not in orders:
            orders[passed] = np.random.default_rng(derive_seed("pass", seed, passed)).permutation(total).tolist()
        drawn.append(dataset[orders[passed][place]])
    return drawn
