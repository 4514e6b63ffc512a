"""One run, from settings to a trained export: `opd train FILE`, `opd.train(config)`.

python -m opd.launch.train FILE.yaml [the options of `opd train`]
"""

from __future__ import annotations

import gc
import json
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
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
from opd.tracking import NoTracker, Tracker, forget_rows
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
    """The processes that this run is to be trained by. Raises ConfigError where the backend cannot use them, or
    its JSON cannot be used."""
    check_started(config)
    if config.backend == "local":
        return Ranks()
    from opd.launch.deepspeed_check import check_deepspeed

    ranks = join()
    ranks.agree(lambda: check_deepspeed(config))
    return ranks


def _train(config: Config, ranks: Ranks, *, resume: bool) -> RunResult:
    out = ranks.from_first(lambda: config.prepare_out(resume=resume))
    saved = _newest(out, ranks) if resume else None
    course = _Course(config=config, ranks=ranks, out=out)
    if saved is not None:
        course.take_up(saved.record("run"), saved.folder)
    with _stop_signals() as stopped, closing(course):
        course.stopped = stopped
        for stage in ranks.from_first(course.stages_left):
            with closing(build(config, ranks, stage=stage.number, model=stage.model)) as run:
                if saved is not None and course.done > stage.first:
                    _restore(run, saved)
                try:
                    course.go(run, stage)
                except EngineError as error:
                    raise course.stopped_with_checkpoint(run, stage, error) from error
                if course.interrupted or stage.next_model is None:
                    run.export(out / "export")
                    break
                _export_whole(run, stage.next_model)
            del run  # else two stages' models would be in memory while the next is loaded
            gc.collect()
        return course.finish()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """One stage among the steps of a run."""

    number: int
    """From 0."""
    first: int
    """The steps of the stages before it."""
    end: int
    model: Path | None
    """What it starts from; None for the run's own model."""
    next_model: Path | None
    """What the next stage starts from; None where there is none."""


@dataclass(kw_only=True)
class _Course:
    """A run on its way through its stages."""

    config: Config
    ranks: Ranks
    out: Path
    stopped: list[int] = field(default_factory=list)
    """The signals that came so far."""
    tracker: Tracker | NoTracker | None = None
    done: int = 0
    before: Score | None = None
    after: Score | None = None
    interrupted: bool = False

    def take_up(self, record: dict[str, Any], folder: Path) -> None:
        """Go on after the checkpoint in `folder`. Raises CheckpointError where it was saved under other settings."""
        if changed := self.config.differs_for_resume(record["config"]):
            raise CheckpointError(
                f"{folder} was saved under other settings: {', '.join(changed)}. Resume with the settings of the saved "
                "run (eval, tracking and, of a run of one stage, train.steps may change), or start afresh."
            )
        self.done = record["step"]
        self.before = None if record["before"] is None else Score(tuple(record["before"]))

    def stages_left(self) -> list[_Stage]:
        """The stages from the first one that is not both trained and exported."""
        ends = list(accumulate(self.config.stage_steps))
        models = [None, *(self.out / f"export-stage-{n + 1}" for n in range(len(ends) - 1)), None]
        stages = [
            _Stage(number=n, first=first, end=end, model=models[n], next_model=models[n + 1])
            for n, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
        ]
        return [s for s in stages if self.done < s.end or s.next_model is None or not s.next_model.is_dir()]

    def go(self, run: Run, stage: _Stage) -> None:
        """Train the stage from where it stands to its end, or until a signal."""
        config, loop, evaluation = self.config, run.loop, self.config.eval
        tracker = self.tracker = self.tracker or self._open_tracker()
        loop.on_finish, loop.stopping = tracker.episode_finished, lambda: self.ranks.any(bool(self.stopped))
        loop.version = self.done
        if self.before is None and evaluation.tasks:
            self.before = _evaluate(run, tracker, self.done)
        with tracker.phase("prepare"):
            made = run.method.prepare(loop, self.out / "data")
        self.interrupted = loop.stopping()
        if self.done == stage.first:
            tracker.prepared(made)
        while self.done < stage.end and not self.interrupted:
            row, groups = loop.step(self.done - stage.first)
            row |= made if self.done == stage.first else {}
            row |= {"stage": stage.number + 1.0} if len(config.stages) > 1 else {}
            self.done += 1
            self.interrupted = loop.stopping()
            last = self.done == stage.end or self.interrupted
            score = None
            if evaluation.tasks and (last or (evaluation.every and self.done % evaluation.every == 0)):
                self.after = score = _evaluate(run, tracker, self.done)
            tracker.log(self.done, row)
            tracker.log_rollouts(self.done, [t for group in groups for t in group.trajectories])
            if last or (config.train.save_every and self.done % config.train.save_every == 0):
                _save(run, self.out, self.done, self.before, score)

    def stopped_with_checkpoint(self, run: Run, stage: _Stage, error: EngineError) -> EngineError:
        """An engine was lost between two updates: the last whole step is saved, and the error says how to go on.

        Of several ranks, only one may have lost its engine: they go on from their last checkpoint.
        """
        if self.done > stage.first and self.ranks.world_size == 1:
            _save(run, self.out, self.done, self.before, None)
            return EngineError(f"{error} Step {self.done} is saved: opd train {self.out} --resume")
        return error

    def finish(self) -> RunResult:
        """The result of a run that went well, and its summary."""
        before, after = self.before, self.after or self.before
        change = None
        if before and after and before.played == after.played:
            change = paired_difference(before.outcomes, after.outcomes)
        assert self.tracker is not None
        self.tracker.summary(before=before, after=after, change=change)
        return RunResult(out=self.out, steps=self.done, before=before, after=after, interrupted=self.interrupted)

    def close(self) -> None:
        """Close what is open, also after an error."""
        if self.tracker is not None:
            self.tracker.finish()

    def _open_tracker(self) -> Tracker | NoTracker:
        """On the first rank the run's tracker; the others' numbers reach it through the loop."""
        if not self.ranks.first:
            return NoTracker()
        config = self.config
        steps = sum(config.stage_steps)
        return Tracker(self.out, config.tracking, run_config=config.dump(), total_steps=steps, resume_step=self.done)


def _newest(out: Path, ranks: Ranks) -> checkpoint.Checkpoint | None:
    """The newest checkpoint; None for a run that was stopped before its first, which begins anew."""
    if ranks.from_first(lambda: bool(checkpoint.step_folders(out / "checkpoints"))):
        return checkpoint.latest(out / "checkpoints", ranks)
    if ranks.first:
        print(f"{out} holds no checkpoint yet: the run begins anew", file=sys.stderr, flush=True)
    ranks.from_first(lambda: forget_rows(out))
    return None


def _export_whole(run: Run, folder: Path) -> None:
    """Export a stage's model so that the folder is whole or absent."""
    aside = folder.with_name(f".{folder.name}.partial")
    run.export(aside)
    run.loop.backend.ranks.from_first(lambda: aside.rename(folder))


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
                "teacher_updates": loop.teacher.updates,
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


def _restore(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Load a checkpoint of this run's stage."""
    record, loop = saved.record("run"), run.loop
    ranks = loop.backend.ranks
    loop.backend.load(saved.folder, saved_ranks=record["ranks"])
    loop.teacher.load(saved.folder, ranks, saved_ranks=record["ranks"])
    loop.teacher.updates = record["teacher_updates"]
    if record["ranks"] == ranks.world_size:
        torch.set_rng_state(torch.load(saved.folder / f"rng-{ranks.rank}.pt", weights_only=True))
    loop.version = record["policy_version"]
    run.method.load_state_dict(saved.record("method"))


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
