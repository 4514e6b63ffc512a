"""`opd eval`: success on held-out tasks of a trained run, or of a model as it is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.table import Table

from opd.errors import CheckpointError
from opd.launch.checks.outside import warn_of_changes
from opd.launch.checks.weights import settings_of
from opd.launch.run.build import build
from opd.launch.run.ranks import ranks_of
from opd.launch.run.score import Score
from opd.launch.settings.config import Config
from opd.tracking.console import LastingConsole, RunConsole
from opd.types import TrajectoryGroup


def evaluate_run(config: Config, *, run: Path | None = None) -> Score:
    """Play `config.eval.tasks` held-out tasks and print the result.

    With `run`, the weights are those of the run's export. Raises CheckpointError when it has none yet.
    """
    if run is not None:
        warn_of_changes(config, run)
        export = run / "export"
        if not (export / "config.json").is_file():
            raise CheckpointError(f"{run} has no export yet: it has not finished. Go on with: opd train {run} --resume")
        # An export holds merged weights: adapters would be trained on top of it, not loaded from it.
        model = settings_of(config, str(export)).model_copy(update={"lora": None})
        config = config.model_copy(update={"model": model})
    # Playing needs no gradients: one process will do, whatever trained the run.
    config = config.model_copy(update={"backend": "local", "deepspeed": None})
    built = build(config, ranks_of(config), stage=None)
    console = RunConsole(total_steps=0, enabled=config.tracking.console)
    try:
        with console.phase("evaluate"):
            console.expect(config.eval.tasks)
            score, groups = built.evaluate(on_finish=lambda _: console.advance())
    finally:
        console.close()
        built.close()
    LastingConsole().print(_table(str(run or config.model.name), score, groups))
    return score


def _table(title: str, score: Score, groups: list[TrajectoryGroup]) -> Table:
    """Make the table of an evaluation."""
    episodes = [t for group in groups for t in group.trajectories]
    table = Table(title=title, title_justify="left", show_header=False)
    low, high = score.interval
    interval = f"  (95%: {low:.1%} to {high:.1%})" if score.played else ": the environment broke in every episode"
    table.add_row("success", f"{score.rate:.1%}{interval}" if score.played else f"not measured{interval}")
    table.add_row("episodes", f"{score.solved} of {score.played} solved")
    measured = [t for t in episodes if t.failed is None and not t.unscored]
    if measured:
        table.add_row("mean reward", f"{sum(t.reward for t in measured) / len(measured):.3f}")
    unscored = sum(t.unscored for t in episodes)
    table.add_row("broken", f"{score.broken - unscored}, not measured" if score.broken > unscored else "0")
    if unscored:
        table.add_row("not scored", f"{unscored}, not measured: every reward function returned None")
    ends = Counter(t.end for t in episodes).most_common()
    table.add_row("ended by", ", ".join(f"{end} {count}" for end, count in ends))
    return table
