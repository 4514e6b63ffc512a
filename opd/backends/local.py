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
        # The steps of AdamW vanish in 16 bits (a weight of 0.02 knows no change below 6e-5): they are taken on
        # float32 copies, and the model's weights are these copies rounded.
        self._masters = [p.detach().float() if p.itemsize < 4 else p for p in self._trained]
        self.optimizer = torch.optim.AdamW(
            self._masters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
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

        A norm that is not finite leaves weights, optimiser and schedule as they were: one bad batch must not
        end in a model of nans. It is counted by whoever reads the norm.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained, self.config.max_grad_norm))
        if math.isfinite(norm):
            self._update()
            self.scheduler.step()
        for parameter in self._trained:
            parameter.grad = None
        return norm

    @torch.no_grad()
    def _update(self) -> None:
        copies = [(p, m) for p, m in zip(self._trained, self._masters, strict=True) if m is not p]
        for parameter, master in copies:
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self.optimizer.step()
        for parameter, master in copies:
            parameter.copy_(master)
            master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and schedule; the model's weights are saved beside it, their float32 copies here."""
        masters = [m for p, m in zip(self._trained, self._masters, strict=True) if m is not p]
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "masters": masters,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        masters = [m for p, m in zip(self._trained, self._masters, strict=True) if m is not p]
        for master, saved in zip(masters, state["masters"], strict=True):
            master.copy_(saved)
