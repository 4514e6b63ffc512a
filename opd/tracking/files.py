"""JSON lines on disk: appended as whole rows, and cut back atomically when a run resumes.

A number that JSON cannot hold (nan, inf) is written as null: every reader copes with that, and a diverged
loss leaves its trace in the file instead of an exception in the middle of training.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from opd.errors import DataError
from opd.secrets import redacted
from opd.standing import ADVICE
from opd.types import Trajectory

Row = dict[str, Any]


class JsonLines:
    """Appends rows to a file, without secrets, each flushed when it is written.

    Raises DataError where the disk does not take it, or the file was deleted or moved: no row is written into nothing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._attempt(self._open)

    def _open(self) -> None:
        # A lone surrogate, which UTF-8 has no bytes for, comes out as the escape that JSON has for it.
        self._file = self._path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")

    def write(self, row: Row) -> None:
        # A tool argument may be any object that a template could render; its text is enough for a reader.
        text = json.dumps(redacted(row), ensure_ascii=False, allow_nan=False, default=str) + "\n"
        self._attempt(lambda: self._append(text))

    def sync(self) -> None:
        """Let the disk have what was written: a checkpoint that is whole has its rows beside it."""
        self._attempt(lambda: os.fsync(self._file.fileno()))

    def close(self) -> None:
        with suppress(OSError):  # every row was flushed; what a full disk did not take was said then
            self._file.close()

    def _append(self, text: str) -> None:
        if not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
            raise OSError("another file has its name now")
        self._file.write(text)
        self._file.flush()

    def _attempt(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            raise DataError(f"{self._path} cannot be written: {error}. {_mend(error)}") from error


def _mend(error: OSError) -> str:
    """Say what helps where a row could not be written."""
    if isinstance(error, FileNotFoundError) or error.errno is None:
        return "It was moved or deleted while its run was alive: put it back, and go on with --resume"
    if error.errno == errno.EBADF:
        return f"Something in this process closed it: go on with --resume. {ADVICE}"
    return "Make room, and go on with --resume"


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a file; [] where there is none.

    A row after the last line break was left half written by a killed process, and is not counted. Raises DataError,
    with the line's number, for a whole line that is no row.
    """
    return [row for row, _ in _lines(path)]


def last_value(path: Path, name: str) -> float | None:
    """Return the number that the last row with one has under this name; None where no row has, or none can be read."""
    found, key = None, json.dumps(name)
    with suppress(OSError, ValueError, TypeError), path.open(encoding="utf-8") as file:
        for line in file:
            if key in line:
                found = float(json.loads(line)[name])
    return found


def make_ready(path: Path, resume_step: int) -> None:
    """Make a file ready for the rows after `resume_step`.

    Rows of later steps are cut, since these steps are trained again. At 0 the run is new, and a file that
    already has rows is refused with DataError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if resume_step > 0:
        cut(path, resume_step)
    elif path.exists() and path.stat().st_size:
        raise DataError(f"{path} already has rows of another run; resume that run, or choose another folder")


def cut(path: Path, last_step: int) -> None:
    """Remove the rows after `last_step`, and a half-written one, in one atomic replacement."""
    kept = b"".join(line for row, line in _lines(path) if row["step"] <= last_step)
    if not path.exists() or path.stat().st_size == len(kept):
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def check_steps(path: Path, last_step: int) -> str | None:
    """Say which steps up to `last_step` have no row in a file, beside a checkpoint that says that they were taken.

    Raises DataError where a step has two rows.
    """
    lines: dict[int, int] = {}
    for number, (row, _) in enumerate(_lines(path), start=1):
        if (first := lines.setdefault(row["step"], number)) != number:
            raise DataError(f"{path}: step {row['step']} has two rows, lines {first} and {number}; remove one to go on")
    return _missing(path, set(range(1, last_step + 1)) - lines.keys())


def check_episodes(path: Path, metrics: Path, last_step: int) -> str | None:
    """Say which steps up to `last_step` that sampled, as their rows in `metrics` tell, have no episode in a file."""
    sampled = {row["step"] for row in read_rows(metrics) if row["step"] <= last_step and row.get("tokens/sampled")}
    return _missing(path, sampled - {row["step"] for row in read_rows(path)})


def _missing(path: Path, steps: set[int]) -> str | None:
    missing = sorted(steps)
    if not missing:
        return None
    few = ", ".join(map(str, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    return f"{path.name} has no row of step {few}, which the checkpoint has: the rows are lost, and the run goes on"


def _lines(path: Path) -> list[tuple[Row, bytes]]:
    if not path.exists():
        return []
    if not path.is_file():
        raise DataError(f"{path} is no file; move it away to go on without its rows")
    *whole, _ = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(whole, start=1):
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is damaged ({error}); remove the line to go on") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise DataError(f"{path}, line {number} has no step; remove the line to go on")
        rows.append((row, line + b"\n"))
    return rows


def numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    """Convert metrics to plain int and float, whatever kind of scalar they are. Raises DataError with the key."""
    plain: dict[str, float] = {}
    for key, value in metrics.items():
        try:
            plain[key] = value if type(value) is int else float(value)
        except (TypeError, ValueError) as error:
            raise DataError(f"metric {key!r} must be a number, got {value!r}") from error
    return plain


def json_row(step: int, plain: Mapping[str, float]) -> Row:
    """Write one row of metrics.jsonl as text."""
    return {"step": step} | {key: value if math.isfinite(value) else None for key, value in plain.items()}


def episode_row(step: int, trajectory: Trajectory) -> Row:
    """Make one row of rollouts.jsonl: the outcome first, the conversation last."""
    turns = trajectory.turns
    return {
        "step": step,
        "task": trajectory.task.id,
        "seed": trajectory.task.seed,
        "member": trajectory.member,
        "reward": _null_unless_finite(trajectory.reward),
        "success": trajectory.success,
        "end": trajectory.end,
        "failed": trajectory.failed,
        "tokens": trajectory.completion_tokens,
        "rewards": [_null_unless_finite(turn.reward) for turn in turns],
        "reward_parts": trajectory.reward_parts,
        **({"unscored": True} if trajectory.unscored else {}),
        **({"ungraded": trajectory.ungraded} if trajectory.ungraded else {}),
        **({"notes": trajectory.notes} if trajectory.notes else {}),
        "stop_reasons": [str(turn.stop_reason) for turn in turns],
        "feedback": [turn.feedback for turn in turns],
        "policy_version": trajectory.policy_version,
        "privileged": trajectory.privileged,
        "messages": trajectory.messages,
    }


def _null_unless_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
