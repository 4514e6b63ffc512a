"""No training: a model that plays or scores in a stage without steps, in one process. It has no optimiser."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from opd.models.causal import CausalModel
from opd.objective.objective import Objective
from opd.ranks.ranks import Ranks

T = TypeVar("T")


class IdleBackend:
    """What is asked of a backend where nothing trains."""

    ranks = Ranks()
    lr = 0.0
    scales_loss = False

    def __init__(self, model: CausalModel) -> None:
        self.model = model.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def look(self, work: Callable[[], T]) -> T:
        """Use the model."""
        return work()

    def train(self, work: Callable[[], Objective], *, last: bool) -> Objective:
        raise RuntimeError("a stage without steps trains nothing")

    def step(self) -> float:
        raise RuntimeError("a stage without steps trains nothing")

    def save(self, folder: Path) -> None:
        raise RuntimeError("a stage without steps has nothing to save")

    def load(self, folder: Path, *, saved_ranks: int) -> None:
        raise RuntimeError("a stage without steps has nothing to load")

    def close(self) -> None:
        """There is nothing to give back."""
