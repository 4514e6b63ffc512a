"""Holds what TRL's trainer passes to reward functions besides columns: its state, and two functions to log with.

`trainer_state` has the fields of `transformers.TrainerState` that a run of ours knows, without importing that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from opd.errors import EnvError


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """Says where a run stands."""

    global_step: int = 0
    """Steps that the weights have seen; 0 where no trainer plays."""
    max_steps: int = 0
    """Steps of the run or of its stage; 0 where no trainer plays."""
    epoch: float = 0.0
    """The share of these steps that is over."""
    is_world_process_zero: bool = True
    is_local_process_zero: bool = True

    @classmethod
    def at(cls, step: int, steps: int) -> TrainerState:
        """Return the state of a run that has done `step` of its `steps`."""
        return cls(global_step=step, max_steps=steps, epoch=step / steps if steps else 0.0)


@dataclass(slots=True, kw_only=True)
class Log:
    """Collects what the functions of one batch log."""

    size: int
    """Completions in the batch."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def arguments(self, state: TrainerState) -> dict[str, Any]:
        """Return the arguments that TRL's trainer passes besides."""
        return {"trainer_state": state, "log_extra": self.log_extra, "log_metric": self.log_metric}

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Keep a value for each completion, to stand beside its episode. Raises EnvError for another number of them."""
        if len(values) != self.size:
            raise EnvError(f"log_extra({column!r}) got {len(values)} values for {self.size} completions")
        self.columns[str(column)] = list(values)

    def log_metric(self, name: str, value: float) -> None:
        """Keep a number of the batch. Raises EnvError where it is not finite."""
        if not math.isfinite(value):
            raise EnvError(f"log_metric({name!r}) got {value}, which is not finite")
        self.metrics.setdefault(str(name), []).append(float(value))

    def means(self) -> dict[str, float]:
        return {name: math.fsum(values) / len(values) for name, values in self.metrics.items()}

    def row(self, number: int) -> dict[str, Any]:
        """Return what was logged beside one completion, as plain data: what is none is written as text."""
        return {name: _plain(values[number]) for name, values in self.columns.items()}


OF_THE_TRAINER = ("trainer_state", "log_extra", "log_metric")
IDS = "completion_ids"
"""The argument that only a trainer can fill: the tokens of each completion, and of what it was told in between."""


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)
