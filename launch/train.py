"""One run, from settings to a trained export: `opd train FILE`, `opd.train(config)`.

python -m opd.launch.train FILE.yaml [the options of `opd train`]
"""

from __future__ import annotations

import json
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
from opd.errors import CheckpointError, EngineError
from opd.intervals import paired_difference
from opd.launch.build import Run, Score, build
from opd.launch.checks import check_started
from opd.launch.config import Config
from opd.ranks import Ranks, join
from opd.tracking import NoTracker, Tracker
from opd.watch import together


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
    """Train by `config`; with `resume`, go on from the newest whole checkpoint in `out`.

    In this process, or, where a launcher started several and all of them call this, together with the others.

    Raises OpdError (ConfigError, ModelError, ...) with the setting and the mend in its message.
    """
    if not isinstance(config, Config):
        config = Config.from_dict(dict(config))
    ranks = ranks_of(config)
    with together():
        return _train(config, ranks, resume=resume)


def ranks_of(config: Config) -> Ranks:
    """The processes that this run is to be trained by. Raises ConfigError where the backend cannot use them."""
    check_started(config)
    return join() if config.backend == "deepspeed" else Ranks()


def _train(config: Config, ranks: Ranks, *, resume: bool) -> RunResult:
    out = ranks.from_first(lambda: config.prepare_out(resume=resume))
    saved = checkpoint.latest(out / "checkpoints", ranks) if resume else None
    run = build(config, ranks)
    start, before = (0, None) if saved is None else _restore(run, saved)
    tracker = _tracker(config, ranks, out, start)
    run.loop.on_finish = tracker.episode_finished
    done = start
    try:
        with _stop_signals() as stopped:
            if before is None and config.eval.tasks:
                before = _evaluate(run, tracker, start)
            after, interrupted = before, False
            for number in range(start, config.train.steps):
                row, groups = run.loop.step(number)
                done = number + 1
                interrupted = ranks.any(bool(stopped))
                last = done == config.train.steps or interrupted
                score = None
                if config.eval.tasks and (last or (config.eval.every and done % config.eval.every == 0)):
                    after = score = _evaluate(run, tracker, done)
                tracker.log(done, row)
                tracker.log_rollouts(done, [t for group in groups for t in group.trajectories])
                if last or (config.train.save_every and done % config.train.save_every == 0):
                    _save(run, out, done, before, score)
                if last:
                    break
        run.export(out / "export")
        result = RunResult(out=out, steps=done, before=before, after=after, interrupted=interrupted)
        change = None
        if before and after and before.played == after.played:
            change = paired_difference(before.outcomes, after.outcomes)
        tracker.summary(before=before, after=after, change=change)
        return result
    except EngineError as error:
        raise _stopped_with_checkpoint(run, out, error, done=done, before=before) from error
    finally:
        tracker.finish()
        run.close()


def _tracker(config: Config, ranks: Ranks, out: Path, start: int) -> Tracker | NoTracker:
    """On the first rank the run's tracker; the others' numbers reach it through the loop."""
    if not ranks.first:
        return NoTracker()
    return Tracker(out, config.tracking, run_config=config.dump(), total_steps=config.train.steps, resume_step=start)


def _stopped_with_checkpoint(
    run: Run, out: Path, error: EngineError, *, done: int, before: Score | None
) -> EngineError:
    """An engine was lost between two updates: the last whole step is saved, and the error says how to go on.

    Of several ranks, only one may have lost its engine: they go on from their last checkpoint.
    """
    if done and run.loop.backend.ranks.world_size == 1:
        _save(run, out, done, before, None)
        return EngineError(f"{error} Step {done} is saved: opd train {out} --resume")
    return error


def _evaluate(run: Run, tracker: Tracker | NoTracker, step: int) -> Score:
    with tracker.phase("evaluate"):
        score, _ = run.evaluate(on_finish=tracker.episode_finished)
    tracker.log_eval(step, score.row())
    return score


def _save(run: Run, out: Path, step: int, before: Score | None, score: Score | None) -> None:
    """Save after `step`, whose weights were evaluated with `score`, if they were."""
    loop, ranks = run.loop, run.loop.backend.ranks
    root = out / "checkpoints"
    checkpoint.save(
        root / f"step-{step}",
        parts=[
            loop.backend.save,
            lambda folder: loop.teacher.save(folder, ranks),
            lambda folder: torch.save(torch.get_rng_state(), folder / f"rng-{ranks.rank}.pt"),
        ],
        records={
            "run": {
                "step": step,
                "ranks": ranks.world_size,
                "policy_version": loop.version,
                "config": run.config.dump(),
                "before": None if before is None else before.outcomes,
                "success": None if score is None else score.rate,
            },
            "method": run.method.state_dict(),
        },
        ranks=ranks,
    )
    if ranks.first:
        checkpoint.rotate(root, run.config.train.keep_last, keep=_best(root) if run.config.train.keep_best else None)


def _best(root: Path) -> Path | None:
    """The checkpoint whose evaluation was best, the later of two; None where none was evaluated."""
    scores: list[tuple[float, int, Path]] = []
    for number, folder in enumerate(checkpoint.step_folders(root)):
        rate = json.loads((folder / "run.json").read_text())["success"]
        if rate is not None:
            scores.append((rate, number, folder))
    return max(scores)[2] if scores else None


def _restore(run: Run, saved: checkpoint.Checkpoint) -> tuple[int, Score | None]:
    """Load a checkpoint; the step it was saved after, and the evaluation before training."""
    record = saved.record("run")
    if changed := run.config.differs_for_resume(record["config"]):
        raise CheckpointError(
            f"{saved.folder} was saved under other settings: {', '.join(changed)}. "
            "Resume with the settings of the saved run (train.steps, eval and tracking may change), or start afresh."
        )
    loop, ranks = run.loop, run.loop.backend.ranks
    loop.backend.load(saved.folder, saved_ranks=record["ranks"])
    loop.teacher.load(saved.folder, ranks, saved_ranks=record["ranks"])
    if record["ranks"] == ranks.world_size:
        torch.set_rng_state(torch.load(saved.folder / f"rng-{ranks.rank}.pt", weights_only=True))
    loop.version = record["policy_version"]
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
