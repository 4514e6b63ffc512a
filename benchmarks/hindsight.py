"""Measures what a teacher that looks back can do: the model acts with a sibling's success in its prompt (SDPO, SRPO).

    python benchmarks/hindsight.py FILE.yaml     # the model of a comparison, as benchmarks/methods.py reads it
    python benchmarks/hindsight.py benchmarks/methods.yaml --tasks 150     # the table of docs/comparison.md

Each held-out task is played by a group at the training temperature. Where some member is right and another is not,
the task is played once more by each of four actors, greedily: the plain student; one that is shown the right member's
episode, as the teacher is; one that is shown what the environment said to the first wrong member that was told
anything; and one that is shown both. A teacher that does no better than the student has nothing to teach.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods import read

from opd.engines.base import Sampling
from opd.episodes.tasks import derive_seed, task
from opd.errors import ConfigError, OpdError
from opd.launch.run.build import Run, build
from opd.teachers.privileged import in_first_user_message, with_demonstration, with_feedback
from opd.tracking.intervals import wilson
from opd.trainers.parts.hindsight import HindsightMethod
from opd.types import Message, Task, TrajectoryGroup


@dataclass(frozen=True, slots=True)
class Actor:
    """Says what an actor is shown."""

    demonstration: bool
    feedback: bool

    def reads(self, messages: list[Message], shown: tuple[str, str]) -> list[Message]:
        """Return the first messages with (demonstration, feedback) in them, as far as this actor sees them."""
        demonstration, feedback = shown
        if self.demonstration:
            messages = in_first_user_message(messages, lambda prompt: with_demonstration(prompt, demonstration))
        if self.feedback and feedback:
            messages = in_first_user_message(messages, lambda prompt: with_feedback(prompt, feedback))
        return messages


ACTORS = {
    "plain": Actor(demonstration=False, feedback=False),
    "with a demonstration": Actor(demonstration=True, feedback=False),
    "with feedback": Actor(demonstration=False, feedback=True),
    "with both": Actor(demonstration=True, feedback=True),
}


def to_show(method: HindsightMethod, group: TrajectoryGroup) -> tuple[str, str] | None:
    """Return the demonstration and the feedback that wrong members of a group would be corrected with."""
    wrong = [t for t in group.usable if not method.is_right(t)]
    known = [method.hindsight(t, group.usable) for t in wrong]
    told = next(("\n".join(k.feedback.values()) for k in known if k.feedback), "")
    return (known[0].demonstration, told) if known and known[0].demonstration is not None else None


def solved(run: Run, actor: Actor, shown: dict[Task, tuple[str, str]]) -> tuple[int, int]:
    """Count the tasks that an actor solves, and those that it plays."""
    chat = run.method.chat

    def opening(goal: Task, messages: list[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        return chat.start(actor.reads(messages, shown[goal]), tools)

    seed = derive_seed("hindsight", run.config.seed)
    groups = run.held_out.run(list(shown), group_size=1, sampling=Sampling(temperature=0.0), seed=seed, opening=opening)
    return sum(t.success for g in groups for t in g.trajectories), len(groups)


def measure(run: Run, tasks: int) -> list[str]:
    """Measure the rows of the table."""
    assert isinstance(run.method, HindsightMethod)
    goals = [task(i, split="eval") for i in range(tasks)]
    groups = run.loop.player.play(goals, seed=derive_seed("hindsight", run.config.seed))
    shown = {group.task: pair for group in groups if (pair := to_show(run.method, group)) is not None}
    episodes = [t for group in groups for t in group.usable]
    right = sum(t.success for t in episodes) / len(episodes)
    told = sum(bool(feedback) for _, feedback in shown.values())
    if not shown:
        raise ConfigError(f"of {tasks} groups none is mixed: there is nothing to show")
    rows = [f"sampled: {right:.1%} right; {len(shown)} of {tasks} groups mixed, {told} of these with feedback"]
    for name, actor in ACTORS.items():
        count, played = solved(run, actor, shown)
        low, high = wilson(count, played)
        rows.append(f"| {name} | {count / played:.1%} ({low:.1%} to {high:.1%}) |")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--method", default="SRPO", help="label of the comparison's method (default: SRPO)")
    parser.add_argument("--tasks", type=int, default=100, help="held-out tasks (default: 100)")
    options = parser.parse_args(arguments)
    comparison = read(options.file)
    run = build(comparison.config(options.method, comparison.seeds[0]))
    try:
        print("\n".join(measure(run, options.tasks)), flush=True)
    finally:
        run.close()


if __name__ == "__main__":
    try:
        main()
    except OpdError as problem:
        raise SystemExit(str(problem)) from None
