"""The backend of one process, in plain torch: AdamW, a schedule, clipping."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd.backends.config import TrainConfig
from opd.backends.schedule import schedule_of
from opd.errors import CheckpointError, ModelError
from opd.models.causal import CausalModel
from opd.objective.objective import Objective
from opd.ranks.ranks import Ranks

T = TypeVar("T")


class LocalBackend:
    """Owns the optimiser and the schedule of one model in this process."""

    ranks = Ranks()
    scales_loss = False

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
            self._masters,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=model.device.type == "cuda" or None,  # elsewhere as torch thinks best
        )
        self.scheduler = schedule_of(config, self.optimizer, total_steps)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def lr(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def train(self, work: Callable[[], Objective], *, last: bool) -> Objective:
        """Run the forward and the backward pass of one micro-batch."""
        result = work()
        result.loss.backward()
        return result

    @torch.no_grad()
    def look(self, work: Callable[[], T]) -> T:
        """Run `work`, which uses the model, without making a graph."""
        return work()

    def step(self) -> float:
        """Clip, update and advance the schedule unless the gradients' norm is not finite; return the norm."""
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
            parameter.grad = None
        self.optimizer.step()
        for parameter, master in copies:
            parameter.copy_(master)
            master.grad = None

    def save(self, folder: Path) -> None:
        """Write the weights to `student.safetensors`; optimiser, schedule and float32 copies to `backend.pt`."""
        weights = {name: p.detach().cpu().contiguous() for name, p in self._trained_by_name()}
        save_file(weights, folder / "student.safetensors")
        state = {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "masters": [m for p, m in zip(self._trained, self._masters, strict=True) if m is not p],
        }
        torch.save(state, folder / "backend.pt")

    @torch.no_grad()
    def load(self, folder: Path, *, saved_ranks: int) -> None:
        """Read what `save` wrote. Raises CheckpointError where the folder holds other weights than this model's."""
        weights: dict[str, Tensor] = load_file(folder / "student.safetensors")
        own = dict(self._trained_by_name())
        if own.keys() != weights.keys():
            raise CheckpointError(f"{folder} holds other weights than this model trains")
        for name, weight in weights.items():
            if weight.shape != own[name].shape:  # which copying would stretch where it can
                raise CheckpointError(f"{folder} holds {name} as {[*weight.shape]}, not {[*own[name].shape]}")
            own[name].copy_(weight)
        state: dict[str, Any] = torch.load(folder / "backend.pt", map_location="cpu", weights_only=True)
        fused = [group["fused"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, fused, strict=True):
            group["fused"] = own  # of this device, which may be another than the checkpoint's
        if any(fused):
            for moments in self.optimizer.state.values():
                moments["step"] = moments["step"].to(self.device)
        self.scheduler.load_state_dict(state["scheduler"])
        masters = [m for p, m in zip(self._trained, self._masters, strict=True) if m is not p]
        for master, saved in zip(masters, state["masters"], strict=True):
            master.copy_(saved)

    def close(self) -> None:
        """Do nothing: nothing outlives this object."""

    def _trained_by_name(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
