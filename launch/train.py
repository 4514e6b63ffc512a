"""One run, from settings to a trained export: `opd train FILE`, `opd.train(config)`.

python -m opd.launch.train FILE.yaml [the options of `opd train`]
"""

from __future__ import annotations

import gc
import json
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from opd import checkpoint
from opd.errors import CheckpointError, EngineError, HealthError
from opd.launch.checks.loading import config_from
from opd.launch.checks.starting import check_started
from opd.launch.run.build import Interrupted, Run, Score, build
from opd.launch.run.lock import RunLock
from opd.launch.run.out import Resume, choose_out, remove_run, resumes, write_config
from opd.launch.run.saving import begin_anew, clear_the_way, finite_checkpoints, newest, restore, save
from opd.launch.settings.config import Config
from opd.ranks.join import join
from opd.ranks.ranks import Ranks
from opd.ranks.watch import together
from opd.tracking import NoTracker, Tracker


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run leaves behind."""

    out: Path
    steps: int
    """Optimiser updates that the weights have seen, over all restarts."""
    before: Score | None
    after: Score | None
    """Of the last weights; None where a signal came first."""
    interrupted: bool
    """A signal ended the run early; it can be resumed."""


def train(
    config: Config | Mapping[str, Any], *, resume: Resume = False, overwrite: bool = False, only_prepare: bool = False
) -> RunResult:
    """Train by `config`; with `resume`, go on from the newest whole checkpoint in `out`.

    With `resume="auto"` a run begins where `out` holds none, and goes on where it does. With `overwrite` the run in
    `out` is deleted first. With `only_prepare` the run ends after its last stage without steps, before what is trained
    on its data; it can be resumed.

    In this process, or, where a launcher started several and all of them call this, together with the others.

    Raises OpdError (ConfigError, ModelError, ...) with the setting and the mend in its message: LockError where another
    process has the folder, HealthError where the run goes on without learning.
    """
    if not isinstance(config, Config):
        config = config_from(dict(config))
    ranks = ranks_of(config)
    with together():
        out = ranks.from_first(lambda: choose_out(config, resume=resume, overwrite=overwrite))
        with _locked(out, ranks) as lock:
            ranks.from_first(lambda: _make_room(config.at(out), out, resume=resume, overwrite=overwrite))
            again = ranks.from_first(lambda: resumes(out, resume))
            saved = newest(out, ranks, anew=resume == "auto") if again else None
            runner = _StageRunner(config=config, ranks=ranks, out=out, lock=lock, only_prepare=only_prepare)
            return _train(runner, saved, anew=again and saved is None)


@contextmanager
def _locked(out: Path, ranks: Ranks) -> Iterator[RunLock | None]:
    """Holds the run's folder; the first rank does it for all."""
    lock = ranks.agree(lambda: RunLock(out) if ranks.first else None)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def _make_room(config: Config, out: Path, *, resume: Resume, overwrite: bool) -> None:
    """Look at the folder once more, now that it is ours: another run may have come before. Delete it if asked to."""
    choose_out(config, resume=resume, overwrite=overwrite)
    if overwrite:
        remove_run(out)


def ranks_of(config: Config) -> Ranks:
    """The processes that this run is to be trained by. Raises ConfigError where the backend cannot use them, or
    its JSON cannot be used."""
    check_started(config)
    if config.backend == "local":
        return Ranks()
    from opd.launch.checks.deepspeed import check_deepspeed

    ranks = join()
    ranks.agree(lambda: check_deepspeed(config))
    return ranks


def _train(runner: _StageRunner, saved: checkpoint.Checkpoint | None, *, anew: bool) -> RunResult:
    """Train from a checkpoint or from the start; `anew` in the folder of a run that has none."""
    config, ranks, out = runner.config, runner.ranks, runner.out
    if saved is not None:
        runner.take_up(saved.record("run"), saved.folder)
    left = ranks.from_first(runner.stages_left)
    ranks.from_first(lambda: write_config(config, out))  # not before: settings that are refused must not stand there
    if anew:
        ranks.from_first(partial(begin_anew, out))
    exports = [stage.next_model for stage in left if stage.next_model is not None]
    ranks.from_first(partial(clear_the_way, exports, saved))
    with _stop_signals() as stopped, closing(runner):
        runner.stopped = stopped
        for stage in left:
            with closing(build(config, ranks, stage=stage.number, model=stage.model)) as run:
                if saved is not None and runner.done > stage.first and stage.record is None:
                    restore(run, saved)
                try:
                    runner.go(run, stage)
                except EngineError as error:
                    raise runner.stopped_with_checkpoint(run, stage, error) from error
                except HealthError as error:
                    ranks.agree(partial(_raise, runner.given_up(run, stage, error)))
                if run.loop.stage.trains and (runner.done > stage.first if runner.interrupted else stage.last):
                    run.export(out / "export")
                elif stage.next_model is not None:
                    _export_whole(run, stage.next_model)
                if runner.interrupted:
                    break
            del run  # else two stages' models would be in memory while the next is loaded
            gc.collect()
        return runner.finish()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """The place of one stage among the steps of a run."""

    number: int
    """From 0."""
    first: int
    """The steps of the stages before it."""
    end: int
    model: Path | None
    """What it starts from; None for the run's own model."""
    next_model: Path | None
    """Its model, for those after it; None where it trains none, or there are none."""
    record: Path | None
    """Of a stage without steps: the file that says that it is over, and what it made in numbers."""
    last: bool


@dataclass(kw_only=True)
class _StageRunner:
    """Runs the remaining stages; owns the tracker and the scores."""

    config: Config
    ranks: Ranks
    out: Path
    lock: RunLock | None = None
    """On the first rank: the folder is this run's alone."""
    only_prepare: bool = False
    stopped: list[int] = field(default_factory=list)
    """The signals that came so far."""
    tracker: Tracker | NoTracker | None = None
    done: int = 0
    before: Score | None = None
    after: Score | None = None
    """Of the weights as they are after `done` steps; None where these were not evaluated."""
    saved_at: float = field(default_factory=time.monotonic)
    """When the last checkpoint was saved, or the run began."""
    interrupted: bool = False
    made: dict[str, float] = field(default_factory=dict)
    """What stages made in numbers before their first step, for the row of the next one."""

    def take_up(self, record: dict[str, Any], folder: Path) -> None:
        """Go on after the checkpoint in `folder`. Raises CheckpointError where it was saved under other settings."""
        self._same(folder, self.config.differs_for_resume(record["config"]))
        self.done = record["step"]
        self.before, self.after = (
            None if record[name] is None else Score(tuple(record[name])) for name in ("before", "after")
        )

    def _same(self, saved: Path, changed: list[str]) -> None:
        if changed:
            raise CheckpointError(
                f"{saved} was saved under other settings: {', '.join(changed)}. Resume with the settings of the saved "
                "run (eval, tracking and, of a run of one stage, train.steps may change), or start afresh."
            )

    def stages_left(self) -> list[_Place]:
        """The stages from the first one that is not both trained and exported, or whose data is not there any more.

        Raises CheckpointError where a stage without steps made its data under other settings.
        """
        ends = list(accumulate(self.config.stage_steps))
        stages: list[_Place] = []
        model = None
        for n, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            last, trains = n == len(ends) - 1, self.config.stages[n].trains
            stage = _Place(
                number=n,
                first=first,
                end=end,
                model=model,
                next_model=self.out / f"export-stage-{n + 1}" if trains and not last else None,
                record=None if trains else self.out / f"data/stage-{n + 1}.json",
                last=last,
            )
            model = stage.next_model or model
            stages.append(stage)
            if stage.record is not None and stage.end == self.done and self._is_over(stage):
                self.made |= self._record(stage)["made"]
        left = [stage for stage in stages if not self._is_over(stage)]
        if not self.only_prepare:
            return left
        prepares = max(stage.number for stage in stages if stage.record is not None)
        return [stage for stage in left if stage.number <= prepares]

    def _is_over(self, stage: _Place) -> bool:
        if stage.record is not None:
            made = self._record(stage)["made"]
            return bool(made) and self.config.stages[stage.number].holds(self.out / "data", made)
        return self.done >= stage.end and stage.next_model is not None and stage.next_model.is_dir()

    def _record(self, stage: _Place) -> dict[str, Any]:
        """What a stage without steps wrote down when it was over; with nothing `made` where it is not."""
        assert stage.record is not None
        try:
            record: dict[str, Any] = json.loads(stage.record.read_text())
            config, made = dict(record["config"]), dict(record["made"])
        except FileNotFoundError:
            return {"made": {}}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{stage.record} cannot be read ({error}); delete it, and the stage is made anew"
            ) from error
        self._same(stage.record, self.config.differs(config))
        return {"made": made}

    def go(self, run: Run, stage: _Place) -> None:
        """Train the stage from where it stands to its end, or until a signal."""
        config, loop, player, evaluation = self.config, run.loop, run.loop.player, self.config.eval
        tracker = self.tracker = self.tracker or self._open_tracker()
        player.on_finish, player.stopping = tracker.episode_finished, lambda: self.ranks.any(bool(self.stopped))
        player.version = self.done
        if self.before is None and evaluation.tasks and loop.stage.model is None:
            self.before = self._evaluate(run, tracker)
        if not self.interrupted:
            self._prepare(run, stage, tracker)
        while self.done < stage.end and not self.interrupted:
            row, groups = loop.step(self.done - stage.first)
            row |= self.made if self.done == stage.first else {}
            self.made = {}
            row |= {"stage": stage.number + 1.0} if len(config.stages) > 1 else {}
            self.done += 1
            self.after = None
            self.interrupted = player.stopping()  # then it is saved at once, and not evaluated
            last = self.done == stage.end
            due = last or (evaluation.every and self.done % evaluation.every == 0)
            if loop.failed is None and not self.interrupted and evaluation.tasks and due:
                self.after = self._evaluate(run, tracker)
            tracker.log(self.done, row)
            tracker.log_rollouts(self.done, [t for group in groups for t in group.trajectories])
            if loop.failed is not None:
                raise loop.failed
            self.interrupted = self.interrupted or player.stopping()
            if last or self.interrupted or self._save_is_due():
                self._save(run)
            self.interrupted = player.stopping() and not (last and stage.last and self._is_evaluated())
        steps = stage.end - stage.first
        if self.done == stage.end:
            player.health.ended(steps=steps, updates=steps * player.train.updates_per_step)
        if stage.record is None:
            self.made = {}  # of a stage that had its steps before a restart
        if stage.last and loop.stage.trains and not (self.interrupted or self._is_evaluated()):
            self.after = self._evaluate(run, tracker)  # a signal came before it could be
            self._save(run)  # that says so

    def _prepare(self, run: Run, stage: _Place, tracker: Tracker | NoTracker) -> None:
        """What the stage needs before its first step."""
        since = time.monotonic()
        with tracker.phase("prepare"):
            made = run.loop.prepare(self.out / "data")
        if stage.record is not None:
            made = {**made, f"time/stage_{stage.number + 1}": time.monotonic() - since}
        self.made |= made
        self.interrupted = run.loop.player.stopping()
        if self.done == stage.first:
            tracker.prepared(made)
        if stage.record is not None and not self.interrupted:
            record = json.dumps({"config": self.config.dump(), "made": made})
            self.ranks.from_first(partial(_write_whole, stage.record, record))

    def _evaluate(self, run: Run, tracker: Tracker | NoTracker) -> Score | None:
        """The score of the weights as they are; None where a signal came first."""
        try:
            with tracker.phase("evaluate"):
                score, _ = run.evaluate(on_finish=tracker.episode_finished, stopped=lambda: bool(self.stopped))
        except Interrupted:
            self.interrupted = True
            return None
        tracker.log_eval(self.done, score.row())
        return score

    def _is_evaluated(self) -> bool:
        return self.after is not None or not self.config.eval.tasks

    def _save_is_due(self) -> bool:
        """By steps or by the first rank's clock, whichever comes first."""
        train = self.config.train
        if train.save_every and self.done % train.save_every == 0:
            return True
        late = time.monotonic() - self.saved_at >= 60 * train.save_minutes
        return bool(train.save_minutes) and self.ranks.from_first(lambda: late)

    def _save(self, run: Run) -> None:
        self.ranks.agree(lambda: self.lock.check() if self.lock is not None else None)
        save(run, self.out, self.done, self.before, self.after)
        self.saved_at = time.monotonic()

    def stopped_with_checkpoint(self, run: Run, stage: _Place, error: EngineError) -> EngineError:
        """An engine was lost: the last whole step is saved if the weights are still its, and the error says so.

        Of several ranks, only one may have lost its engine: they go on from their last checkpoint.
        """
        if self.done > stage.first and self.ranks.world_size == 1 and not run.loop.halfway:
            self._save(run)
            return EngineError(f"{error} Step {self.done} is saved: opd train {self.out} --resume")
        return EngineError(f"{error}{self._last_checkpoint()}")

    def given_up(self, run: Run, stage: _Place, error: HealthError) -> HealthError:
        """Nothing is learned: the last whole step is saved if its updates were numbers, and the error says so."""
        if self.done > stage.first and run.loop.finite and not run.loop.halfway:
            self._save(run)
            return HealthError(f"{error} Step {self.done} is saved: opd train {self.out} --resume")
        finite = finite_checkpoints(self.out / "checkpoints")
        if not finite:
            return error
        return HealthError(
            f"{error} {finite[-1]} is the last checkpoint whose updates were finite: --resume goes on from there once "
            "those after it are deleted."
        )

    def _last_checkpoint(self) -> str:
        saved = checkpoint.step_folders(self.out / "checkpoints")
        return f" The last checkpoint is {saved[-1].name}: opd train {self.out} --resume" if saved else ""

    def finish(self) -> RunResult:
        """The result of a run that went well, and its summary."""
        before, after = self.before, self.after if self.done else self.before
        change = before.change(after) if before and after else None
        if self.tracker is not None:  # else all was there already
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


def _raise(error: Exception) -> NoReturn:
    raise error


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that it is whole or absent."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text)
    aside.rename(path)


def _export_whole(run: Run, folder: Path) -> None:
    """Export a stage's model so that the folder is whole or absent."""
    aside = folder.with_name(f".{folder.name}.partial")
    run.export(aside)
    run.loop.player.ranks.from_first(lambda: aside.rename(folder))


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
    from opd.launch.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
