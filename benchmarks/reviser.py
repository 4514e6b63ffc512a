"""Is a model a better reviser than it is a solver? Without that, SD-Zero has nothing to teach.

    python benchmarks/reviser.py                                # the tiny models: the table of docs/methods.md
    python benchmarks/reviser.py --worlds MODEL=ENVIRONMENT     # another model, in another world

Every training task is attempted once. The wrong attempts are then shown to the same model with the cue, and it revises;
beside that, it plays the same tasks once more without being told anything.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from opd.episodes.tasks import derive_seed
from opd.launch.checks.loading import config_from
from opd.launch.run.build import Run, build
from opd.tracking.intervals import wilson
from opd.trainers.sd_zero.method import Distilling
from opd.types import Task, Trajectory

WORLDS = (
    "tiny:arithmetic=opd/Arithmetic-v0",
    "tiny:lookup=opd/Lookup-v0",
    "tiny:countdown=opd/Countdown-v0",
    "tiny:sokoban=opd/SokobanPush-v0",
)


def measure(model: str, env: str, tasks: int) -> str:
    """Measure one row of the table."""
    run = build(
        config_from(
            {
                "method": "sd_zero",
                "model": model,
                "env": env,
                "rollout": {"max_tokens": 48, "max_length": 1024, "concurrency": 128},
                "train": {"threads": 1},
                "sd_zero": {"phases": "distillation"},
            }
        )
    )
    try:
        attempts = _play(run, [run.loop.player.task(i) for i in range(tasks)], "attempts")
        wrong = {task: attempt for task, attempt in attempts.items() if not attempt.success}
        again = _play(run, list(wrong), "again")
        revised = _play(run, list(wrong), "revisions", wrong)
    finally:
        run.close()
    return f"| {env} | {len(wrong)} of {len(attempts)} | {_share(again)} | {_share(revised)} |"


def _play(
    run: Run, tasks: Sequence[Task], seed: str, before: dict[Task, Trajectory] | None = None
) -> dict[Task, Trajectory]:
    """Play an episode of each task; with an attempt `before` it, a revision of that."""
    assert isinstance(run.method, Distilling)
    reviser = run.method.reviser
    opening = None
    if before is not None:

        def opening(task: Task, *_: object) -> list[int]:
            return reviser.opening(before[task], before[task].segments()[0])

    groups = run.loop.player.play(tasks, seed=derive_seed(seed, run.config.seed), group_size=1, opening=opening)
    return {t.task: t for group in groups for t in group.usable}


def _share(episodes: dict[Task, Trajectory]) -> str:
    solved = sum(episode.success for episode in episodes.values())
    low, high = wilson(solved, len(episodes))
    return f"{solved / len(episodes):.1%} ({low:.1%} to {high:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=WORLDS, metavar="MODEL=ENVIRONMENT")
    parser.add_argument("--tasks", type=int, default=400, help="training tasks (default: 400)")
    options = parser.parse_args()
    print("| world | wrong attempts | right when tried again | right when revised |")
    print("| --- | ---: | ---: | ---: |")
    for world in options.worlds:
        model, _, env = world.partition("=")
        print(measure(model, env, options.tasks), flush=True)


if __name__ == "__main__":
    main()
