"""The tracker: the loop gives it rows and episodes, and it writes them to files, wandb and the terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd.errors import DataError
from opd.tracking.config import TrackingConfig
from opd.tracking.console import RunConsole, span
from opd.tracking.files import (
    JsonLines,
    check_episodes,
    check_steps,
    cut,
    episode_row,
    json_row,
    make_ready,
    numbers,
    read_rows,
)
from opd.tracking.intervals import wilson
from opd.tracking.wandb_run import open_run
from opd.types import Trajectory

logger = logging.getLogger(__name__)


class Successes(Protocol):
    """The outcome of an evaluation, in counts."""

    @property
    def solved(self) -> int: ...

    @property
    def played(self) -> int:
        """The number of tasks that were measured."""
        ...

    @property
    def broken(self) -> int:
        """The number of tasks that were not measured because their environment broke."""
        ...


class Tracker:
    """Writes metrics.jsonl, rollouts.jsonl, wandb, the terminal and curves.png of one run.

    `resume_step` is the step of the checkpoint that the run goes on from, 0 for a new run; rows of later
    steps are cut from the files, since these steps are trained again. Close it with `finish`, or use it as
    a context manager. Raises DataError for a new run in a folder that already has rows, and ConfigError
    when wandb is asked for by name but not installed.
    """

    def __init__(
        self,
        folder: Path,
        config: TrackingConfig,
        *,
        run_config: Mapping[str, Any],
        total_steps: int,
        resume_step: int = 0,
        console: Console | None = None,
    ) -> None:
        self.folder = folder
        self._config = config
        self._last_step = resume_step if resume_step else -1
        self._pending: dict[str, float] = {}
        self._whole = False
        self._console = RunConsole(total_steps=total_steps, done=resume_step, enabled=config.console, console=console)
        metrics, rollouts, evals = _files(folder)
        for path in (metrics, rollouts, evals):
            make_ready(path, resume_step)
        if resume_step and (lost := check_steps(metrics, resume_step)):
            logger.warning("%s", lost)
        if config.rollouts_per_step and (lost := check_episodes(rollouts, metrics, resume_step)):
            logger.warning("%s", lost)
        self._wandb = open_run(
            folder,
            config,
            run_config=run_config,
            history=[(row.pop("step"), row) for row in _history(folder)],
            say=self._console.say,
        )
        self._metrics, self._rollouts, self._evals = JsonLines(metrics), JsonLines(rollouts), JsonLines(evals)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the row of a step, once each and in order. Raises DataError for what is no number, or out of order."""
        if step <= self._last_step:
            raise DataError(f"step {step} cannot be logged after step {self._last_step}: one row a step, in order")
        plain = numbers(self._pending | dict(metrics))
        self._metrics.write(json_row(step, plain))
        self._last_step, self._pending = step, {}
        if self._wandb is not None:
            self._wandb.log(step, plain)
        self._console.step(step, plain)

    def prepared(self, made: Mapping[str, float]) -> None:
        """Print what a stage made before its first step; its numbers join the row of that step."""
        if made:
            self._console.say("prepared: " + ", ".join(f"{name} {value:.5g}" for name, value in made.items()))

    def log_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write an evaluation of the weights after `step` steps as a row of evals.jsonl.

        Its numbers also join the next row of metrics.jsonl. Those of step 0 do not, since every row there is a
        training step: they are in evals.jsonl and in wandb alone.
        """
        plain = numbers(metrics)
        self._evals.write(json_row(step, plain))
        if step > 0:
            self._pending |= plain
            return
        if self._wandb is not None:
            self._wandb.log(0, plain)
        self._console.step(0, plain)

    def log_rollouts(self, step: int, trajectories: Sequence[Trajectory]) -> None:
        """Write `tracking.rollouts_per_step` of a step's episodes, of as many tasks as there are."""
        by_member = sorted(trajectories, key=lambda trajectory: trajectory.member)
        for trajectory in by_member[: self._config.rollouts_per_step]:
            self._rollouts.write(episode_row(step, trajectory))

    def episode_finished(self, _: Trajectory) -> None:
        """Count one finished episode of the current step or phase in the terminal."""
        self._console.advance()

    def expect(self, more: int | None, what: str = "episodes") -> None:
        """Tell the terminal that so many more of these are to come in the current step or phase."""
        self._console.expect(more, what)

    def advance(self, count: int) -> None:
        """Count so many more of what is expected in the terminal."""
        self._console.advance(count)

    def say(self, line: str) -> None:
        """Print a line in the terminal."""
        self._console.say(line)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show that this is going on, and add its seconds to the next row as `time/<name>`."""
        since = time.perf_counter()
        with self._console.phase(name):
            yield
        key = f"time/{name}"
        self._pending[key] = self._pending.get(key, 0.0) + time.perf_counter() - since

    def summary(
        self,
        *,
        before: Successes | None = None,
        after: Successes | None = None,
        change: tuple[float, float, float] | None = None,
        remarks: Callable[[Sequence[Mapping[str, float]]], list[str]] = lambda _: [],
    ) -> None:
        """End a run that went well: draw the picture, and print a table in the terminal.

        `before` and `after` are the evaluations of the first and the last weights; `change` is their
        difference with its interval, from `opd.tracking.intervals.paired_difference`. `remarks` says what is wrong
        with the rows of the steps.
        """
        self._whole = True
        self._console.close()
        rows = read_rows(self.folder / "metrics.jsonl")
        if self._config.plot:
            from opd.tracking.plots import run_picture

            run_picture(self.folder / "curves.png", _history(self.folder), title=self.folder.resolve().name)
        table = _table(self.folder, rows, before, after, change)
        for remark in remarks([{k: v for k, v in row.items() if v is not None} for row in rows]):
            table.add_row("look at", Text(remark, style="yellow"))
        self._console.show(table)

    def sync(self) -> None:
        """Let the disk have every row so far."""
        for rows in (self._metrics, self._rollouts, self._evals):
            rows.sync()

    def finish(self) -> None:
        """Close everything. A run that never came to its `summary` is marked as failed in wandb."""
        self._console.close()
        self._metrics.close()
        self._rollouts.close()
        self._evals.close()
        if self._wandb is not None:
            self._wandb.finish(0 if self._whole else 1)


class NoTracker:
    """The tracker of a rank that another one speaks for: takes everything, and writes nothing."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_eval(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def prepared(self, made: Mapping[str, float]) -> None: ...

    def log_rollouts(self, step: int, trajectories: Sequence[Trajectory]) -> None: ...

    def episode_finished(self, _: Trajectory) -> None: ...

    def expect(self, more: int | None, what: str = "episodes") -> None: ...

    def advance(self, count: int) -> None: ...

    def say(self, line: str) -> None: ...

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def summary(self, **_: Any) -> None: ...

    def sync(self) -> None: ...

    def finish(self) -> None: ...


def last_row(folder: Path) -> int | None:
    """Find the last step with a row in a run's files; None where no training step has one."""
    steps = [row["step"] for path in _files(folder) for row in read_rows(path)]
    return max((step for step in steps if step > 0), default=None)


def put_rows_aside(folder: Path) -> list[Path]:
    """Rename the files of a run that is to begin anew, so that no step of it is lost; return the new names.

    A file with nothing but the evaluation before the first step is emptied: that evaluation comes again.
    """
    moved = []
    for path in _files(folder):
        if not any(row["step"] > 0 for row in read_rows(path)):
            cut(path, -1)
        else:
            number = 1
            while (aside := path.with_name(f"{path.stem}.lost-{number}.jsonl")).exists():
                number += 1
            moved.append(path.rename(aside))
    return moved


def _files(folder: Path) -> list[Path]:
    return [folder / f"{name}.jsonl" for name in ("metrics", "rollouts", "evals")]


def _history(folder: Path) -> list[dict[str, Any]]:
    """Read the rows that wandb should show: of the evaluation before training, then of every step."""
    first = [row for row in read_rows(folder / "evals.jsonl") if row["step"] == 0]
    return [*first, *read_rows(folder / "metrics.jsonl")]


def _table(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    before: Successes | None,
    after: Successes | None,
    change: tuple[float, float, float] | None,
) -> Table:
    table = Table(title=f"run {folder.resolve().name}", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, score in (("before", before), ("after", after)):
        if score is not None:
            table.add_row(name, _success(score))
    if change is not None:
        points, low, high = (f"{100 * value:+.1f}" for value in change)
        table.add_row("change", f"{points} points  (95%: {low} to {high}, same tasks)")
    table.add_section()
    if rows:
        table.add_row("steps", str(rows[-1]["step"]))
    tokens = _totals(rows, "tokens/")
    if tokens:
        table.add_row("tokens", ", ".join(f"{count:,.0f} {name}" for name, count in tokens.items()))
    seconds = _totals(rows, "time/")
    whole = sum(seconds.values())
    if whole:
        large = {name: part for name, part in seconds.items() if part >= 0.005 * whole}
        shares = ", ".join(f"{name} {span(part)} ({part / whole:.0%})" for name, part in large.items())
        table.add_row("time", f"{span(whole)}: {shares}")
    table.add_section()
    table.add_row("folder", str(folder.relative_to(here)) if folder.is_relative_to(here := Path.cwd()) else str(folder))
    names = [path.name + "/" * path.is_dir() for path in folder.iterdir() if path.suffix != ".lock"]
    table.add_row("", ", ".join(sorted(names)))
    return table


def _success(score: Successes) -> Text:
    if not score.played:
        return Text(f"not measured: the environment broke in all of {score.broken} episodes", style="bold red")
    low, high = wilson(score.solved, score.played)
    broken = f", {score.broken} more not measured: their environment broke" if score.broken else ""
    return Text.assemble(
        (f"{score.solved / score.played:.1%}", "bold green"),
        f"  (95%: {low:.1%} to {high:.1%})  {score.solved} of {score.played} held-out tasks{broken}",
    )


def _totals(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, float]:
    """Sum each metric under this prefix over all rows; the names come without the prefix."""
    sums: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(prefix) and value is not None:
                sums[key.removeprefix(prefix)] = sums.get(key.removeprefix(prefix), 0.0) + value
    return sums
