"""The stages of a run: which steps each has, where its model comes from, and which of them are still to be run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from opd.disk import write_whole
from opd.errors import CheckpointError
from opd.launch.settings.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStage:
    """One stage among the steps of a run.

    Of a run with 3 steps of SFT and 5 of OPD, the second stage is `RunStage(number=1, first=3, end=8,
    model=out / "export-stage-1", next_model=None, record=None, last=True)`.
    """

    number: int
    """From 0."""
    first: int
    """The steps of the stages before it."""
    end: int
    """Its own steps and those before it."""
    model: Path | None
    """The export that it starts from; None for the run's own model."""
    next_model: Path | None
    """The export of its own model for the stages after it; None where it trains none, or there are none."""
    record: Path | None
    """Of a stage without steps: the file that says that it is over, and the numbers that it made."""
    last: bool


def stages_of(config: Config, out: Path) -> list[RunStage]:
    """Return all stages of the run in the folder `out`."""
    ends = list(accumulate(config.stage_steps))
    stages: list[RunStage] = []
    model = None
    for n, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        last, trains = n == len(ends) - 1, config.stages[n].trains
        stage = RunStage(
            number=n,
            first=first,
            end=end,
            model=model,
            next_model=out / f"export-stage-{n + 1}" if trains and not last else None,
            record=None if trains else out / f"data/stage-{n + 1}.json",
            last=last,
        )
        model = stage.next_model or model
        stages.append(stage)
    return stages


def stages_left(config: Config, out: Path, done: int, *, only_prepare: bool) -> list[RunStage]:
    """Return the stages that are still to be run after `done` steps, in their order.

    A stage is over once it is both trained and exported, or, without steps, once its data is there. With
    `only_prepare`, those after the last stage without steps are left out.

    Raises CheckpointError where a stage without steps made its data under other settings.
    """
    stages = stages_of(config, out)
    left = [stage for stage in stages if not is_over(config, out, stage, done)]
    if not only_prepare:
        return left
    prepares = max(stage.number for stage in stages if stage.record is not None)
    return [stage for stage in left if stage.number <= prepares]


def made_before(config: Config, out: Path, done: int) -> dict[str, float]:
    """Return the numbers of the stages without steps that are over and whose row, the one after `done`, is to come."""
    made: dict[str, float] = {}
    for stage in stages_of(config, out):
        if stage.record is not None and stage.end == done and is_over(config, out, stage, done):
            made |= made_by(config, stage)
    return made


def is_over(config: Config, out: Path, stage: RunStage, done: int) -> bool:
    """True: the stage needs no more work after `done` steps. False: it is still to be run, or its data is gone."""
    if stage.record is not None:
        made = made_by(config, stage)
        return bool(made) and config.stages[stage.number].holds(out / "data", made)
    return done >= stage.end and stage.next_model is not None and stage.next_model.is_dir()


def made_by(config: Config, stage: RunStage) -> dict[str, float]:
    """Return the numbers that a stage without steps wrote down when it was over; none where it is not over.

    Raises CheckpointError where its record cannot be read, or was made under other settings.
    """
    assert stage.record is not None
    try:
        record: dict[str, Any] = json.loads(stage.record.read_text(encoding="utf-8"))
        saved, made = dict(record["config"]), dict(record["made"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{stage.record} cannot be read ({error}); delete it, and the stage is made anew"
        ) from error
    check_same_settings(stage.record, config.differs(saved))
    return made


def write_record(config: Config, stage: RunStage, made: dict[str, float]) -> None:
    """Write down that a stage without steps is over, so that the file is whole or absent."""
    assert stage.record is not None
    write_whole(stage.record, json.dumps({"config": config.shown(), "made": made}))


def check_same_settings(saved: Path, changed: Sequence[str]) -> None:
    """Raise CheckpointError where settings `changed` since `saved` was written."""
    if changed:
        raise CheckpointError(
            f"{saved} was saved under other settings: {', '.join(changed)}. Resume with the settings of the saved "
            "run (eval, tracking and, of a run of one stage, train.steps may change), or start afresh."
        )
