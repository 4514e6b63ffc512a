"""The learning rate over a run's updates."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from opd.backends.config import TrainConfig


def schedule_of(config: TrainConfig, optimizer: Optimizer, total_steps: int) -> LambdaLR:
    """Return the schedule that `train.lr_schedule` and `train.warmup_steps` ask for over `total_steps` updates.

    What transformers calls constant knows no warm-up, so a constant rate with one has another name there.
    """
    name: str = config.lr_schedule
    if name == "constant" and config.warmup_steps:
        name = "constant_with_warmup"
    made: LambdaLR = get_scheduler(
        name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=total_steps
    )
    return made
