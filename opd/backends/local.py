"""One process, plain torch: AdamW, a schedule, clipping. The interface that every backend has.

Gradients of micro-batches are summed, never averaged: weights are already divided by the step's
denominators (`opd.collate.normalise`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from opd.config import TrainConfig
from opd.errors import ModelError
from opd.modeling import CausalModel


class LocalBackend:
    """Owns the optimiser and the schedule of one model in this process."""

    rank = 0
    world_size = 1

    def __init__(self, model: CausalModel, config: TrainConfig, *, total_steps: int) -> None:
        self.model = model
        self.config = config
        self._trained = [p for p in model.parameters() if p.requires_grad]
        if not self._trained:
            raise ModelError("no parameter of the model requires a gradient: there is nothing to train")
        self.optimizer = torch.optim.AdamW(
            self._trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.scheduler = get_scheduler(
            config.lr_schedule,
            self.optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=total_steps,
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def lr(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def all_sum(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks."""
        return values

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch."""
        loss.backward()

    def step(self) -> float:
        """Clip, update, advance the schedule; the gradients' norm before clipping.

        A norm that is not finite leaves weights and optimiser as they were: one bad batch must not end in
        a model of nans. It is counted by whoever reads the norm.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained, self.config.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and schedule; the model's weights are saved beside it."""
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
