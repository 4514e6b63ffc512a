"""`opd demo`: a small tool agent gets better by on-policy self-distillation, beside a control that does not.

Both runs start from the same warm-started model. In one the teacher sees the plan that solves each task; in
the control it sees nothing extra, so that whatever such training does by itself shows there. The agent trains until
it solves nearly all of some held-out tasks, and its control for as many steps; both are reported on others, played
once.
"""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from opd.episodes.tasks import derive_seed, task
from opd.errors import OpdError
from opd.launch.checks.loading import config_from
from opd.launch.cli.demo_results import Outcome, draw, made_by, table
from opd.launch.run.build import Run, build
from opd.launch.run.lock import RunLock
from opd.launch.run.score import Score
from opd.launch.run.training import train
from opd.launch.settings.reader import holds_run
from opd.launch.tiny.build import build_tiny
from opd.tracking.console import LastingConsole
from opd.tracking.shading import ShadedToken, episode_picture, shade_episode

TASKS = 300
"""What is reported is measured on these, the first held-out tasks."""
CHECKED, EVERY, ENOUGH = 200, 10, 0.99
"""Training ends by as many others, played every so many steps, once this share of them is solved."""
STEPS = 150
"""At most."""
TEACHERS = {"opsd": "plan", "control": None}
"""The privileged text that the teacher of each run sees."""


def settings(seed: int, run: str, *, model: Path | str, out: Path, steps: int | None = None) -> dict[str, Any]:
    """Return the settings of a run, as its YAML would hold them: of `steps`, or as many as it takes."""
    stops = {"every": EVERY, "stop_at": ENOUGH}
    return {
        "method": "opsd",
        "seed": seed,
        "out": str(out),
        "model": str(model),
        "env": {"id": "opd/Lookup-v0"},
        "rollout": {"max_tokens": 48, "max_length": 512, "concurrency": TASKS},
        "train": {
            "steps": steps or STEPS,
            "tasks_per_step": 32,
            "lr": 2e-3,
            # The control's first gradients are rounding errors, which Adam takes for as large as any.
            "warmup_steps": 10,
            # So small a model gains little from a second thread, and loses much beside any other busy process.
            "threads": 1,
        },
        "eval": {"tasks": CHECKED, "first": TASKS, **({"every": 2 * EVERY} if steps else stops)},
        "opsd": {"privileged": TEACHERS[run], "divergence": {"clip": None}},
    }


def demo(*, seeds: int, out: Path) -> list[Outcome]:
    """Train `seeds` agents and their controls; print a table, an episode, and where the pictures are.

    What an earlier call has finished in the same folder is not run again.

    Raises OpdError when an agent is already good before training: then there is nothing to show; LockError when
    another process shows its own there.
    """
    lock = RunLock(out)
    try:
        return _demo(seeds=seeds, out=out)
    finally:
        lock.release()


def _demo(*, seeds: int, out: Path) -> list[Outcome]:
    console = LastingConsole()
    since = time.monotonic()
    outcomes = []
    for seed in range(seeds):
        folder = out / f"seed-{seed}"
        console.rule(f"seed {seed}: a small tool agent" if seeds > 1 else "a small tool agent")
        console.print("[bold]1/3[/] a model of half a million parameters, warm-started on this machine")
        outcomes.append(_one_seed(console, seed, build_tiny("lookup", seed=seed), folder))
    console.rule("what it learned")
    console.print(table(outcomes, tasks=TASKS))
    picture = out / "curves.png"
    draw(picture, out / "seed-0")
    console.print(f"curves:  {picture}\nepisode: {out / 'seed-0' / 'episode.png'}\nruns:    {out}/seed-*/")
    console.print(f"[dim]{time.monotonic() - since:.0f} s on {os.cpu_count()} cores[/]")
    return outcomes


def _one_seed(console: Console, seed: int, model: Path, folder: Path) -> Outcome:
    """Do what is left to do of one seed."""
    of = partial(settings, seed, model=model)
    outcome = Outcome.kept(
        seed, folder / "outcome.json", made_by(model, [of(name, out=folder / name) for name in TEACHERS])
    )
    if outcome.is_whole:
        console.print(f"[dim]kept from an earlier call; to train it again, delete {folder}[/]")
    if "teacher" not in outcome.scores:
        _look_at_untrained(console, outcome, of("opsd", out=folder / "opsd"), folder)
    if outcome.scores["before"].rate > 0.7:
        raise OpdError(f"the agent solves {outcome.scores['before'].rate:.0%} before training: little is left to learn")
    if "opsd" not in outcome.scores:
        console.print(
            f"[bold]2/3[/] OPSD, until {ENOUGH:.0%} of {CHECKED} held-out tasks are solved or for {STEPS} steps; the "
            "teacher sees the plan"
        )
        _train(outcome, "opsd", of("opsd", out=folder / "opsd"))
    if "control" not in outcome.scores:
        console.print(f"[bold]3/3[/] {outcome.steps} steps of OPSD; the teacher sees nothing extra (control)")
        _train(outcome, "control", of("control", out=folder / "control", steps=outcome.steps))
    return outcome


def _look_at_untrained(console: Console, outcome: Outcome, data: dict[str, Any], folder: Path) -> None:
    """Measure the model before training, plain and with what its teacher sees, and show an episode."""
    run = _reported(data, stage=0)
    try:
        with console.status("the untrained agent acts, then its teacher with the plan"):
            before, teacher = run.evaluate()[0], run.evaluate(rewrite=run.method.teacher_messages)[0]
        console.print(f"untrained: {before.short}; with the teacher's plan before it: {teacher.short}")
        console.print(_show_episode(run, folder))
    finally:
        run.close()
    outcome.add(before=before, teacher=teacher)


def _train(outcome: Outcome, name: str, data: dict[str, Any]) -> None:
    """Train one run, and measure what came of it on the tasks that are reported. Raises KeyboardInterrupt."""
    result = train(config_from(data, source="demo"), overwrite=holds_run(Path(data["out"])))
    if result.interrupted:
        raise KeyboardInterrupt
    outcome.steps = result.steps
    run = _reported(data, stage=None, model=result.out / "export")
    try:
        score: Score = run.evaluate()[0]
    finally:
        run.close()
    outcome.add(**{name: score})


def _reported(data: dict[str, Any], *, stage: int | None, model: Path | None = None) -> Run:
    """Return a run whose evaluation plays the tasks that are reported."""
    return build(config_from(data | {"eval": {"tasks": TASKS}}, source="demo"), stage=stage, model=model)


def _show_episode(run: Run, folder: Path) -> Any:
    """Draw one episode of the untrained student, each token shaded by how much the teacher disagrees."""
    tasks = [task(i, split="eval") for i in range(12)]
    seed = derive_seed("demo", run.config.seed)
    groups = run.loop.player.scheduler.run(tasks, group_size=1, sampling=run.loop.player.sampling, seed=seed)
    samples = [sample for group in groups for sample in run.method.annotate(group)]
    nats = run.loop.player.divergences(samples)
    # The episode with the strongest single objection shows best what the teacher knows.
    best = max(range(len(samples)), key=lambda i: float(nats[i].max()))
    sample, values = samples[best], iter(nats[best].tolist())
    tokens = [
        ShadedToken(run.loaded.tokenizer.decode([i]), "completion" if m else "prompt", next(values) if m else None)
        for i, m in zip(sample.token_ids, sample.completion_mask, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    title = "an episode before training, shaded by how much the teacher disagrees"
    episode_picture(folder / "episode.png", tokens, title=title)
    return shade_episode(tokens, title=title)
