"""From checked settings to the parts of a run. The only place where everything meets.

Each kind of part is made in a file of its own: models, backends, teachers, servers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from opd.engines.base import RolloutEngine, Sampling
from opd.engines.weights import ModelWeights
from opd.envs.adapters import workers_for
from opd.envs.factory import make_for, module_of
from opd.episodes.config import EnvConfig, RolloutConfig
from opd.episodes.episode import PromptRewrite
from opd.episodes.scheduler import RolloutScheduler
from opd.episodes.tasks import derive_seed, task
from opd.errors import Interrupted
from opd.grading import Trainer
from opd.launch.checks.text import tool_format
from opd.launch.run.backends import make_backend
from opd.launch.run.models import check_tokenizers, check_top_k, load_held, named_model
from opd.launch.run.score import Score
from opd.launch.run.teachers import make_teacher
from opd.launch.settings.config import Config
from opd.losses import Correction, Sampler
from opd.models.causal import CausalModel
from opd.models.chat import ChatFormat
from opd.models.config import ModelConfig
from opd.models.loading import Loaded, export, load_tokenizer
from opd.models.sharding import blank_copy, collected, is_sharded, whole
from opd.ranks.ranks import Ranks
from opd.trainers.loop.loop import Loop
from opd.trainers.loop.method import Method
from opd.trainers.loop.play import Player
from opd.trainers.loop.reading import Models
from opd.trainers.loop.stage import Stage
from opd.types import Trajectory, TrajectoryGroup


@dataclass(slots=True, kw_only=True)
class Run:
    """The parts of one stage of a run, ready to train."""

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

        Raises Interrupted, on all ranks, once `stopped` holds on any of them.
        """
        config, ranks = self.config, self.loop.player.ranks
        self.loop.player.sync()
        own: list[TrajectoryGroup] | None = None
        with suppress(Interrupted):
            own = self.held_out.run(
                ranks.share([task(config.eval.first + i, split="eval") for i in range(config.eval.tasks)]),
                group_size=1,
                sampling=Sampling(temperature=config.eval.temperature),
                seed=derive_seed("eval", config.seed),
                rewrite=rewrite,
                on_finish=on_finish,
                stopped=stopped,
                trainer=Trainer(step=self.loop.player.version, steps=config.train.steps),
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
    """Make the run and leave with `opened` what has to be closed. The order counts: weights are drawn from the seed."""
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    torch.manual_seed(config.seed)  # adapters are initialised at random
    planned = _only_played(config) if stage is None else config.stages[stage]
    loaded, other = _load_student(config, ranks, planned, str(model) if model else config.model.name)
    check_top_k(config, loaded.model.vocabulary)
    chat = ChatFormat(
        loaded.tokenizer,
        template_kwargs=config.rollout.chat_template_kwargs,
        on_rewrite=config.rollout.on_rewrite,
        stop_ids=loaded.stop_ids,
        form=tool_format(config.env),
        date=config.chat.day,
    )
    method: Method = planned.make(chat)
    train = planned.settings(config.train)
    blank = blank_copy(loaded.model, "meta") if config.backend == "deepspeed" else None
    backend, engine = make_backend(config, train, loaded.model, ranks, opened, trains=planned.trains)
    rollouts, held_out = _make_schedulers(config, engine, chat, opened)
    teacher = make_teacher(config, planned, loaded.model, other, ranks)
    opened.callback(teacher.close)
    models = Models(
        student=loaded.model,
        teacher=teacher,
        backend=backend,
        sampler=sampler_of(config.rollout),
        pad_id=loaded.pad_id,
        tokens_per_microbatch=train.tokens_per_microbatch,
    )
    player = _make_player(config, planned, models, rollouts)
    loop = Loop(method=method, player=player, weighting=config.weighting)
    return Run(config=config, loaded=loaded, method=method, loop=loop, held_out=held_out, blank=blank)


def _only_played(config: Config) -> Stage:
    """Return a stage for a run that is evaluated and not trained: nobody teaches."""
    return Stage(make=partial(config.spec.cls, config.section))


def _make_player(config: Config, stage: Stage, models: Models, scheduler: RolloutScheduler) -> Player:
    """Join what a method may ask of the run."""
    student = models.student
    return Player(
        stage=stage,
        models=models,
        scheduler=scheduler,
        weights=ModelWeights(student, gather=whole if any(map(is_sharded, student.parameters())) else None),
        rollout=config.rollout,
        train=stage.settings(config.train),
        seed=config.seed,
        settings=config.fingerprint,
    )


def _load_student(config: Config, ranks: Ranks, planned: Stage, student: str) -> tuple[Loaded, ModelConfig | None]:
    """Load the model that acts, and return it with the settings of the stage's other model, if it has one.

    The model that acts is `student`, or the one that the stage borrows, with the student's tokenizer.
    """
    own = named_model(config, ranks, student)
    name = planned.model or planned.teacher.model
    other = named_model(config, ranks, name) if name else None
    if other is not None:
        ranks.agree(lambda: check_tokenizers(own, other))
    if planned.model is None or other is None:
        return load_held(config, ranks, own), other
    loaded = load_held(config, ranks, other.model_copy(update={"lora": None}))
    return replace(loaded, tokenizer=load_tokenizer(own)), other


def _make_schedulers(
    config: Config, engine: RolloutEngine, chat: ChatFormat, opened: ExitStack
) -> tuple[RolloutScheduler, RolloutScheduler]:
    """Return who plays the tasks of training, and who plays the held-out ones."""
    scheduler = partial(
        RolloutScheduler,
        engine,
        chat,
        config=config.rollout,
        max_turns=config.env.max_turns,
        workers=workers_of(config.env),
        preload=["opd.envs.factory", module_of(config.env.id)],
    )
    make = partial(make_for, config.env.id, tool_format=chat.format.name, starts_thinking=chat.starts_thinking)
    rollouts = scheduler(make_env=partial(make, config.env.kwargs))
    opened.callback(rollouts.close)
    held_out = scheduler(make_env=partial(make, {**config.env.kwargs, **config.eval.env_kwargs}))
    opened.callback(held_out.close)
    return rollouts, held_out


def workers_of(env: EnvConfig) -> Literal["threads", "processes"]:
    """Say where environments live: as set, or as fits the environment."""
    return workers_for(env.id, env.kwargs) if env.workers == "auto" else env.workers


def sampler_of(rollout: RolloutConfig) -> Sampler:
    """Say what the losses know of the rollouts. A sampler that is not the network that trains is always measured."""
    mode, config = rollout.correction_mode, rollout.correction
    corrected = None if mode == "none" else Correction(mode=mode, level=config.level, low=config.low, high=config.high)
    measured = rollout.engine != "transformers" and not rollout.truncated
    return Sampler(temperature=rollout.temperature, correction=corrected, measured=measured)
