"""Runs the stages of a run that remain: their steps, evaluations and checkpoints."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from opd import checkpoint
from opd.errors import Interrupted
from opd.launch.run.build import Run
from opd.launch.run.lock import RunLock
from opd.launch.run.saving import run_record, save, save_is_due
from opd.launch.run.score import Score
from opd.launch.run.signals import EXIT_CODES, Stops, write_stop
from opd.launch.run.stages import RunStage, check_same_settings, write_record
from opd.launch.settings.config import Config
from opd.ranks.ranks import Ranks
from opd.tracking import NoTracker, Tracker
from opd.trainers.loop.play import Player
from opd.trainers.loop.progress import Progress
from opd.trainers.loop.symptoms import remarks


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run leaves behind."""

    out: Path
    steps: int
    """Optimiser updates that the weights have seen, over all restarts."""
    before: Score | None
    after: Score | None
    """Of the last weights; None where a signal came first."""
    stopped_by: str | None = None
    """What ended the run early, the name of a signal or of the time limit; it can be resumed."""

    @property
    def interrupted(self) -> bool:
        """True: the run ended early."""
        return self.stopped_by is not None

    @property
    def exit_code(self) -> int:
        """0 for a run that has finished; else see `opd.launch.run.signals`."""
        return EXIT_CODES[self.stopped_by] if self.stopped_by else 0


@dataclass(kw_only=True)
class StageRunner:
    """Runs the remaining stages; owns tracker and scores."""

    config: Config
    ranks: Ranks
    out: Path
    lock: RunLock | None = None
    """On the first rank: the folder is this run's alone."""
    stops: Stops = field(default_factory=Stops)
    """What asks for an early end."""
    tracker: Tracker | NoTracker | None = None
    done: int = 0
    before: Score | None = None
    after: Score | None = None
    """Of the weights as they are after `done` steps; None where these were not evaluated."""
    saved_at: float = field(default_factory=time.monotonic)
    """When the last checkpoint was saved, or the run began."""
    saved: int | None = None
    """The step of the last checkpoint."""
    interrupted: bool = False
    made: dict[str, float] = field(default_factory=dict)
    """The numbers that stages made before their first step, for the row of the next one."""

    def resume_after(self, saved: checkpoint.Checkpoint) -> None:
        """Go on after a checkpoint. Raises CheckpointError where it was saved under other settings."""
        record = run_record(saved)
        check_same_settings(saved.folder, self.config.differs_for_resume(record.config))
        self.done = self.saved = record.step
        self.before, self.after = (
            None if outcomes is None else Score(tuple(outcomes)) for outcomes in (record.before, record.after)
        )

    def is_told_to_stop(self) -> bool:
        """True, on all ranks, from the moment on at which anything asks any of them for an early end."""
        self.interrupted = self.interrupted or self.ranks.any(bool(self.stops))
        return self.interrupted

    def run_stage(self, run: Run, stage: RunStage) -> None:
        """Train the stage from where it stands to its end, or until a signal."""
        loop, player = run.loop, run.loop.player
        tracker = self.tracker = self.tracker or _open_tracker(self)
        _tell_player(self, player, tracker)
        if self.before is None and self.config.eval.tasks and loop.stage.model is None:
            self.before = self._evaluate(run, tracker)
        try:
            if _is_left_open(self):
                self.after = self._evaluate(run, tracker)
                self.save(run)  # that says so
            if not self.interrupted:
                self._prepare(run, stage, tracker)
            while self.done < stage.end and not (self.interrupted or self.reached):
                self._take_step(run, stage, tracker)
        except Interrupted:  # a step was left: what is saved is the one before it
            self.interrupted = True
            if self.done > stage.first and self.saved != self.done:
                self.save(run)
        if self.done == stage.end:
            steps = stage.end - stage.first
            player.health.ended(steps=steps, updates=steps * player.train.updates_per_step)
        self.made = {} if stage.record is None else self.made  # that of a stage that had its steps before a restart
        if stage.last and loop.stage.trains and not (self.interrupted or _is_evaluated(self)):
            self.after = self._evaluate(run, tracker)  # a signal came before it could be
            self.save(run)  # that says so

    def _take_step(self, run: Run, stage: RunStage, tracker: Tracker | NoTracker) -> None:
        """Take one step and log its row; evaluate and save after it where that is due."""
        loop, evaluation = run.loop, self.config.eval
        row, groups = loop.step(self.done - stage.first)
        row |= self.made if self.done == stage.first else {}
        self.made = {}
        row |= {"stage": stage.number + 1.0} if len(self.config.stages) > 1 else {}
        self.done += 1
        self.after = None
        self.interrupted = loop.player.stopping()  # then it is saved at once, and not evaluated
        last = self.done == stage.end
        due = last or (evaluation.every and self.done % evaluation.every == 0)
        if loop.failed is None and not self.interrupted and evaluation.tasks and due:
            self.after = self._evaluate(run, tracker)
        last = last or self.reached
        tracker.log(self.done, row)
        tracker.log_rollouts(self.done, [t for group in groups for t in group.trajectories])
        if loop.failed is not None:
            raise loop.failed
        self.interrupted = self.interrupted or loop.player.stopping()
        if last or self.interrupted or save_is_due(self.config.train, self.done, self.saved_at, self.ranks):
            self.save(run)
        self.interrupted = loop.player.stopping() and not (last and stage.last and _is_evaluated(self))

    def _prepare(self, run: Run, stage: RunStage, tracker: Tracker | NoTracker) -> None:
        """Let the method make what the stage needs before its first step."""
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
            self.ranks.from_first(partial(write_record, self.config, stage, made))

    def _evaluate(self, run: Run, tracker: Tracker | NoTracker) -> Score | None:
        """Return the score of the weights as they are; None where a signal came first."""
        try:
            with tracker.phase("evaluate"):
                run.loop.player.progress.expect(self.config.eval.tasks)
                score, _ = run.evaluate(on_finish=tracker.episode_finished, stopped=lambda: bool(self.stops))
        except Interrupted:
            self.interrupted = True
            tracker.say("the evaluation is left, and played again when the run goes on")
            return None
        tracker.log_eval(self.done, score.row())
        return score

    @property
    def reached(self) -> bool:
        """True: the weights as they are solve as many held-out tasks as `eval.stop_at` asks for, so the run is over."""
        enough = self.config.eval.stop_at
        return enough is not None and self.after is not None and self.after.rate >= enough

    def save(self, run: Run) -> None:
        """Save a checkpoint, if the folder is still this run's."""
        self.ranks.agree(lambda: self.lock.check() if self.lock is not None else None)
        tracker = self.tracker or NoTracker()
        tracker.sync()
        with tracker.phase("save"):
            save(run, self.out, self.done, self.before, self.after)
        self.saved_at, self.saved = time.monotonic(), self.done

    def note_stop(self) -> str | None:
        """Write down in `stopped.json` what ended the run early, if anything did; return its name, on all ranks."""
        reason = next(filter(None, self.ranks.gather(self.stops.reason if self.interrupted else None)), None)
        if reason is not None:
            steps = sum(self.config.stage_steps)
            self.ranks.from_first(partial(write_stop, self.out, reason, step=self.done, steps=steps, saved=self.saved))
        return reason

    def finish(self) -> RunResult:
        """Write the summary of a run that went well, and return its result."""
        before, after = self.before, self.after if self.done else self.before
        change = before.change(after) if before and after else None
        if self.tracker is not None:  # else all was there already
            self.tracker.summary(before=before, after=after, change=change, remarks=remarks)
        return RunResult(out=self.out, steps=self.done, before=before, after=after, stopped_by=self.note_stop())

    def close(self) -> None:
        """Close what is open, also after an error."""
        if self.tracker is not None:
            self.tracker.finish()


def _tell_player(runner: StageRunner, player: Player, tracker: Tracker | NoTracker) -> None:
    """Tell who plays a stage where the run stands, who wants to know, and when to stop."""
    player.on_finish = tracker.episode_finished
    player.progress = Progress(tracker, runner.ranks.world_size)
    player.stopped = lambda: bool(runner.stops)
    player.stopping = lambda: runner.ranks.any(bool(runner.stops))
    player.version = runner.done


def _is_evaluated(runner: StageRunner) -> bool:
    """True: the weights as they are have their score, or none is asked for. False: it is still to be measured."""
    return runner.after is not None or not runner.config.eval.tasks


def _is_left_open(runner: StageRunner) -> bool:
    """True: a signal came before the evaluation that could have ended the run; resumed, it is to end at the same step.
    False: it goes on."""
    evaluation, done = runner.config.eval, runner.done
    return bool(evaluation.stop_at and done and done % evaluation.every == 0 and runner.after is None)


def _open_tracker(runner: StageRunner) -> Tracker | NoTracker:
    """Open the run's tracker on the first rank; the others' numbers reach it through the loop."""
    if not runner.ranks.first:
        return NoTracker()
    config, steps = runner.config, sum(runner.config.stage_steps)
    return Tracker(runner.out, config.tracking, run_config=config.shown(), total_steps=steps, resume_step=runner.done)
