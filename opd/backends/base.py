"""What trains: gradients, the optimiser and the weights of the student, on one process or on many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from opd.objective.objective import Objective
from opd.ranks.ranks import Ranks

T = TypeVar("T")


class Backend(Protocol):
    """Owns the optimiser and the schedule of one model.

    The model is used inside of `train` and `look` alone, which all ranks call equally often: a backend that
    shards weights talks to the other ranks there. Gradients of micro-batches and ranks are summed, never
    averaged: weights are already divided by the step's denominators (`opd.objective.collate.normalise`).
    """

    ranks: Ranks

    @property
    def scales_loss(self) -> bool:
        """Whether a loss scale (float16) skips updates until it has found its size, and ends the run if it finds none:
        an update that is skipped for it is no fault of the run."""
        ...

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        ...

    @property
    def lr(self) -> float: ...

    def train(self, work: Callable[[], Objective], *, last: bool) -> Objective:
        """The forward pass `work` of one micro-batch and its backward pass; `last` of the step's."""
        ...

    def look(self, work: Callable[[], T]) -> T:
        """Use the model without training it: no graph is made."""
        ...

    def step(self) -> float:
        """Clip, update, advance the schedule; the gradients' norm before clipping.

        A norm that is not finite leaves weights, optimiser and schedule as they were: one bad batch must not
        end in a model of nans. It is counted by whoever reads the norm.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the trained weights, optimiser and schedule; every rank its part."""
        ...

    def load(self, folder: Path, *, saved_ranks: int) -> None:
        """The reverse of `save`. Raises CheckpointError where the folder holds other weights than this model's."""
        ...

    def close(self) -> None:
        """Give back what training takes; neither this nor the model can be used any more."""
        ...
