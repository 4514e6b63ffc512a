"""A backend without an optimiser, for a stage without steps: its model plays or scores, in one process."""

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
    """A backend that only lets the model be used."""

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
        """Run `work`, which uses the model."""
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
        """Do nothing: there is nothing to free."""
