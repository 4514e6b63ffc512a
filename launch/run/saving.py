"""The checkpoints of a run: what stands in them, which of them stay, and from which one a run goes on.

`opd.checkpoint` writes and verifies folders; here is what stands in those of a run. docs/runs.md says it for users.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError

from opd import checkpoint
from opd.backends.config import TrainConfig
from opd.config import Strict
from opd.errors import CheckpointError, OpdError
from opd.launch.run.build import Run
from opd.launch.run.score import Score
from opd.models.whole import not_finite
from opd.ranks.ranks import Ranks
from opd.tracking import last_row, put_rows_aside


class RunRecord(Strict):
    """What a checkpoint says of its run (`run.json`)."""

    step: int = Field(ge=0)
    ranks: int = Field(ge=1)
    teacher_updates: int = Field(ge=0)
    teacher_fingerprint: str
    policy_version: int = Field(ge=0)
    config: dict[str, Any]
    before: list[bool | None] | None
    """The outcomes of the evaluation before training."""
    after: list[bool | None] | None
    """Those of these weights, if they were evaluated."""
    success: float | None
    finite: bool
    streaks: dict[str, int]


def run_record(saved: checkpoint.Checkpoint) -> RunRecord:
    """Read what a checkpoint says of its run. Raises CheckpointError where that is not what a run writes."""
    record = saved.record("run")
    if not isinstance(saved.record("method"), dict):
        raise CheckpointError(f"{saved.folder}: its method.json is not what a run writes")
    try:
        found = RunRecord.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise CheckpointError(
            f"{saved.folder}: its run.json is not what a run writes ({where}: {first['msg']})"
        ) from None
    if saved.folder.name != f"step-{found.step}":
        raise CheckpointError(f"{saved.folder}: its run.json is of step {found.step}; the folder has another name")
    return found


def newest_checkpoint(out: Path, ranks: Ranks, *, anew: bool) -> checkpoint.Checkpoint | None:
    """Return the newest checkpoint; None for a run that was stopped before its first, which begins again.

    Where such a run has rows of steps, it does so only if it may begin `anew`. Raises CheckpointError where it may not,
    or where no checkpoint is whole.
    """
    ranks.from_first(partial(_sweep, out))
    if ranks.from_first(lambda: bool(checkpoint.step_folders(out / "checkpoints"))):
        return checkpoint.latest(out / "checkpoints", ranks, check=run_record)
    if not anew:
        ranks.from_first(partial(_check_no_rows, out))
    return None


def _sweep(out: Path) -> None:
    """Delete what a run that was killed while it wrote has left in its folder."""
    checkpoint.sweep(out / "checkpoints")
    for pattern in (".*.partial", "data/.*.partial", "data/*/.*.partial"):
        for left in out.glob(pattern):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _check_no_rows(out: Path) -> None:
    step = last_row(out)
    if step is not None:
        raise CheckpointError(
            f"{out} has rows up to step {step}, but no checkpoint to go on from. Begin anew and keep them beside the "
            "new ones (--resume auto), or delete the run (--overwrite)"
        )


def begin_anew(out: Path) -> None:
    """Put the rows of a run that has no checkpoint aside, and say so."""
    aside = ", ".join(path.name for path in put_rows_aside(out))
    print(
        f"{out} holds no checkpoint yet: its training begins anew{f'; its rows are kept in {aside}' if aside else ''}",
        file=sys.stderr,
        flush=True,
    )


def clear_the_way(exports: Iterable[Path], saved: checkpoint.Checkpoint | None) -> None:
    """Remove exports of stages still to be run and put newer checkpoints aside: they are of an earlier attempt."""
    for folder in exports:
        if folder.is_dir():
            shutil.rmtree(os.path.realpath(folder))  # where it is a link, the link stays, for the export to come
        elif folder.is_file():
            folder.unlink()
    if saved is not None:
        checkpoint.put_aside_after(saved.folder)


def save(run: Run, out: Path, step: int, before: Score | None, after: Score | None) -> None:
    """Save after `step`, whose weights were evaluated as `after` says, if they were; on all ranks. Then delete the
    checkpoints that no setting keeps. Raises CheckpointError where the disk does not take it."""
    loop, models, ranks = run.loop, run.loop.models, run.loop.player.ranks
    root = out / "checkpoints"
    broken = ranks.any(bool(not_finite(models.student)))  # by the last update, whose own numbers were finite
    checkpoint.save(
        root / f"step-{step}",
        parts=[
            models.backend.save,
            lambda folder: models.teacher.own.save(folder, ranks),
            lambda folder: torch.save(torch.get_rng_state(), folder / f"rng-{ranks.rank}.pt"),
        ],
        records={
            "run": RunRecord(
                step=step,
                ranks=ranks.world_size,
                teacher_updates=models.teacher.updates,
                teacher_fingerprint=models.teacher.fingerprint,
                policy_version=loop.player.version,
                config=run.config.shown(),
                before=None if before is None else list(before.outcomes),
                after=None if after is None else list(after.outcomes),
                success=after.rate if after is not None and after.played else None,
                finite=loop.finite and not broken,
                streaks=dict(loop.player.health.streaks),
            ).model_dump(),
            "method": run.method.state_dict(),
        },
        ranks=ranks,
    )
    if ranks.first:
        checkpoint.rotate(root, run.config.train.keep_last, keep=_worth_keeping(root, run.config.train))


def save_is_due(train: TrainConfig, step: int, saved_at: float, ranks: Ranks) -> bool:
    """True: by steps or by the first rank's clock, whichever comes first. False: neither asks for a checkpoint.

    `saved_at` is when the last one was saved, by `time.monotonic`.
    """
    if train.save_every and step % train.save_every == 0:
        return True
    late = time.monotonic() - saved_at >= 60 * train.save_minutes
    return bool(train.save_minutes) and ranks.from_first(lambda: late)


def _worth_keeping(root: Path, train: TrainConfig) -> list[Path]:
    """Return the last checkpoint whose updates were finite and, if asked for, the one whose evaluation was best (the
    later of two)."""
    scored = [(_record(path)["success"], number, path) for number, path in enumerate(checkpoint.step_folders(root))]
    best = max((entry for entry in scored if entry[0] is not None), default=None) if train.keep_best else None
    return finite_checkpoints(root)[-1:] + ([best[2]] if best else [])


def finite_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints of steps whose updates were finite, oldest first."""
    return [path for path in checkpoint.step_folders(root) if _record(path)["finite"]]


def _record(folder: Path) -> dict[str, Any]:
    """Read what a checkpoint says of its step; a damaged one counts as not finite and not evaluated."""
    try:
        return {"finite": False, "success": None, **json.loads((folder / "run.json").read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError):
        return {"finite": False, "success": None}


def restore(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Load a checkpoint of this run's stage; on all ranks. Raises CheckpointError where it does not fit the run."""
    record, player, models = run_record(saved), run.loop.player, run.loop.models
    backend, teacher, ranks = models.backend, models.teacher, player.ranks
    if record.teacher_fingerprint != teacher.fingerprint:
        raise CheckpointError(
            f"{saved.folder} was taught by other weights (fingerprint {record.teacher_fingerprint!r}) than "
            f"teacher.model = {player.stage.teacher.model!r} holds now ({teacher.fingerprint!r}). Put the teacher "
            "back, or start afresh."
        )
    with _or_checkpoint_error(saved.folder):
        backend.load(saved.folder, saved_ranks=record.ranks)
        teacher.own.load(saved.folder, ranks, saved_ranks=record.ranks)
        if record.ranks == ranks.world_size:
            torch.set_rng_state(torch.load(saved.folder / f"rng-{ranks.rank}.pt", weights_only=True))
        run.method.load_state_dict(saved.record("method"))
    teacher.updates = record.teacher_updates
    player.version = record.policy_version
    player.health.streaks.update(record.streaks)


@contextmanager
def _or_checkpoint_error(folder: Path) -> Iterator[None]:
    """Turn whatever a file raises that holds something else than it should into a CheckpointError."""
    try:
        yield
    except OpdError:
        raise
    except Exception as error:  # safetensors, torch, pickle and the parts of a method have an error each
        told = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"{folder} cannot be taken up: {told}. To go on from an older checkpoint, rename this one "
            f"({folder.name}.damaged) and start again with --resume"
        ) from error
