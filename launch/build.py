"""From checked settings to the parts of a run. The only place where everything meets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from opd import deepspeed_json
from opd.backends.base import Backend
from opd.backends.local import LocalBackend
from opd.chat import ChatFormat
from opd.config import RolloutConfig, TrainConfig
from opd.engines.base import RolloutEngine, Sampling
from opd.engines.transformers import TransformersEngine
from opd.engines.weights import ModelWeights
from opd.envs.factory import make, module_of
from opd.errors import ConfigError
from opd.intervals import wilson
from opd.launch.config import Config
from opd.losses import Correction, Sampler
from opd.modeling import CausalModel
from opd.models import Loaded, export, load
from opd.ranks import Ranks
from opd.rollout import PromptRewrite, RolloutScheduler, derive_seed, task
from opd.sharding import blank_copy, collected, fill, is_sharded, whole
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
    blank: CausalModel | None
    """What an export is written from where the model itself is not held whole: its form, without weights."""

    def evaluate(
        self, *, rewrite: PromptRewrite | None = None, on_finish: Callable[[Trajectory], None] = lambda _: None
    ) -> tuple[Score, list[TrajectoryGroup]]:
        """Play the held-out tasks once each, on all ranks; the same tasks and draws at every call."""
        config, ranks = self.config, self.loop.backend.ranks
        self.loop.sync()
        groups = self.held_out.run(
            ranks.share([task(i, split="eval") for i in range(config.eval.tasks)]),
            group_size=1,
            sampling=Sampling(temperature=config.eval.temperature),
            seed=derive_seed("eval", config.seed),
            rewrite=rewrite,
            on_finish=on_finish,
        )
        groups = ranks.deal(ranks.gather(groups))
        return Score.of(groups), groups

    def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder; on all ranks."""
        ranks = self.loop.backend.ranks
        loaded = self.loaded
        if self.blank is not None:
            loaded = replace(loaded, model=collected(self.blank, loaded.model, keep=ranks.first))
        ranks.from_first(lambda: export(loaded, folder))

    def close(self) -> None:
        """Close the environments and the engine, and give the memory of training back."""
        self.loop.rollouts.close()
        self.held_out.close()
        self.loop.backend.close()  # before vLLM, which may end the process groups that DeepSpeed still asks
        self.loop.rollouts.engine.close()


def build(
    config: Config,
    ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
    *,
    stage: int = 0,
    model: Path | None = None,
) -> Run:
    """Load the model and join the parts of one stage; `model` is the export that a later stage starts from.

    Raises ModelError, ConfigError or EnvError before anything trains.
    """
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.seed)  # adapters are initialised at random
    loaded = _load(config, ranks, str(model) if model else config.model.name)
    chat = ChatFormat(
        loaded.tokenizer,
        template_kwargs=config.rollout.chat_template_kwargs,
        on_rewrite=config.rollout.on_rewrite,
        stop_ids=loaded.stop_ids,
    )
    spec = methods()[config.method]
    method = spec.cls(config.section, chat).stages()[stage]
    train = method.schedule(config.train)
    blank = blank_copy(loaded.model, "meta") if config.backend == "deepspeed" else None
    backend, engine = _backend(config, train, loaded.model, ranks)
    scheduler = partial(
        RolloutScheduler,
        engine,
        chat,
        config=config.rollout,
        max_turns=config.env.max_turns,
        workers=config.env.workers,
        preload=["opd.envs.factory", module_of(config.env.id)],
    )
    rollouts = scheduler(make_env=partial(make, config.env.id, config.env.kwargs))
    held_out = scheduler(make_env=partial(make, config.env.id, {**config.env.kwargs, **config.eval.env_kwargs}))
    loop = Loop(
        seed=config.seed,
        method=method,
        student=loaded.model,
        weights=ModelWeights(loaded.model, gather=whole if any(map(is_sharded, loaded.model.parameters())) else None),
        teacher=Teacher(method.teacher, loaded.model),
        rollouts=rollouts,
        backend=backend,
        rollout=config.rollout,
        train=train,
        sampler=_sampler(config.rollout),
        weighting=config.weighting,
        pad_id=loaded.pad_id,
        origin=config.fingerprint,
    )
    return Run(config=config, loaded=loaded, method=method, loop=loop, held_out=held_out, blank=blank)


def _sampler(rollout: RolloutConfig) -> Sampler:
    """What the losses know of the rollouts; another network than the one that trains is always measured against it."""
    mode, config = rollout.correction_mode, rollout.correction
    corrected = None if mode == "none" else Correction(mode=mode, level=config.level, low=config.low, high=config.high)
    measured = rollout.engine != "transformers" and not rollout.truncated
    return Sampler(temperature=rollout.temperature, correction=corrected, measured=measured)


def _load(config: Config, ranks: Ranks, name: str) -> Loaded:
    """The model, where it is to be held: with ZeRO-3 in the CPU's memory, until DeepSpeed has cut it into slices."""
    if name.startswith("tiny:"):
        ranks.from_first(lambda: _built_name(name))  # on one rank first: the others of its machine find it there
        name = _built_name(name)
    model = config.model.model_copy(update={"name": name})
    device = None
    if config.deepspeed is not None:
        model = model.model_copy(update={"dtype": deepspeed_json.dtype(config.deepspeed) or model.dtype})
        device = "cpu" if deepspeed_json.stage(config.deepspeed) == 3 else None
    return ranks.agree(lambda: load(model, device=device))


def _engine(config: Config, model: CausalModel, ranks: Ranks) -> RolloutEngine:
    """What generates, for a model that is whole or an engine that keeps its own copy. vLLM is imported late."""
    if config.rollout.engine == "transformers":
        return TransformersEngine(model)
    if config.rollout.engine == "vllm_server":
        from opd.launch.servers import server_engine

        return server_engine(config, model, ranks)
    from opd.engines.vllm import VllmEngine

    return VllmEngine(model, config.rollout)


def _backend(config: Config, train: TrainConfig, model: CausalModel, ranks: Ranks) -> tuple[Backend, RolloutEngine]:
    """What trains the model, and what samples: the model itself, a copy where it is cut into slices, or vLLM."""
    total_steps = train.steps * train.updates_per_step
    if config.deepspeed is None:
        return LocalBackend(model, train, total_steps=total_steps), _engine(config, model, ranks)
    from opd.backends.zero import ZeroBackend

    copied = deepspeed_json.stage(config.deepspeed) == 3 and config.rollout.engine == "transformers"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    twin = blank_copy(model, device) if copied else model
    facts = deepspeed_json.Facts(
        total_steps=total_steps,
        ranks=ranks.world_size,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        hidden_size=getattr(model.config, "hidden_size", None),
        gpu=device.type == "cuda",
    )
    try:
        filled = deepspeed_json.fill(config.deepspeed, train, facts)
    except ValueError as error:
        raise ConfigError(f"deepspeed: {error}") from error
    backend = ZeroBackend(model, train, filled.settings, ranks, total_steps=total_steps)
    if not copied:
        return backend, _engine(config, model, ranks)
    fill(twin, model)
    return backend, TransformersEngine(twin, refresh=partial(fill, twin, model))


def _built_name(name: str) -> str:
    from opd.launch.tiny import build_tiny

    return str(build_tiny(name.removeprefix("tiny:")))
