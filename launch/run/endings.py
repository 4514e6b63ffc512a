"""How a run ends that cannot go on: its last whole step is saved if possible, and the error says the way on."""

from __future__ import annotations

from opd import checkpoint
from opd.errors import EngineError, HealthError, NumbersError
from opd.launch.run.build import Run
from opd.launch.run.runner import StageRunner
from opd.launch.run.saving import finite_checkpoints
from opd.launch.run.stages import RunStage


def engine_lost(runner: StageRunner, run: Run, stage: RunStage, error: EngineError) -> EngineError:
    """Save the last whole step if the weights are still its, and return the error with the way on in it.

    Of several ranks, only one may have lost its engine: they go on from their last checkpoint.
    """
    if runner.done > stage.first and runner.ranks.world_size == 1 and not run.loop.halfway:
        return EngineError(f"{error} {_save_last_step(runner, run)}")
    saved = checkpoint.step_folders(runner.out / "checkpoints")
    way_on = f" The last checkpoint is {saved[-1].name}: opd train {runner.out} --resume" if saved else ""
    return EngineError(f"{error}{way_on}")


def given_up(runner: StageRunner, run: Run, stage: RunStage, error: HealthError) -> HealthError:
    """Save the last whole step if its updates were finite, and return the error with the way on in it."""
    if runner.done > stage.first and run.loop.finite and not run.loop.halfway:
        return HealthError(f"{error} {_save_last_step(runner, run)}")
    return HealthError(f"{error}{_last_finite(runner)}")


def no_numbers(runner: StageRunner, error: NumbersError) -> NumbersError:
    """Return the error with the way on in it; the weights as they are are not saved.

    Only one rank may have met it: they go on from their last checkpoint.
    """
    return NumbersError(f"{error}.{_last_finite(runner)}")


def _last_finite(runner: StageRunner) -> str:
    """Return the sentence that names the last checkpoint whose updates were finite; nothing where there is none."""
    finite = finite_checkpoints(runner.out / "checkpoints")
    if not finite:
        return ""
    return (
        f" {finite[-1]} is the last checkpoint whose updates were finite: --resume goes on from there once those after "
        "it are deleted."
    )


def _save_last_step(runner: StageRunner, run: Run) -> str:
    """Save a checkpoint and return the sentence that says how to go on from it."""
    runner.save(run)
    return f"Step {runner.done} is saved: opd train {runner.out} --resume"
