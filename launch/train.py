"""One run, from settings to a trained export: `opd train FILE`, `opd.train(config)`.

python -m opd.launch.train FILE.yaml [the options of `opd train`]
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from opd import checkpoint
from opd.errors import CheckpointError
from opd.intervals import paired_difference
from opd.launch.build import Run, Score, build
from opd.launch.config import Config
from opd.models import export
from opd.tracking import Tracker


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run leaves behind."""

    out: Path
    steps: int
    """Optimiser updates that the weights have seen, over all restarts."""
    before: Score | None
    after: Score | None
    interrupted: bool
    """A signal ended the run early; it can be resumed."""


def train(config: Config | Mapping[str, Any], *, resume: bool = False) -> RunResult:
    """Train by `config`, in this process; with `resume`, go on from the newest whole checkpoint in `out`.

    Raises OpdError (ConfigError, ModelError, ...) with the setting and the mend in its message.
    """
    if not isinstance(config, Config):
        config = Config.from_dict(dict(config))
    out = config.prepare_out(resume=resume)
    run = build(config)
    start, before = _restore(run, out) if resume else (0, None)
    tracker = Tracker(out, config.tracking, run_config=config.dump(), total_steps=config.train.steps, resume_step=start)
    run.loop.on_finish = tracker.episode_finished
    try:
        with _stop_signals() as stopped:
            if before is None and config.eval.tasks:
                before = _evaluate(run, tracker, start)
            after, done = before, start
            for number in range(start, config.train.steps):
                row, groups = run.loop.step(number)
                done = number + 1
                last = done == config.train.steps or bool(stopped)
                if config.eval.tasks and (last or (config.eval.every and done % config.eval.every == 0)):
                    after = _evaluate(run, tracker, done)
                tracker.log(done, row)
                tracker.log_rollouts(done, [t for group in groups for t in group.trajectories])
                if last or (config.train.save_every and done % config.train.save_every == 0):
                    _save(run, out, done, before)
                if last:
                    break
        export(run.loaded, out / "export")
        result = RunResult(out=out, steps=done, before=before, after=after, interrupted=bool(stopped))
        change = None
        if before and after and before.played == after.played:
            change = paired_difference(before.outcomes, after.outcomes)
        tracker.summary(before=before, after=after, change=change)
        return result
    finally:
        tracker.finish()
        run.close()


def _evaluate(run: Run, tracker: Tracker, step: int) -> Score:
    with tracker.phase("evaluate"):
        score, _ = run.evaluate(on_finish=tracker.episode_finished)
    tracker.log_eval(step, score.row())
    return score


def _save(run: Run, out: Path, step: int, before: Score | None) -> None:
    loop = run.loop
    trained: dict[str, torch.Tensor] = {name: p for name, p in loop.student.named_parameters() if p.requires_grad}
    root = out / "checkpoints"
    checkpoint.save(
        root / f"step-{step}",
        tensors={"student": trained, "teacher": loop.teacher.state_dict()},
        states={"backend": loop.backend.state_dict(), "rng": torch.get_rng_state()},
        records={
            "run": {
                "step": step,
                "policy_version": loop.rollouts.engine.policy_version,
                "config": run.config.dump(),
                "before": None if before is None else before.outcomes,
            },
            "method": run.method.state_dict(),
        },
    )
    checkpoint.rotate(root, run.config.train.keep_last)


def _restore(run: Run, out: Path) -> tuple[int, Score | None]:
    """Load the newest whole checkpoint; the step it was saved after, and the evaluation before training."""
    saved = checkpoint.latest(out / "checkpoints")
    record = saved.record("run")
    if changed := run.config.differs_for_resume(record["config"]):
        raise CheckpointError(
            f"{saved.folder} was saved under other settings: {', '.join(changed)}. "
            "Resume with the settings of the saved run (train.steps, eval and tracking may change), or start afresh."
        )
    loop = run.loop
    own = dict(loop.student.named_parameters())
    weights = saved.tensors("student")
    trained = {name for name, p in own.items() if p.requires_grad}
    if trained != set(weights):
        raise CheckpointError(f"{saved.folder} holds other weights than this model trains")
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)
    loop.teacher.load_state_dict(saved.tensors("teacher"))
    loop.backend.load_state_dict(saved.state("backend"))
    torch.set_rng_state(saved.state("rng"))
    loop.rollouts.engine.policy_version = record["policy_version"]
    run.method.load_state_dict(saved.record("method"))
    before = record["before"]
    return record["step"], None if before is None else Score(tuple(before))


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and the first Ctrl-C, so that the step at hand is finished and saved."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt  # a second one means now
        received.append(number)
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    try:
        previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: whoever runs that one decides about signals
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    from opd.launch.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
