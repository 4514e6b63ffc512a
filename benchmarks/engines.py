"""Measures each rollout engine on whole episodes: sampled tokens a second, and seconds an update.

    OMP_NUM_THREADS=1 python benchmarks/engines.py                         # both models, all engines
    OMP_NUM_THREADS=1 python benchmarks/engines.py --models tiny:lookup --engines vllm --concurrency 8 64

Every engine plays the same tasks under the same seeds, as many episodes at once as the column says. The tiny model
plays twice as many episodes as that; SmolLM2 plays as many, its answers cut at 8 tokens so that a CPU gets through. A
round of warm-up comes first. The whole rollout is timed, environments included, and the update by itself.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from opd.engines.base import Sampling
from opd.episodes.tasks import task
from opd.launch.checks.loading import config_from
from opd.launch.run.build import Run, build
from opd.launch.run.out import choose_out, write_config

ENGINES = ("transformers", "vllm", "vllm_server")
RUNS: dict[str, dict[str, Any]] = {
    "tiny:lookup": {"env": "opd/Lookup-v0", "rollout": {"max_tokens": 48, "max_length": 512}},
    "smollm2": {"env": "opd/Arithmetic-v0", "rollout": {"max_tokens": 8, "max_length": 256}},
}
EPISODES = {"tiny:lookup": 2, "smollm2": 1}
"""Episodes to play for each one that may run at once."""


@dataclass(frozen=True, slots=True)
class Round:
    """Holds what one round of rollouts took."""

    tokens: int
    seconds: float


def play(run: Run, *, concurrency: int, episodes: int) -> Round:
    """Play `episodes` tasks, `concurrency` at a time."""
    scheduler = run.loop.player.scheduler
    scheduler.config = run.config.rollout.model_copy(update={"concurrency": concurrency})
    since = time.perf_counter()
    groups = scheduler.run(
        [task(n, split="train") for n in range(episodes)], group_size=1, sampling=Sampling(temperature=1.0), seed=0
    )
    seconds = time.perf_counter() - since
    return Round(sum(t.completion_tokens for group in groups for t in group.trajectories), seconds)


def update_seconds(run: Run, repeats: int = 3) -> float:
    """Return the seconds of the fastest of some updates of the engine's weights."""
    best = float("inf")
    for _ in range(repeats):
        run.loop.player.version += 1
        since = time.perf_counter()
        run.loop.player.sync()
        best = min(best, time.perf_counter() - since)
    return best


def measure(model: str, engine: str, concurrencies: list[int]) -> list[str]:
    """Measure one line of the table."""
    with tempfile.TemporaryDirectory() as out:
        settings = RUNS[model]
        rollout = {**settings["rollout"], "engine": engine, "deterministic": False, "concurrency": max(concurrencies)}
        config = config_from(
            {"method": "opsd", "model": model, "env": settings["env"], "rollout": rollout, "out": f"{out}/run"}
        )
        write_config(config, choose_out(config))
        since = time.perf_counter()
        run = build(config)
        try:
            run.loop.player.sync()
            start = time.perf_counter() - since
            play(run, concurrency=max(concurrencies), episodes=2)
            rates = []
            for concurrency in concurrencies:
                done = play(run, concurrency=concurrency, episodes=max(4, EPISODES[model] * concurrency))
                rates.append(f"{done.tokens / done.seconds:.0f}")
            update = update_seconds(run)
        finally:
            run.close()
    return [model, engine, *rates, f"{update:.3f}", f"{start:.0f}"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32, 64])
    arguments = parser.parse_args()
    names = [f"{n} at once" for n in arguments.concurrency]
    print("| model | engine | " + " | ".join(names) + " | update, s | start, s | load |", flush=True)
    print("| --- " * (len(names) + 5) + "|", flush=True)
    for model in arguments.models:
        for engine in arguments.engines:
            cells = measure(model, engine, arguments.concurrency)
            print("| " + " | ".join([*cells, f"{os.getloadavg()[0]:.1f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
