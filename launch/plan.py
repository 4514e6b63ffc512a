"""What a run will do, in numbers, before it does anything: printed by `--dry-run` and ahead of training."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rich.table import Table

from opd.config import TeacherConfig
from opd.launch.checks import wandb_mode
from opd.launch.config import Config
from opd.launch.memory import Part, known_size, memory_estimate
from opd.trainers.base import Method, methods

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The numbers that follow from the settings."""

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
    """Empty where `parameters` is None."""
    notes: list[str]

    @property
    def memory_bytes(self) -> int:
        return sum(part.bytes for part in self.memory)

    def table(self) -> Table:
        """The plan for the terminal."""
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, text in self.rows():
            table.add_row(name, text)
        return table

    def rows(self) -> list[tuple[str, str]]:
        """Each line of the plan: what, and its numbers in words."""
        config, train, rollout = self.config, self.config.train, self.config.rollout
        rows = [
            ("method", f"{config.method}, teacher: {self.teacher.weights if self.teacher else 'none'}"),
            ("model", f"{config.model.name}, {self._size()}"),
            ("environment", f"{config.env.id}, at most {_count(config.env.max_turns, 'turn')}"),
            (
                "a step",
                f"{train.tasks_per_step} tasks x {rollout.group_size} = {_count(self.episodes_per_step, 'episode')}, "
                f"at most {self.tokens_per_step:,} sampled tokens ({self.tokens_per_episode:,} an episode)",
            ),
            ("micro-batches", f"at most {train.tokens_per_microbatch:,} padded tokens, student and teacher"),
            (
                "updates",
                f"{train.steps * train.updates_per_step:,} ({train.steps * self.episodes_per_step:,} episodes in all)",
            ),
            ("evaluation", self._evaluation()),
            ("memory", self._memory()),
            ("outputs", f"{self.out}/ (config.yaml, metrics.jsonl, rollouts.jsonl, curves.png, checkpoints/, export/)"),
            ("wandb", _wandb(config)),
        ]
        return [*rows, *(("note", note) for note in self.notes)]

    def _size(self) -> str:
        if self.parameters is None:
            return "size not known before it is loaded"
        return f"{self.parameters:,} parameters"

    def _evaluation(self) -> str:
        if not self.evaluations:
            return "off (eval.tasks = 0)"
        return f"{_count(self.evaluations, 'time')} on {_count(self.config.eval.tasks, 'held-out task')}"

    def _memory(self) -> str:
        if not self.memory:
            return "not estimated: the model's size is not known before it is loaded"
        lines = [f"about {self.memory_bytes / _GIB:.2f} GiB at most"]
        lines += [
            f"{part.bytes / _GIB:8.2f}  {part.name}{f' ({part.note})' if part.note else ''}" for part in self.memory
        ]
        return "\n".join(lines)


def plan(config: Config, out: Path, *, gpu: bool | None = None, ranks: int = 1) -> Plan:
    """The plan of a run; `gpu` says whether there is one, by default as far as can be seen without torch."""
    rollout, train = config.rollout, config.train
    episodes = train.tasks_per_step * rollout.group_size
    tokens = min(config.env.max_turns * rollout.max_tokens, rollout.max_length)
    teacher = teacher_of(config)
    size = known_size(config.model.name)
    return Plan(
        config=config,
        out=out,
        teacher=teacher,
        episodes_per_step=episodes,
        tokens_per_episode=tokens,
        tokens_per_step=episodes * tokens,
        evaluations=_evaluations(config),
        parameters=size.parameters if size else None,
        memory=memory_estimate(
            size,
            model=config.model,
            rollout=rollout,
            teacher=teacher,
            tokens_per_microbatch=train.tokens_per_microbatch,
            gpu=has_gpu() if gpu is None else gpu,
        )
        if size
        else [],
        notes=_notes(config),
    )


def teacher_of(config: Config) -> TeacherConfig | None:
    """Whose weights teach; None where nobody is listened to."""
    method = _method(config)
    return method.teacher if method.losses.distill else None


def _method(config: Config) -> Method:
    """The method as far as its settings go: for that it needs no tokenizer."""
    return methods()[config.method].cls(config.section, cast(Any, None))


def has_gpu() -> bool:
    """Whether torch will probably find a GPU. torch itself is not asked: importing it takes seconds."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return shutil.which("nvidia-smi") is not None


def _evaluations(config: Config) -> int:
    """Before, after, and between: the last step's evaluation is the one after."""
    if not config.eval.tasks:
        return 0
    between = (config.train.steps - 1) // config.eval.every if config.eval.every else 0
    return 2 + between


def _wandb(config: Config) -> str:
    mode = wandb_mode(config.tracking)
    return mode if mode == "disabled" else f"{mode}, project {config.tracking.project}"


def _notes(config: Config) -> list[str]:
    """What is allowed and may still surprise."""
    rollout, train = config.rollout, config.train
    notes = []
    if rollout.top_p < 1 or rollout.top_k:
        notes.append(
            "rollout.top_p and rollout.top_k narrow what is sampled; the loss still compares whole distributions"
        )
    temperature = getattr(config.section, "temperature", None)
    if temperature is not None and temperature != rollout.temperature:
        notes.append(
            f"the loss is taken at {config.method}.temperature = {temperature:g}, "
            f"but rollout.temperature = {rollout.temperature:g} drew the tokens"
        )
    policy = _method(config).losses.policy
    if policy and train.updates_per_step == 1 and (policy.clip_low or policy.clip_high):
        notes.append("with one update a step all ratios are 1, and no clip acts (train.updates_per_step)")
    updates = train.steps * train.updates_per_step
    if train.warmup_steps >= updates:
        notes.append(f"train.warmup_steps = {train.warmup_steps} never ends in {updates} updates")
    tiny = config.model.name.removeprefix("tiny:")
    if tiny != config.model.name and tiny not in config.env.id.lower():
        notes.append(f"the model was warmed up for {tiny}, but acts in {config.env.id}")
    return notes


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
