"""How many episodes and sequences a run plays, collects and trains on: in a step, at once, and in all."""

from __future__ import annotations

from opd.backends.config import TrainConfig
from opd.launch.settings.config import Config
from opd.trainers.loop.stage import Stage


def trained_in(config: Config) -> list[tuple[Stage, TrainConfig]]:
    """Return the stages that have steps, each with its own training settings."""
    return [(stage, stage.settings(config.train)) for stage in config.stages if stage.trains]


def episodes_per_step(config: Config) -> int:
    """Count the episodes of a step on all ranks, of the stage that plays most; 0 where steps play none."""
    played = [train.tasks_per_step for stage, train in trained_in(config) if not stage.on_dataset]
    return max(played, default=0) * config.rollout.group_size


def episodes_in_all(config: Config) -> int:
    """Count the episodes that the run's steps play."""
    played = [train for stage, train in trained_in(config) if not stage.on_dataset]
    return sum(train.steps * train.tasks_per_step for train in played) * config.rollout.group_size


def episodes_at_once(config: Config, ranks: int) -> int:
    """Count the most episodes that one rank plays at once: of a step, an evaluation or a stage that collects.

    Ranks share tasks, and a task's episodes stay together.
    """
    size = config.rollout.group_size
    rounds = [(train.tasks_per_step, size) for stage, train in trained_in(config) if not stage.on_dataset]
    rounds += [(stage.plays, max(size, stage.played_again)) for stage in config.stages]
    rounds.append((config.eval.tasks, 1))
    return min(config.rollout.concurrency, max(-(-tasks // ranks) * each for tasks, each in rounds))


def step_in_words(config: Config, tokens: int) -> str:
    """Say what a step takes, where `tokens` are the most that an episode samples; a line for each kind of step."""
    lines = {}
    for number, stage in enumerate(config.stages, start=1):
        if stage.trains:
            lines[number] = _step_of(stage, stage.settings(config.train), config.rollout.group_size, tokens)
    if len(set(lines.values())) == 1:
        return next(iter(lines.values()))
    return "\n".join(f"stage {number}: {line}" for number, line in lines.items())


def _step_of(stage: Stage, train: TrainConfig, size: int, tokens: int) -> str:
    if stage.on_dataset:
        return f"{counted(train.tasks_per_step, 'sequence')} of those that were stored"
    episodes = train.tasks_per_step * size
    return (
        f"{train.tasks_per_step} tasks x {size} = {counted(episodes, 'episode')}, at most {episodes * tokens:,} "
        f"sampled tokens ({tokens:,} an episode)"
    )


def ahead_in_words(config: Config) -> str:
    """Say which episodes are played before a stage's first step; nothing where none are."""
    size = config.rollout.group_size
    return "\n".join(
        f"stage {number}: {stage.plays:,} tasks x {size} = {counted(stage.plays * size, 'episode')}"
        f"{f' of {stage.model}' if stage.model else ''}"
        for number, stage in enumerate(config.stages, start=1)
        if stage.plays
    )


def counted(number: int, what: str) -> str:
    """Write a number of things: `1 turn`, `1,200 turns`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
