"""Measures where a reviser objects: its divergence from the student where an attempt went wrong (SD-Zero, claim a).

    python benchmarks/localisation.py                       # the tiny models: the table of docs/methods.md
    python benchmarks/localisation.py --lookup RUN/export   # another model for one of the worlds

The student attempts held-out tasks. The teacher is the same model in the role of the reviser: it reads the attempt,
and that it was wrong, but neither the answer nor where the mistake is. The wrong span is what differs, in the first
action that does, from the perfect episode of the task.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from opd.envs.worlds.lookup import LookupEnv
from opd.episodes.tasks import derive_seed, task
from opd.launch.checks.loading import config_from
from opd.launch.run.build import Run, build
from opd.launch.tiny.recipes import WarmArithmetic
from opd.tracking.shading import ShadedToken, episode_picture
from opd.types import Sample, Task, Trajectory

WORLDS: dict[str, tuple[str, Callable[[], Any]]] = {
    "arithmetic": ("opd/Arithmetic-v0", WarmArithmetic),
    "lookup": ("opd/Lookup-v0", LookupEnv),
}
"""Name -> the environment that is played, and one that knows the perfect episode of its tasks."""


class Scored(NamedTuple):
    """Holds one wrong attempt."""

    sample: Sample
    nats: list[float]
    """Divergence at each sampled token."""
    wrong: list[bool]
    """True for each sampled token in the wrong span."""

    @property
    def mass(self) -> float:
        """Return the wrong span's share of the divergence."""
        return sum(n for n, wrong in zip(self.nats, self.wrong, strict=True) if wrong) / sum(self.nats)


def wrong_span(completions: Sequence[Sequence[int]], perfect: Sequence[Sequence[int]]) -> list[bool]:
    """Tell for each sampled token whether it is where the attempt went wrong.

    That is, in the first turn that departs from the perfect episode, what is not in the perfect episode's action; all
    of a turn that the perfect episode does not have.
    """
    flags: list[bool] = []
    found = False
    for number, ids in enumerate(completions):
        right = list(perfect[number]) if number < len(perfect) else []
        marked = [True] * len(ids)
        for block in SequenceMatcher(None, right, list(ids), autojunk=False).get_matching_blocks():
            marked[block.b : block.b + block.size] = [False] * block.size
        flags += [mark and not found for mark in marked]
        found = found or any(marked)
    return flags


def perfect_episode(world: Any, goal: Task, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Return the ids of the actions of the task's perfect episode."""
    world.reset(seed=goal.seed, options={"split": goal.split, "index": goal.index})
    return [encode(action) for action in world.oracle()]


def scored(run: Run, world: Any, attempts: int) -> list[Scored]:
    """Return the wrong attempts among `attempts` at held-out tasks, each token with its divergence."""
    tasks = [task(i, split="eval") for i in range(attempts)]
    groups = run.loop.player.play(tasks, group_size=1, seed=derive_seed("localisation", run.config.seed))
    chat = run.method.chat
    wrong: list[tuple[Trajectory, Sample]] = []
    for group in groups:
        wrong += [(t, s) for t in group.usable if not t.success for s in run.method.annotate(group)]
    nats = run.loop.player.divergences([sample for _, sample in wrong])
    result = []
    for (trajectory, sample), values in zip(wrong, nats, strict=True):
        perfect = perfect_episode(world, trajectory.task, lambda text: [*chat.encode(text), chat.end_id])
        span = wrong_span([turn.completion_ids for turn in trajectory.turns], perfect)
        if any(span):  # a cut episode may be right as far as it goes
            result.append(Scored(sample, values.tolist(), span))
    return result


def measure(name: str, model: str, attempts: int, folder: Path) -> str:
    """Measure one row of the table, and put a typical attempt into a picture."""
    env, world = WORLDS[name]
    config = config_from(
        {
            "method": "sd_zero",
            "model": model,
            "env": env,
            "rollout": {"max_tokens": 48, "max_length": 512},
            "train": {"threads": 1},
            "sd_zero": {"phases": "distillation"},
        }
    )
    run = build(config)
    try:
        found = scored(run, world(), attempts)
        # Of the attempts of the usual length, as one that rambles makes no picture, the one in the middle.
        usual = Counter(len(one.wrong) for one in found).most_common(1)[0][0]
        ranked = sorted((one for one in found if len(one.wrong) == usual), key=lambda one: one.mass)
        typical = ranked[len(ranked) // 2]
        folder.mkdir(parents=True, exist_ok=True)
        title = f"a wrong attempt ({name}), shaded by how much its reviser objects"
        path = folder / f"{name}.png"
        episode_picture(path, shaded(run, typical), title=title)
        Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)  # a third of the bytes
    finally:
        run.close()
    tokens = sum(len(one.wrong) for one in found)
    share = sum(sum(one.wrong) for one in found) / tokens
    mass = sum(n for one in found for n, wrong in zip(one.nats, one.wrong, strict=True) if wrong)
    mass /= sum(sum(one.nats) for one in found)
    return f"| {name} | {len(found)} of {attempts} | {tokens} | {share:.1%} | {mass:.1%} | {mass / share:.1f} |"


def shaded(run: Run, one: Scored) -> list[ShadedToken]:
    """Return the attempt, each sampled token with its divergence."""
    values = iter(one.nats)
    decode = run.loaded.tokenizer.decode
    return [
        ShadedToken(decode([i]), "completion" if sampled else "prompt", next(values) if sampled else None)
        for i, sampled in zip(one.sample.token_ids, one.sample.completion_mask, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=300, help="held-out tasks (default: 300)")
    parser.add_argument("--out", type=Path, default=Path("docs/sd_zero"), help="folder of the pictures")
    for name in WORLDS:
        parser.add_argument(f"--{name}", default=f"tiny:{name}", metavar="MODEL", help=f"default: tiny:{name}")
    arguments = vars(parser.parse_args())
    print("| world | wrong attempts | their tokens | of these in the wrong span | divergence there | times |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in WORLDS:
        print(measure(name, arguments[name], arguments["attempts"], arguments["out"]), flush=True)


if __name__ == "__main__":
    main()
