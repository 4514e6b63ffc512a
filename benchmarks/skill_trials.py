"""Tests whether a trial tells which skills help: each skill is tried, and then the teacher plays with it.

    python benchmarks/skill_trials.py                                # the tiny models: the table of docs/skills.md
    python benchmarks/skill_trials.py --worlds MODEL=ENVIRONMENT     # another model, in another world

Half of a task's episodes makes its skill by rules. The other half tries it, and the skill of another task beside it.
The worth of a skill is how much oftener the teacher solves the task with it than without, each in episodes of its own.
The table says, over all skills, how worth correlates with the trial's verdict (Spearman), and what the skills that a
verdict keeps and those that it drops are worth on average. `likelier` is the gain of right episodes alone. `lift` is
that less the gain of wrong ones, over all episodes, and over as few as a run reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from opd.episodes.tasks import derive_seed
from opd.launch.checks.loading import config_from
from opd.launch.run.build import Run, build
from opd.teachers.privileged import in_first_user_message, of_like_task, with_skill
from opd.trainers.skill_sd.config import EPISODES_EACH
from opd.trainers.skill_sd.makers import Rules, case_of, prompt_text
from opd.trainers.skill_sd.method import SkillSd
from opd.trainers.skill_sd.trials import gains
from opd.types import Message, Task, Trajectory, TrajectoryGroup

SOKOBAN = '{"id": "opd/SokobanPush-v0", "kwargs": {"level": {"size": 6, "boxes": 1, "walls": 1, "pushes": [%d, %d]}}}'
WORLDS = (
    f"tiny:sokoban-skills={SOKOBAN % (1, 3)}",
    f"tiny:sokoban-skills={SOKOBAN % (3, 5)}",
    "tiny:lookup-skills=opd/Lookup-v0",
)
VERDICTS = ("likelier", "lift", f"lift, {EPISODES_EACH} of either")


class Trial(NamedTuple):
    """Records a skill that was tried on a task."""

    own: bool
    """True if the skill is the task's own."""
    verdicts: tuple[float, ...]
    """Nats a token, by each of `VERDICTS`."""
    worth: float
    """The teacher's success with it, less that without."""


def study(model: str, env: str, *, tasks: int, members: int) -> list[Trial]:
    """Make two skills, its own and another's, for each task whose trying half is mixed and whose prompt is its own."""
    world = json.loads(env) if env.startswith("{") else {"id": env}
    run = build(
        config_from(
            {
                "method": "skill_sd",
                "model": model,
                "env": world,
                "rollout": {"max_tokens": 48, "max_length": 1024, "concurrency": 128, "group_size": members},
                "train": {"threads": 1},
            }
        )
    )
    try:
        groups = run.loop.player.play([run.loop.player.task(i) for i in range(tasks)], seed=derive_seed("trials", 0))
        makers, triers = ([_half(g, half, members // 2) for g in groups] for half in (0, 1))
        cases = [case for group in makers if (case := case_of(group, None))]
        lessons = Rules().summarise(cases)
        texts = {case.task: lesson.text for case, lesson in zip(cases, lessons, strict=True) if lesson}
        prompts = {group.task: prompt_text(group.trajectories[0].turns[0].messages) for group in groups}
        alone = {task for task, prompt in prompts.items() if [*prompts.values()].count(prompt) == 1}
        mixed = [g for g in triers if g.task in alone & set(texts) and len({e.success for e in g.usable}) == 2]
        others = _skills_of_others([group.task for group in mixed], texts, prompts)
        plain = {group.task: _success(group.usable) for group in groups}
        trials = [
            Trial(own, verdicts, worth - plain[task])
            for own, told in ((True, texts), (False, others))
            for (task, verdicts), worth in zip(
                _verdicts(run, mixed, told), _teacher_success(run, mixed, told, prompts), strict=True
            )
        ]
    finally:
        run.close()
    return trials


def _half(group: TrajectoryGroup, number: int, size: int) -> TrajectoryGroup:
    episodes = [e for e in group.usable if e.turns and e.member // size == number]
    return TrajectoryGroup(task=group.task, trajectories=episodes)


def _skills_of_others(tasks: Sequence[Task], texts: Mapping[Task, str], prompts: Mapping[Task, str]) -> dict[Task, str]:
    """Give each task the skill of the one before it, as a teacher reads that of a like task."""
    known = list(texts)
    before = {task: known[known.index(task) - 1] for task in tasks}
    return {task: of_like_task(texts[other], " ".join(prompts[other].split())[:160]) for task, other in before.items()}


def _verdicts(
    run: Run, groups: Sequence[TrajectoryGroup], texts: Mapping[Task, str]
) -> Iterator[tuple[Task, tuple[float, ...]]]:
    """Yield what each of `VERDICTS` says of each task's text, by the group's episodes."""
    assert isinstance(run.method, SkillSd)
    readings = [(episode, texts[group.task]) for group in groups for episode in group.usable]
    found = iter(gains(readings, run.method._view, run.loop.player.divergences))
    for group in groups:
        gained: dict[bool, list[float]] = {True: [], False: []}
        for episode in group.usable:
            gain = next(found)
            assert gain is not None, "an episode is too long for its teacher"
            gained[episode.success].append(gain)
        right, wrong = gained[True], gained[False]
        few = fmean(right[:EPISODES_EACH]) - fmean(wrong[:EPISODES_EACH])
        yield group.task, (fmean(right), fmean(right) - fmean(wrong), few)


def _teacher_success(
    run: Run, groups: Sequence[TrajectoryGroup], texts: Mapping[Task, str], prompts: Mapping[Task, str]
) -> list[float]:
    """Return the success of the teacher that plays each task with its text."""
    by_prompt = {prompts[group.task]: texts[group.task] for group in groups}

    def rewrite(messages: list[Message], _: object) -> list[Message]:
        text = by_prompt[prompt_text(messages)]
        return in_first_user_message(messages, lambda said: with_skill(said, skill=text))

    played = run.loop.player.scheduler.run(
        [group.task for group in groups],
        group_size=run.config.rollout.group_size,
        sampling=run.loop.player.sampling,
        seed=derive_seed("told", 0),
        rewrite=rewrite,
    )
    return [_success(group.usable) for group in played]


def _success(episodes: Sequence[Trajectory]) -> float:
    return fmean(episode.success for episode in episodes)


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Compute the correlation of ranks, ties at their mean; nan where one does not vary."""
    ranks = [np.array([np.mean(np.flatnonzero(np.sort(values) == v)) for v in values]) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1]) if all(np.ptp(r) for r in ranks) else float("nan")


def rows(world: str, trials: Sequence[Trial]) -> list[str]:
    """Make a row of the table for each verdict."""
    worths = [trial.worth for trial in trials]
    own, other = (f"{fmean(t.worth for t in trials if t.own is kind):+.1%}" for kind in (True, False))
    table = []
    for number, verdict in enumerate(VERDICTS):
        said = [trial.verdicts[number] for trial in trials]
        kept, dropped = ([w for w, v in zip(worths, said, strict=True) if (v >= 0) is kind] for kind in (True, False))
        means = " | ".join(f"{len(some)}: {fmean(some):+.1%}" if some else "none" for some in (kept, dropped))
        table.append(f"| {world} | {own}, {other} | {verdict} | {spearman(said, worths):+.2f} | {means} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=WORLDS, metavar="MODEL=ENVIRONMENT")
    parser.add_argument("--tasks", type=int, default=192, help="training tasks (default: 192)")
    parser.add_argument("--members", type=int, default=16, help="episodes of each, half for either side (default: 16)")
    options = parser.parse_args()
    print("| model | worth: own, another's | verdict | goes with worth | keeps | drops |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    for world in options.worlds:
        model, _, env = world.partition("=")
        print("\n".join(rows(model, study(model, env, tasks=options.tasks, members=options.members))), flush=True)


if __name__ == "__main__":
    main()
