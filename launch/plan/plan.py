"""What a run will do, in numbers, before it does anything: printed by `--dry-run` and ahead of training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from opd.backends import deepspeed_json
from opd.episodes.config import RolloutConfig
from opd.launch.checks.tracking import wandb_mode, wandb_project
from opd.launch.plan import counts, scaling
from opd.launch.plan.counts import counted
from opd.launch.plan.memory import ModelSize, Part, has_gpu, known_size, memory_estimate
from opd.launch.plan.storage import Storage, storage
from opd.launch.settings.config import Config
from opd.losses import Distill
from opd.secrets import redact
from opd.teachers.config import TeacherConfig

if TYPE_CHECKING:
    from opd.models.check import Report

_GIB = 2**30
_TEXT = ("weights", "quantisation", "positions", "format", "ends", "rewrites", "date")
"""The rows of the check of a model that change what a run does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The numbers of a run that follow from its settings."""

    config: Config
    out: Path
    teacher: TeacherConfig | None
    episodes_per_step: int
    tokens_per_episode: int
    """At most this many are sampled in one episode."""
    tokens_per_step: int
    evaluations: int
    parameters: int | None
    """Of the model; None where it is not known without loading or downloading."""
    memory: list[Part]
    """Of one rank's device; empty where `parameters` is None."""
    ranks: int
    host: list[Part]
    """What an offload keeps in the machine's memory for one rank."""
    traffic: list[Part]
    """What one rank sends in a step."""
    text: list[tuple[str, str]]
    """How the model's turns are written and read; empty where it was not looked at."""
    notes: list[str]
    storage: Storage | None
    """Of the run's disk; None where it was not looked at."""
    filled: list[str]
    """The values that replaced "auto" in the DeepSpeed JSON, and which of its settings replace ours."""

    @property
    def memory_bytes(self) -> int:
        return sum(part.bytes for part in self.memory)

    def table(self) -> Table:
        """Make the table that the terminal shows."""
        return as_table(self.rows())

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the plan: a name, and its numbers in words."""
        config, train, rollout = self.config, self.config.train, self.config.rollout
        rows = [
            ("method", f"{config.method}, teacher: {self.teacher.weights if self.teacher else 'none'}"),
            ("model", f"{config.model.name}, {self._size()}"),
            *self.text,
            ("environment", f"{config.env.id}, at most {counted(config.env.max_turns, 'turn')}"),
            *([("ahead", ahead)] if (ahead := counts.ahead_in_words(config)) else []),
            ("a step", counts.step_in_words(config, self.tokens_per_episode)),
            ("rollouts", _rollouts_in_words(rollout)),
            ("micro-batches", f"at most {train.tokens_per_microbatch:,} padded tokens, student and teacher"),
            ("updates", self._updates()),
            ("evaluation", self._evaluation()),
            ("memory", self._memory()),
            *self._processes(),
            *(self.storage.rows(config) if self.storage else []),
            ("outputs", f"{self.out}/ (config.yaml, metrics.jsonl, rollouts.jsonl, curves.png, checkpoints/, export/)"),
            ("wandb", _wandb_in_words(config)),
        ]
        notes = [*self.notes, *(self.storage.notes(config) if self.storage else [])]
        return [*rows, *(("note", note) for note in notes)]

    def _size(self) -> str:
        if self.parameters is None:
            return "size not known before it is loaded"
        return f"{self.parameters:,} parameters"

    def _updates(self) -> str:
        config = self.config
        made = [steps * config.train.updates_per_step for steps in config.stage_steps if steps]
        if len(made) > 1:
            return f"{sum(made):,} in {len(made)} stages ({' + '.join(f'{count:,}' for count in made)})"
        episodes, stop_at = counts.episodes_in_all(config), config.eval.stop_at
        most = "" if stop_at is None else f", or until {stop_at:.1%} of held-out tasks are solved"
        return f"{made[0]:,} ({f'{episodes:,} episodes in all' if episodes else 'no episodes'}){most}"

    def _evaluation(self) -> str:
        if not self.evaluations:
            return "off (eval.tasks = 0)"
        return f"{counted(self.evaluations, 'time')} on {counted(self.config.eval.tasks, 'held-out task')}"

    def _memory(self) -> str:
        if not self.memory:
            return "not estimated: the model's size is not known before it is loaded"
        where = " on each of them" if self.ranks > 1 else ""
        return _with_parts(f"about {self.memory_bytes / _GIB:.2f} GiB at most{where}", self.memory)

    def _processes(self) -> list[tuple[str, str]]:
        """Return the lines about DeepSpeed and its ranks; none without DeepSpeed."""
        if self.config.deepspeed is None:
            return []
        stage = deepspeed_json.stage(self.config.deepspeed)
        rows = [("backend", f"DeepSpeed, ZeRO-{stage}, {self.ranks} {'process' if self.ranks == 1 else 'processes'}")]
        if self.host:
            rows.append(("offloaded", _with_parts("by each process", self.host)))
        if self.traffic:
            total = sum(part.bytes for part in self.traffic) / _GIB
            rows.append(("traffic", _with_parts(f"about {total:.2f} GiB sent by each process in a step", self.traffic)))
        return [*rows, ("deepspeed", "\n".join(self.filled))]


def as_table(rows: Iterable[tuple[str, str]]) -> Table:
    """Make a table of two columns, names and texts, that shows every text as it is."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(Text(redact(name)), Text(redact(text)))  # before it is wrapped
    return table


def plan(
    config: Config,
    out: Path,
    *,
    gpu: bool | None = None,
    ranks: int = 1,
    text: Report | None = None,
    disk: bool = False,
) -> Plan:
    """Make the plan of a run. `gpu`: plan for a GPU; None: plan for what `has_gpu` finds.

    `text` is what the model's template was found to do (`opd.launch.checks.text`). With `disk`, the run's disk is
    looked at, and written to for a moment.
    """
    rollout = config.rollout
    episodes = counts.episodes_per_step(config)
    tokens = min(config.env.max_turns * rollout.max_tokens, rollout.max_length)
    teacher = teacher_of(config)
    size = known_size(config.model.name)
    gpu = has_gpu() if gpu is None else gpu
    memory, host, sent = _parts_of_rank(config, size, teacher, gpu=gpu, ranks=ranks) if size else ([], [], [])
    return Plan(
        config=config,
        out=out,
        teacher=teacher,
        episodes_per_step=episodes,
        tokens_per_episode=tokens,
        tokens_per_step=episodes * tokens,
        evaluations=_count_evaluations(config),
        parameters=size.parameters if size else None,
        memory=memory,
        ranks=ranks,
        host=host,
        traffic=sent,
        text=[row for row in text.rows if row[0] in _TEXT] if text else [],
        notes=[*_notes(config), *(text.notes if text else [])],
        storage=storage(config, out, gpu=gpu) if disk else None,
        filled=_notes_on_json(config, size, gpu=gpu, ranks=ranks),
    )


def _parts_of_rank(
    config: Config, size: ModelSize, teacher: TeacherConfig | None, *, gpu: bool, ranks: int
) -> tuple[list[Part], list[Part], list[Part]]:
    """Return, for one rank, the parts of its device's memory, of its machine's memory, and of what it sends."""
    rollout, train = config.rollout, config.train
    if config.deepspeed is None:
        memory = memory_estimate(
            size,
            model=config.model,
            rollout=rollout,
            teacher=teacher,
            tokens_per_microbatch=train.tokens_per_microbatch,
            episodes=counts.episodes_at_once(config, ranks),
            gpu=gpu,
        )
        return memory, [], []
    episodes = counts.episodes_per_step(config) or max(t.tasks_per_step for _, t in counts.trained_in(config))
    work = scaling.Work(
        model=config.model.model_copy(update={"dtype": deepspeed_json.dtype(config.deepspeed) or config.model.dtype}),
        rollout=rollout,
        teacher=teacher,
        tokens_per_microbatch=train.tokens_per_microbatch,
        episodes=counts.episodes_at_once(config, ranks),
        embedded=rollout.engine == "transformers",
        gpu=gpu,
    )
    sharding = scaling.Sharding.of(config.deepspeed, ranks)
    tokens = (2 if teacher else 1) * episodes * rollout.max_length / ranks / train.updates_per_step
    microbatches = max(1, math.ceil(tokens / train.tokens_per_microbatch))
    return (
        scaling.device_memory(size, work, sharding),
        scaling.host_memory(size, work, sharding),
        scaling.traffic(size, work, sharding, microbatches=microbatches, updates=train.updates_per_step),
    )


def _notes_on_json(config: Config, size: ModelSize | None, *, gpu: bool, ranks: int) -> list[str]:
    """Return the notes of `deepspeed_json.fill` on the sizes known so far; the run itself asks its loaded model."""
    if config.deepspeed is None:
        return []
    auto = "bfloat16" if gpu else "float32"
    facts = deepspeed_json.Facts(
        total_steps=config.train.steps * config.train.updates_per_step,
        ranks=ranks,
        dtype=deepspeed_json.dtype(config.deepspeed) or (auto if config.model.dtype == "auto" else config.model.dtype),
        hidden_size=size.hidden if size else None,
        gpu=gpu,
    )
    return deepspeed_json.fill(config.deepspeed, config.train, facts).notes


def _with_parts(head: str, parts: list[Part]) -> str:
    lines = [f"{part.bytes / _GIB:8.2f}  {part.name}{f' ({part.note})' if part.note else ''}" for part in parts]
    return "\n".join([head, *lines])


def teacher_of(config: Config) -> TeacherConfig | None:
    """Return the teacher of the first stage that asks one; None if no stage does."""
    return next((stage.teacher for stage in config.stages if stage.listens), None)


def _count_evaluations(config: Config) -> int:
    """Count the evaluations: before, after every stage (which is at its last step), and between."""
    if not config.eval.tasks:
        return 0
    ends, every = set(accumulate(config.stage_steps)) - {0}, config.eval.every
    between = (max(ends) - 1) // every - sum(end % every == 0 for end in ends - {max(ends)}) if every else 0
    return 1 + len(ends) + between


def _rollouts_in_words(rollout: RolloutConfig) -> str:
    """Say which engine samples, and how samples are corrected for its distance from the model that trains."""
    if rollout.engine == "transformers":
        who = "transformers: the model that trains"
    elif rollout.engine == "vllm":
        who = "vLLM in this process"
    else:
        own = f"{counted(rollout.vllm.replicas, 'server')} that each process of the run starts and ends"
        who = f"vLLM: {', '.join(rollout.vllm.servers) or own}"
    by, high, low = f"by {rollout.correction.level}", rollout.correction.high, rollout.correction.low
    what = {
        "none": "no importance weights",
        "truncate": f"importance weights {by}, at most {high:g} (1 where sampler and trainer agree)",
        "mask": f"importance weights {by}, what is outside of {low:g} to {high:g} is dropped",
    }
    return f"{who}; {what[rollout.correction_mode]}"


def _wandb_in_words(config: Config) -> str:
    mode = wandb_mode(config.tracking)
    return mode if mode == "disabled" else f"{mode}, project {wandb_project(config.tracking)}"


def _notes(config: Config) -> list[str]:
    """Return notes on settings that are allowed and may still surprise."""
    rollout, train = config.rollout, config.train
    notes = _notes_on_rollouts(rollout)
    policy = next((stage.losses.policy for stage in config.stages if stage.losses.policy), None)
    distill = next((stage.losses.distill for stage in config.stages if stage.losses.distill), None)
    temperature = distill.divergence.temperature if isinstance(distill, Distill) else None
    if temperature is not None and temperature != rollout.temperature:
        key = "divergence.temperature" if hasattr(config.section, "divergence") else "temperature"
        notes.append(
            f"the loss is taken at {config.spec.name}.{key} = {temperature:g}, "
            f"but rollout.temperature = {rollout.temperature:g} drew the tokens"
        )
    notes += dict.fromkeys(note for stage in config.stages for note in stage.notes(rollout))
    bounded = (policy and (policy.clip_low or policy.clip_high)) or (distill and distill.max_ratio)
    if bounded and train.updates_per_step == 1:
        notes.append("with one update a step all ratios are 1, and no clip acts (train.updates_per_step)")
    teacher = teacher_of(config)
    if teacher and teacher.weights == "live" and train.updates_per_step > 1:
        notes.append(
            f"a live teacher is another one at each of a step's {train.updates_per_step} updates; the one of the whole "
            f"step is teacher.weights = synced, every = {train.updates_per_step}"
        )
    updates = train.steps * train.updates_per_step
    if train.warmup_steps >= updates:
        notes.append(f"train.warmup_steps = {train.warmup_steps} never ends in {updates} updates")
    tiny = config.model.name.removeprefix("tiny:")
    if tiny != config.model.name and tiny.split("-")[0] not in config.env.id.lower():
        notes.append(f"the model was warmed up for {tiny}, but acts in {config.env.id}")
    return notes


def _notes_on_rollouts(rollout: RolloutConfig) -> list[str]:
    """Return the notes that follow from `rollout` alone."""
    notes = []
    if rollout.top_p < 1 or rollout.top_k:
        notes.append(
            "rollout.top_p and rollout.top_k narrow what is sampled; the loss still compares whole distributions"
        )
    if rollout.engine == "vllm":
        share = f"{rollout.vllm.gpu_memory_utilization:.0%}"
        notes.append(f"vLLM takes {share} of a GPU's memory besides (rollout.vllm.gpu_memory_utilization)")
    if rollout.engine != "transformers" and rollout.deterministic:
        notes.append(
            "rollout.deterministic makes every turn wait for the slowest; with vLLM, set it to false for a batch that "
            "is never empty (draws still follow from the seed)"
        )
    return notes
