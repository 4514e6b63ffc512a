"""One run, from settings to a trained export. `opd.launch.train` is the module that is started."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from opd import checkpoint
from opd.disk import told_of_the_disk
from opd.errors import EngineError, HealthError, NumbersError
from opd.launch.checks.loading import config_from
from opd.launch.checks.outside import warn_of_changes, write_taken
from opd.launch.checks.text import check_model_text, refuse_problems
from opd.launch.plan.storage import check_room_at_first, check_room_before_loading, count_sizes
from opd.launch.run.build import Run, build
from opd.launch.run.endings import engine_lost, given_up, no_numbers
from opd.launch.run.first_look import first_look
from opd.launch.run.lock import RunLock
from opd.launch.run.out import (
    Resume,
    choose_out,
    day_of,
    on_files,
    recommend_variables,
    remove_run,
    resumes,
    write_config,
)
from opd.launch.run.ranks import ranks_of
from opd.launch.run.runner import RunResult, StageRunner
from opd.launch.run.saving import begin_anew, clear_the_way, newest_checkpoint, restore
from opd.launch.run.signals import STOPPED, stop_signals
from opd.launch.run.stages import RunStage, made_before, stages_left
from opd.launch.settings.config import Config
from opd.ranks.ranks import Ranks
from opd.ranks.watch import together


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
    read = config if isinstance(config, Config) else config_from(dict(config))
    ranks = ranks_of(read)
    with together():
        ranks.from_first(lambda: refuse_problems(check_model_text(read)))
        ranks.from_first(lambda: first_look(read))
        # Absolute from here on: an environment that leaves the current folder does not take the run's along.
        out = ranks.from_first(lambda: choose_out(read, resume=resume, overwrite=overwrite).absolute())
        with told_of_the_disk(out), _locked(out, ranks) as lock:
            ranks.from_first(lambda: _make_room(read.at(out), out, resume=resume, overwrite=overwrite))
            again = ranks.from_first(lambda: resumes(out, resume))
            saved = newest_checkpoint(out, ranks, anew=resume == "auto") if again else None
            dated = read.on_the_day(ranks.from_first(on_files(partial(day_of, out, resumed=again), out)))
            runner = StageRunner(config=dated, ranks=ranks, out=out, lock=lock)
            result = _train(runner, saved, anew=again and saved is None, only_prepare=only_prepare)
        ranks.wait()  # a launcher ends the others as soon as one has an exit code that is not 0
        return result


@contextmanager
def _locked(out: Path, ranks: Ranks) -> Iterator[RunLock | None]:
    """Hold the run's folder; the first rank does it for all, and is yielded the lock."""
    lock = ranks.agree(lambda: RunLock(out) if ranks.first else None)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def _make_room(config: Config, out: Path, *, resume: Resume, overwrite: bool) -> None:
    """Check the folder once more, now that it is ours: another run may have come before. Delete it if asked to."""
    choose_out(config, resume=resume, overwrite=overwrite)
    if overwrite:
        remove_run(out)


def _train(runner: StageRunner, saved: checkpoint.Checkpoint | None, *, anew: bool, only_prepare: bool) -> RunResult:
    """Train from a checkpoint or from the start; `anew` in the folder of a run that has none."""
    config, ranks, out = runner.config, runner.ranks, runner.out
    ranks.from_first(partial(recommend_variables, config))
    if saved is not None:
        runner.resume_after(saved)
    runner.made = ranks.from_first(lambda: made_before(config, out, runner.done))
    left = ranks.from_first(lambda: stages_left(config, out, runner.done, only_prepare=only_prepare))
    if left and not only_prepare:
        ranks.from_first(partial(_check_room, config, out))
    # Not before: what is refused must not stand there.
    ranks.from_first(on_files(lambda: _write_settings(config, out), out))
    if anew:
        ranks.from_first(on_files(partial(begin_anew, out), out))
    exports = [stage.next_model for stage in left if stage.next_model is not None]
    ranks.from_first(on_files(partial(clear_the_way, exports, saved), out))
    hours = config.train.max_hours
    with stop_signals(seconds=3600 * hours if hours else float("inf")) as stops, closing(runner):
        runner.stops = stops
        for stage in left:
            if runner.is_told_to_stop():  # while the stage before was exported, say: nothing of this one is begun
                break
            with closing(build(config, ranks, stage=stage.number, model=stage.model)) as run:
                if saved is None and stage.record is None and runner.saved is None:
                    _check_room_once_loaded(runner, run)
                if saved is not None and runner.done > stage.first and stage.record is None:
                    restore(run, saved)
                _run_stage(runner, run, stage)
                if runner.interrupted:
                    break
            del run  # else two stages' models would be in memory while the next is loaded
            gc.collect()
        return runner.finish()


def _check_room(config: Config, out: Path) -> None:
    """Raise CheckpointError where the disk has no room for a checkpoint, as far as that is known without loading."""
    checkpoint.check_room(out / "checkpoints")
    check_room_before_loading(config, out)


def _check_room_once_loaded(runner: StageRunner, run: Run) -> None:
    """Raise CheckpointError where the disk has no room for a checkpoint of the loaded model."""
    parameters = list(run.loaded.model.parameters())
    whole, trained = (
        sum(getattr(p, "ds_numel", p.numel()) for p in some)
        for some in (parameters, [p for p in parameters if p.requires_grad])
    )
    dtype = str(parameters[0].dtype).removeprefix("torch.")
    sizes = count_sizes(runner.config, trained=trained, whole=whole, dtype=dtype)
    runner.ranks.from_first(partial(check_room_at_first, runner.config, runner.out, sizes))


def _write_settings(config: Config, out: Path) -> None:
    """Write the run's settings, and where what comes from outside of this repository came from."""
    warn_of_changes(config, out)
    write_config(config, out)
    (out / STOPPED).unlink(missing_ok=True)
    write_taken(config, out)


def _run_stage(runner: StageRunner, run: Run, stage: RunStage) -> None:
    """Run one stage and export its model. Raises EngineError, HealthError and NumbersError with the way on in
    their messages."""
    try:
        runner.run_stage(run, stage)
    except EngineError as error:
        raise engine_lost(runner, run, stage, error) from error
    except NumbersError as error:
        raise no_numbers(runner, error) from error
    except HealthError as error:
        runner.ranks.agree(partial(_raise, given_up(runner, run, stage, error)))
    runner.note_stop()  # before the export, which may take longer than whoever stopped us waits
    if run.loop.stage.trains and (runner.done > stage.first if runner.interrupted else stage.last):
        run.export(runner.out / "export")
    elif stage.next_model is not None:
        run.export(stage.next_model)  # whole or absent: a resume takes one that is there for whole


def _raise(error: Exception) -> NoReturn:
    raise error
