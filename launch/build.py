"""From checked settings to the parts of a run. The only place where everything meets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from opd.backends.local import LocalBackend
from opd.chat import ChatFormat
from opd.config import CorrectionConfig
from opd.engines.base import Sampling
from opd.engines.transformers import TransformersEngine
from opd.envs.factory import make
from opd.intervals import wilson
from opd.launch.config import Config
from opd.losses import Correction, Sampler
from opd.models import Loaded, load
from opd.rollout import PromptRewrite, RolloutScheduler, derive_seed, task
from opd.teacher import Teacher
from opd.trainers.base import Method, methods
from opd.trainers.loop import Loop
from opd.types import Trajectory, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class Score:
    """Success on held-out tasks, with its 95% interval."""

    outcomes: tuple[bool, ...]
    """Whether each task was solved, in the order of the tasks, so that two scores can be paired."""

    @classmethod
    def of(cls, groups: Iterable[TrajectoryGroup]) -> Score:
        """An episode whose environment broke counts as played and not solved."""
        return cls(tuple(t.success for group in groups for t in group.trajectories))

    @property
    def solved(self) -> int:
        return sum(self.outcomes)

    @property
    def played(self) -> int:
        return len(self.outcomes)

    @property
    def rate(self) -> float:
        return self.solved / self.played

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.solved, self.played)

    def row(self) -> dict[str, float]:
        low, high = self.interval
        return {"eval/success": self.rate, "eval/low": low, "eval/high": high, "eval/tasks": float(self.played)}


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything that a run is made of."""

    config: Config
    loaded: Loaded
    method: Method
    loop: Loop
    held_out: RolloutScheduler
    """Plays evaluation tasks, in the environment as `eval.env_kwargs` changes it."""

    def evaluate(
        self, *, rewrite: PromptRewrite | None = None, on_finish: Callable[[Trajectory], None] = lambda _: None
    ) -> tuple[Score, list[TrajectoryGroup]]:
        """Play the held-out tasks once each; the same tasks and draws at every call."""
        config = self.config
        groups = self.held_out.run(
            [task(i, split="eval") for i in range(config.eval.tasks)],
            group_size=1,
            sampling=Sampling(temperature=config.eval.temperature),
            seed=derive_seed("eval", config.seed),
            rewrite=rewrite,
            on_finish=on_finish,
        )
        return Score.of(groups), groups

    def close(self) -> None:
        """Close the environments."""
        self.loop.rollouts.close()
        self.held_out.close()


def build(config: Config) -> Run:
    """Load the model and join the parts. Raises ModelError, ConfigError or EnvError before anything trains."""
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.seed)  # adapters are initialised at random
    loaded = load(config.model.model_copy(update={"name": _model_name(config.model.name)}))
    chat = ChatFormat(
        loaded.tokenizer,
        template_kwargs=config.rollout.chat_template_kwargs,
        on_rewrite=config.rollout.on_rewrite,
        stop_ids=loaded.stop_ids,
    )
    spec = methods()[config.method]
    method = spec.cls(config.section, chat)
    engine = TransformersEngine(loaded.model)
    scheduler = partial(RolloutScheduler, engine, chat, config=config.rollout, max_turns=config.env.max_turns)
    rollouts = scheduler(make_env=partial(make, config.env.id, config.env.kwargs))
    held_out = scheduler(make_env=partial(make, config.env.id, {**config.env.kwargs, **config.eval.env_kwargs}))
    updates = config.train.steps * config.train.updates_per_step
    loop = Loop(
        seed=config.seed,
        method=method,
        student=loaded.model,
        teacher=Teacher(method.teacher, loaded.model),
        rollouts=rollouts,
        backend=LocalBackend(loaded.model, config.train, total_steps=updates),
        rollout=config.rollout,
        train=config.train,
        sampler=Sampler(temperature=config.rollout.temperature, correction=_correction(config.rollout.correction)),
        weighting=config.weighting,
        pad_id=loaded.pad_id,
    )
    return Run(config=config, loaded=loaded, method=method, loop=loop, held_out=held_out)


def _correction(config: CorrectionConfig) -> Correction | None:
    """None for the embedded engine, which samples from the network that trains, unless one is asked for."""
    if config.mode == "auto" or config.mode == "none":
        return None
    return Correction(mode=config.mode, level=config.level, low=config.low, high=config.high)


def _model_name(name: str) -> str:
    if not name.startswith("tiny:"):
        return name
    from opd.launch.tiny import build_tiny

    return str(build_tiny(name.removeprefix("tiny:")))
