"""The interface of a backend: it holds the student's weights, gradients and optimiser, on one process or on many."""

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

    The model is used inside `train` and `look` alone, which all ranks call equally often: a backend that
    shards weights talks to the other ranks there. Gradients of micro-batches and ranks are summed, never
    averaged: weights are already divided by the step's denominators (`opd.objective.collate.normalise`).
    """

    ranks: Ranks

    @property
    def scales_loss(self) -> bool:
        """True: a loss scale (float16) skips updates until it has found its size, and ends the run if it finds none.

        An update that it skips is no fault of the run.
        """
        ...

    @property
    def device(self) -> torch.device:
        """The device that batches are moved to."""
        ...

    @property
    def lr(self) -> float: ...

    def train(self, work: Callable[[], Objective], *, last: bool) -> Objective:
        """Run `work`, the forward pass of one micro-batch, then its backward pass; `last` marks the step's last one."""
        ...

    def look(self, work: Callable[[], T]) -> T:
        """Run `work`, which uses the model, without making a graph."""
        ...

    def step(self) -> float:
        """Clip, update and advance the schedule; return the gradients' norm before clipping.

        A norm that is not finite leaves weights, optimiser and schedule as they were: one bad batch must not
        end in a model of nans. The caller counts such steps.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the trained weights, optimiser and schedule; every rank writes its part."""
        ...

    def load(self, folder: Path, *, saved_ranks: int) -> None:
        """Read what `save` wrote. Raises CheckpointError where the folder holds other weights than this model's."""
        ...

    def close(self) -> None:
        """Free what training takes; neither this object nor the model can be used any more."""
        ...
