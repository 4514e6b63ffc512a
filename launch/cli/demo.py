"""`opd demo`: a small tool agent gets better by on-policy self-distillation, beside a control that does not.

Both runs start from the same warm-started model. In one the teacher sees the plan that solves each task; in
the control it sees nothing extra, so that whatever such training does by itself shows there.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from opd.episodes.tasks import derive_seed, task
from opd.errors import OpdError
from opd.launch.checks.loading import config_from
from opd.launch.run.build import Run, build
from opd.launch.run.lock import RunLock
from opd.launch.run.score import Score
from opd.launch.run.training import train
from opd.launch.settings.reader import holds_run
from opd.launch.tiny.build import build_tiny
from opd.tracking import read_rows
from opd.tracking.console import LastingConsole
from opd.tracking.plots import Curve, curves, running_mean
from opd.tracking.shading import ShadedToken, episode_picture, shade_episode

TASKS = 300
STEPS = 60
TEACHERS = {"opsd": "plan", "control": None}
"""The privileged text that the teacher of each run sees."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The scores of one seed."""

    seed: int
    before: Score
    teacher: Score
    """The model before training, acting with what its teacher sees."""
    after: dict[str, Score]
    """By run: `opsd` and `control`."""


def settings(seed: int, run: str, *, model: Path | str, out: Path) -> dict[str, Any]:
    """Return the settings of a run, as its YAML would hold them."""
    return {
        "method": "opsd",
        "seed": seed,
        "out": str(out),
        "model": str(model),
        "env": {"id": "opd/Lookup-v0"},
        "rollout": {"max_tokens": 48, "max_length": 512, "concurrency": TASKS},
        # So small a model gains little from a second thread, and loses much beside any other busy process.
        "train": {"steps": STEPS, "tasks_per_step": 32, "lr": 1e-3, "threads": 1},
        "eval": {"tasks": TASKS},
        "opsd": {"privileged": TEACHERS[run], "divergence": {"clip": None}},
    }


def demo(*, seeds: int, out: Path) -> list[Outcome]:
    """Train `seeds` agents and their controls; print a table, an episode, and where the pictures are.

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
        model = build_tiny("lookup", seed=seed)
        outcomes.append(_one_seed(console, seed, model, folder))
    console.rule("what it learned")
    console.print(_table(outcomes))
    picture = out / "curves.png"
    _draw(picture, out / "seed-0")
    console.print(f"curves:  {picture}\nepisode: {out / 'seed-0' / 'episode.png'}\nruns:    {out}/seed-*/")
    console.print(f"[dim]{time.monotonic() - since:.0f} s on {os.cpu_count()} cores[/]")
    return outcomes


def _one_seed(console: Console, seed: int, model: Path, folder: Path) -> Outcome:
    run = build(config_from(settings(seed, "opsd", model=model, out=folder / "opsd"), source="demo"))
    try:
        with console.status("the teacher acts with its plan"):
            teacher, _ = run.evaluate(rewrite=run.method.teacher_messages)
        console.print(_show_episode(run, folder))
    finally:
        run.close()
    before: Score | None = None
    after = {}
    for number, name in enumerate(TEACHERS, start=2):
        sees = "the plan" if TEACHERS[name] else "nothing extra (control)"
        console.print(f"[bold]{number}/3[/] {STEPS} steps of OPSD; the teacher sees {sees}")
        config = config_from(settings(seed, name, model=model, out=folder / name), source="demo")
        result = train(config, overwrite=holds_run(folder / name))
        if result.interrupted or result.before is None or result.after is None:
            raise KeyboardInterrupt
        before, after[name] = result.before, result.after
        if before.rate > 0.7:
            raise OpdError(f"the agent solves {before.rate:.0%} before training: there is little left to learn")
    assert before is not None
    return Outcome(seed=seed, before=before, teacher=teacher, after=after)


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


def _table(outcomes: list[Outcome]) -> Table:
    table = Table(title=f"held-out success, {TASKS} tasks, greedy (95% intervals)", title_justify="left")
    for column in ("seed", "before", "teacher with its plan", "after OPSD", "change", "control, after"):
        table.add_column(column)
    for outcome in outcomes:
        change = outcome.before.change(outcome.after["opsd"])
        points, low, high = (f"{100 * value:+.0f}" for value in change or (math.nan,) * 3)
        table.add_row(
            str(outcome.seed),
            str(outcome.before),
            str(outcome.teacher),
            f"[bold green]{outcome.after['opsd']}[/]",
            f"{points} points ({low} to {high})" if change else "not measured",
            str(outcome.after["control"]),
        )
    return table


def _draw(path: Path, folder: Path) -> None:
    """Plot success in training rollouts over the steps, with and without something to learn from."""
    lines: list[Curve] = []
    for name, label in (("opsd", "OPSD"), ("control", "control")):
        rows = [row for row in read_rows(folder / name / "metrics.jsonl") if "reward/success" in row]
        lines.append(running_mean(label, [row["step"] for row in rows], [row["reward/success"] for row in rows]))
    curves(
        path,
        lines,
        ylabel="Solved training tasks, sampled",
        title="A tool agent learns from itself, shown the plan",
        note="The control's teacher sees nothing extra. Bands: 95% of a running mean.",
        percent=True,
    )
