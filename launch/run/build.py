"""From checked settings to the parts of a run. The only place where everything meets."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opd.backends import deepspeed_json
from opd.backends.base import Backend
from opd.backends.config import TrainConfig
from opd.backends.idle import IdleBackend
from opd.backends.local import LocalBackend
from opd.engines.base import RolloutEngine, Sampling
from opd.engines.scoring import VllmScorer
from opd.engines.transformers import TransformersEngine
from opd.engines.vllm_http import Server
from opd.engines.weights import ModelWeights
from opd.envs.factory import make, module_of
from opd.episodes.config import RolloutConfig
from opd.episodes.scheduler import PromptRewrite, RolloutScheduler, derive_seed, task
from opd.errors import ConfigError
from opd.launch.settings.config import Config
from opd.losses import Correction, Distill, Sampler
from opd.models.causal import CausalModel
from opd.models.chat import ChatFormat
from opd.models.config import ModelConfig
from opd.models.identity import check_same_tokenizer, weights_fingerprint
from opd.models.loading import Loaded, export, load, load_teacher, load_tokenizer
from opd.models.sharding import blank_copy, collected, fill, is_sharded, whole
from opd.ranks.ranks import Ranks
from opd.teachers.served import ServedTeacher
from opd.teachers.teacher import Teacher
from opd.tracking.intervals import paired_difference, wilson
from opd.trainers.loop.loop import Loop
from opd.trainers.loop.method import Method
from opd.trainers.loop.play import Player
from opd.trainers.loop.reading import Models
from opd.trainers.loop.registry import methods
from opd.trainers.loop.stage import Stage
from opd.types import Trajectory, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class Score:
    """Success on held-out tasks, with its 95% interval."""

    outcomes: tuple[bool | None, ...]
    """Whether each task was solved, in the order of the tasks, so that two scores can be paired; None: not measured,
    since its environment broke."""

    @classmethod
    def of(cls, groups: Iterable[TrajectoryGroup]) -> Score:
        return cls(tuple(t.success if t.failed is None else None for group in groups for t in group.trajectories))

    @property
    def solved(self) -> int:
        return self.outcomes.count(True)

    @property
    def played(self) -> int:
        """How many were measured."""
        return len(self.outcomes) - self.broken

    @property
    def broken(self) -> int:
        return self.outcomes.count(None)

    @property
    def rate(self) -> float:
        """nan where nothing was measured."""
        return self.solved / self.played if self.played else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """From 0 to 1 where nothing was measured."""
        return wilson(self.solved, self.played) if self.played else (0.0, 1.0)

    def row(self) -> dict[str, float]:
        low, high = self.interval if self.played else (math.nan, math.nan)
        counts = {"eval/tasks": float(self.played), "eval/broken": float(self.broken)}
        return {"eval/success": self.rate, "eval/low": low, "eval/high": high, **counts}

    def __str__(self) -> str:
        """As a table shows it: 97.7% (95 to 99)."""
        if not self.played:
            return "not measured"
        low, high = self.interval
        return f"{self.rate:.1%} ({100 * low:.0f} to {100 * high:.0f})"

    def change(self, after: Score) -> tuple[float, float, float] | None:
        """How much higher `after` is on the tasks that both measured, with its interval; None where there are none."""
        pairs = [(a, b) for a, b in zip(self.outcomes, after.outcomes, strict=False) if None not in (a, b)]
        if not pairs or len(self.outcomes) != len(after.outcomes):
            return None
        first, second = zip(*pairs, strict=True)
        return paired_difference(first, second)


class Interrupted(Exception):
    """An evaluation was left before its end, since the run is to stop."""


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
        self,
        *,
        rewrite: PromptRewrite | None = None,
        on_finish: Callable[[Trajectory], None] = lambda _: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[Score, list[TrajectoryGroup]]:
        """Play the held-out tasks once each, on all ranks; the same tasks and draws at every call.

        Raises Interrupted, on all ranks, where `stopped` held on any of them when an episode ended.
        """
        config, ranks = self.config, self.loop.player.ranks

        def finished(episode: Trajectory) -> None:
            on_finish(episode)
            if stopped():
                raise Interrupted

        self.loop.player.sync()
        own: list[TrajectoryGroup] | None = None
        with suppress(Interrupted):
            own = self.held_out.run(
                ranks.share([task(i, split="eval") for i in range(config.eval.tasks)]),
                group_size=1,
                sampling=Sampling(temperature=config.eval.temperature),
                seed=derive_seed("eval", config.seed),
                rewrite=rewrite,
                on_finish=finished,
            )
        shares = [share for share in ranks.gather(own) if share is not None]
        if len(shares) < ranks.world_size:
            raise Interrupted
        groups = ranks.deal(shares)
        return Score.of(groups), groups

    def export(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder; on all ranks."""
        ranks = self.loop.player.ranks
        loaded = self.loaded
        if self.blank is not None:
            loaded = replace(loaded, model=collected(self.blank, loaded.model, keep=ranks.first))
        ranks.from_first(lambda: export(loaded, folder))

    def close(self) -> None:
        """Close the environments and the engine, and give the memory of training back."""
        scheduler, models = self.loop.player.scheduler, self.loop.models
        scheduler.close()
        self.held_out.close()
        models.teacher.close()
        models.backend.close()  # before vLLM, which asks for memory once more where it ends in its sleep
        scheduler.engine.close()


def build(
    config: Config,
    ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
    *,
    stage: int | None = 0,
    model: Path | None = None,
) -> Run:
    """Load the model and join the parts of one stage; `model` is the export that a later stage starts from.

    Without a stage the run can be evaluated and not trained: no other model is loaded to teach.

    Raises ModelError, ConfigError or EnvError before anything trains; what was open by then is closed.
    """
    with ExitStack() as opened:
        run = _build(config, ranks, opened, stage=stage, model=model)
        opened.pop_all()  # the run closes it from now on
    return run


def _build(config: Config, ranks: Ranks, opened: ExitStack, *, stage: int | None, model: Path | None) -> Run:
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.seed)  # adapters are initialised at random
    own = _named(config, ranks, str(model) if model else config.model.name)
    planned = _only_played(config) if stage is None else config.stages[stage]
    name = planned.model or planned.teacher.model
    other = _named(config, ranks, name) if name else None
    if other is not None:
        ranks.agree(lambda: _check_tokenizers(own, other))
    if planned.model is None or other is None:
        loaded = _load(config, ranks, own)
    else:
        loaded = _load(config, ranks, other.model_copy(update={"lora": None}))
        loaded = replace(loaded, tokenizer=load_tokenizer(own))
    _check_top_k(config, loaded.model.vocabulary)
    chat = ChatFormat(
        loaded.tokenizer,
        template_kwargs=config.rollout.chat_template_kwargs,
        on_rewrite=config.rollout.on_rewrite,
        stop_ids=loaded.stop_ids,
    )
    method: Method = planned.make(chat)
    train = planned.settings(config.train)
    blank = blank_copy(loaded.model, "meta") if config.backend == "deepspeed" else None
    backend, engine = _backend(config, train, loaded.model, ranks, opened, trains=planned.trains)
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
    opened.callback(rollouts.close)
    held_out = scheduler(make_env=partial(make, config.env.id, {**config.env.kwargs, **config.eval.env_kwargs}))
    opened.callback(held_out.close)
    teacher = _teacher(config, planned, loaded.model, other, ranks)
    opened.callback(teacher.close)
    models = Models(
        student=loaded.model,
        teacher=teacher,
        backend=backend,
        sampler=_sampler(config.rollout),
        pad_id=loaded.pad_id,
        tokens_per_microbatch=train.tokens_per_microbatch,
    )
    player = Player(
        stage=planned,
        models=models,
        scheduler=rollouts,
        weights=ModelWeights(loaded.model, gather=whole if any(map(is_sharded, loaded.model.parameters())) else None),
        rollout=config.rollout,
        train=train,
        seed=config.seed,
        settings=config.fingerprint,
    )
    loop = Loop(method=method, player=player, weighting=config.weighting)
    return Run(config=config, loaded=loaded, method=method, loop=loop, held_out=held_out, blank=blank)


def _only_played(config: Config) -> Stage:
    """A stage for a run that is evaluated and not trained: nobody teaches."""
    return Stage(make=partial(methods()[config.method].cls, config.section))


def _check_top_k(config: Config, vocabulary: int) -> None:
    """Check top_k of every stage now: a bad last stage would waste the earlier ones. Raises ConfigError."""
    for stage in config.stages:
        distill = stage.losses.distill
        if isinstance(distill, Distill):
            name, top_k = "divergence.top_k", distill.divergence.top_k
        else:
            name, top_k = "baseline_top_k", distill.top_k if distill else None
        if top_k is not None and top_k > vocabulary:
            raise ConfigError(
                f"{config.method}.{name} = {top_k} is more than the {vocabulary} entries of the model's vocabulary"
            )


def _sampler(rollout: RolloutConfig) -> Sampler:
    """What the losses know of the rollouts; another network than the one that trains is always measured against it."""
    mode, config = rollout.correction_mode, rollout.correction
    corrected = None if mode == "none" else Correction(mode=mode, level=config.level, low=config.low, high=config.high)
    measured = rollout.engine != "transformers" and not rollout.truncated
    return Sampler(temperature=rollout.temperature, correction=corrected, measured=measured)


def _named(config: Config, ranks: Ranks, name: str) -> ModelConfig:
    """The model's settings for another name, which `tiny:` may build, and for the type that DeepSpeed was told."""
    if name.startswith("tiny:"):
        ranks.from_first(lambda: _built_name(name))  # on one rank first: the others of its machine find it there
        name = _built_name(name)
    dtype = deepspeed_json.dtype(config.deepspeed) if config.deepspeed else None
    return config.model.model_copy(update={"name": name, "dtype": dtype or config.model.dtype})


def _load(config: Config, ranks: Ranks, model: ModelConfig) -> Loaded:
    """The model, where it is to be held: with ZeRO-3 in the CPU's memory, until DeepSpeed has cut it into slices."""
    return ranks.agree(lambda: load(model, device="cpu" if _in_slices(config) else None))


def _in_slices(config: Config) -> bool:
    """Whether no rank holds a whole model (ZeRO-3)."""
    return config.deepspeed is not None and deepspeed_json.stage(config.deepspeed) == 3


def _check_tokenizers(student: ModelConfig, teacher: ModelConfig) -> None:
    """Before any weights are read. Raises ModelError."""
    check_same_tokenizer(load_tokenizer(student), load_tokenizer(teacher), names=(student.name, teacher.name))


def _teacher(config: Config, stage: Stage, student: CausalModel, other: ModelConfig | None, ranks: Ranks) -> Teacher:
    """Who teaches; another model is cut into slices where the student is, or asked where it is served."""
    teaching = stage.teacher
    if other is None or teaching.model is None:
        return Teacher(teaching, student)
    if teaching.servers:
        served = _served(stage, student)
        named = f"served: {teaching.model}"
        return Teacher(teaching, student, served=served, fingerprint=named, close=served.scorer.close)
    sharded = _in_slices(config)
    model = ranks.agree(lambda: load_teacher(other, student, device="cpu" if sharded else None))
    fingerprint = weights_fingerprint(model)
    if not sharded:
        return Teacher(teaching, student, model, fingerprint=fingerprint)
    from opd.backends.zero import ZeroModel

    held = ZeroModel(model, deepspeed_json.reading(_filled(config, config.train, model, ranks)))
    return Teacher(teaching, student, model, fingerprint=fingerprint, look=held.look, close=held.close)


def _served(stage: Stage, student: CausalModel) -> ServedTeacher:
    teaching, distill = stage.teacher, stage.losses.distill
    key = os.environ.get(teaching.api_key_env)
    servers = [Server(url, key=key, timeout=teaching.timeout, connections=16) for url in teaching.servers]
    scorer = VllmScorer(servers, vocabulary=student.vocabulary, retries=4, restart_timeout=300.0)
    return ServedTeacher(scorer, distill.divergence.top_k or 0 if isinstance(distill, Distill) else 0)


def _engine(config: Config, model: CausalModel, ranks: Ranks, opened: ExitStack) -> RolloutEngine:
    """What generates, for a model that is whole or an engine that keeps its own copy. vLLM is imported late."""
    engine: RolloutEngine
    if config.rollout.engine == "transformers":
        return TransformersEngine(model)
    if config.rollout.engine == "vllm_server":
        from opd.launch.run.servers import server_engine

        engine = server_engine(config, model, ranks)
    else:
        from opd.engines.vllm import VllmEngine

        engine = VllmEngine(model, config.rollout.vllm, config.rollout.limits)
    opened.callback(engine.close)
    return engine


def _backend(
    config: Config, train: TrainConfig, model: CausalModel, ranks: Ranks, opened: ExitStack, *, trains: bool
) -> tuple[Backend, RolloutEngine]:
    """What trains the model, and what samples: the model itself, a copy where it is cut into slices, or vLLM."""
    total_steps = train.steps * train.updates_per_step
    if config.deepspeed is None and not trains:
        return IdleBackend(model), _engine(config, model, ranks, opened)
    if config.deepspeed is None:
        return LocalBackend(model, train, total_steps=total_steps), _engine(config, model, ranks, opened)
    from opd.backends.zero import ZeroBackend

    copied = _in_slices(config) and config.rollout.engine == "transformers"
    twin = blank_copy(model, _device()) if copied else model
    settings = _filled(config, train, model, ranks)
    backend = ZeroBackend(model, train, settings, ranks, total_steps=total_steps)
    opened.callback(backend.close)
    if not copied:
        return backend, _engine(config, model, ranks, opened)
    fill(twin, model)
    return backend, TransformersEngine(twin, refresh=partial(fill, twin, model))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _has_nvcc() -> bool:
    """Where torch would look for it: images without the toolkit may have the folder all the same."""
    if _device().type != "cuda":
        return False
    from torch.utils.cpp_extension import CUDA_HOME

    return CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").is_file()


def _filled(config: Config, train: TrainConfig, model: CausalModel, ranks: Ranks) -> dict[str, Any]:
    """The DeepSpeed settings without "auto". Raises ConfigError."""
    assert config.deepspeed is not None
    facts = deepspeed_json.Facts(
        total_steps=train.steps * train.updates_per_step,
        ranks=ranks.world_size,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        hidden_size=getattr(model.config, "hidden_size", None),
        gpu=_device().type == "cuda",
        nvcc=_has_nvcc(),
    )
    try:
        return deepspeed_json.fill(config.deepspeed, train, facts).settings
    except ValueError as error:
        raise ConfigError(f"deepspeed: {error}") from error


def _built_name(name: str) -> str:
    from opd.launch.tiny.build import build_tiny

    return str(build_tiny(name.removeprefix("tiny:")))
