"""What `opd demo` found: kept as it comes, so that a stop costs one run, and shown as a table and a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.table import Table

from opd.launch.run.score import Score
from opd.launch.tiny import definitions
from opd.tracking import read_rows
from opd.tracking.plots import Curve, curves, success_curve

_CODE = (("opd.launch.cli.demo", "demo"), ("opd.trainers.opsd", "Opsd"), ("opd.envs.worlds.lookup", "LookupEnv"))
"""What the demo runs; the last two are looked up by their names."""


@dataclass(slots=True)
class Outcome:
    """The scores of one seed, all on the same tasks; written to a file whenever one is added."""

    seed: int
    path: Path
    made_by: str
    """Says what made them; those of another code or model are not taken over."""
    scores: dict[str, Score] = field(default_factory=dict)
    """`before`; `teacher`, the untrained model that sees what its teacher sees; `opsd`; `control`."""
    steps: int = 0
    """Those of the agent, and of its control."""

    @classmethod
    def kept(cls, seed: int, path: Path, made_by: str) -> Outcome:
        """Return what an earlier call left there, or nothing yet."""
        outcome = cls(seed, path, made_by)
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["made_by"] == made_by:
                scores = {name: Score(tuple(outcomes)) for name, outcomes in found["scores"].items()}
                outcome.scores, outcome.steps = scores, int(found["steps"])
        return outcome

    @property
    def is_whole(self) -> bool:
        """True: nothing is left to do. False: a score is missing."""
        return self.scores.keys() == {"before", "teacher", "opsd", "control"}

    def add(self, **scores: Score) -> None:
        """Take scores in, and write all of them."""
        self.scores |= scores
        outcomes = {name: score.outcomes for name, score in self.scores.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{self.path.name}.partial")
        aside.write_text(
            json.dumps({"made_by": self.made_by, "steps": self.steps, "scores": outcomes}), encoding="utf-8"
        )
        aside.rename(self.path)


def made_by(model: Path, settings: Sequence[Mapping[str, Any]]) -> str:
    """Return a text that changes with the code, the model and the settings that scores come from."""
    return sha256(repr((definitions.digest(_CODE), model.name, settings)).encode()).hexdigest()[:16]


def table(outcomes: Sequence[Outcome], *, tasks: int) -> Table:
    """Make the table that the demo ends with."""
    made = Table(title=f"held-out success, {tasks} tasks, greedy (95% intervals)", title_justify="left")
    for column in ("seed", "before", "teacher with its plan", "steps", "after OPSD", "change", "control, after"):
        made.add_column(column)
    for outcome in outcomes:
        scores = outcome.scores
        change = scores["before"].change(scores["opsd"])
        points, low, high = (f"{100 * value:+.0f}" for value in change or (math.nan,) * 3)
        made.add_row(
            str(outcome.seed),
            scores["before"].short,
            scores["teacher"].short,
            str(outcome.steps),
            f"[bold green]{scores['opsd'].short}[/]",
            f"{points} points ({low} to {high})" if change else "not measured",
            scores["control"].short,
        )
    return made


def draw(path: Path, folder: Path) -> None:
    """Plot held-out success over the steps, with and without something to learn from."""
    lines: list[Curve] = []
    for name, label in (("opsd", "OPSD"), ("control", "control")):
        rows = [row for row in read_rows(folder / name / "evals.jsonl") if row["eval/success"] is not None]
        tasks = [round(row["eval/tasks"]) for row in rows]
        solved = [round(row["eval/success"] * n) for row, n in zip(rows, tasks, strict=True)]
        lines.append(success_curve(label, [row["step"] for row in rows], solved, tasks))
    curves(
        path,
        lines,
        ylabel="Solved held-out tasks, greedy",
        title="A tool agent learns from itself, shown the plan",
        note=f"The control's teacher sees nothing extra. Bands: 95%, {tasks[0]} tasks.",
        percent=True,
    )
