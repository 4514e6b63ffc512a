"""The learning rate of each update, by hand. That both backends take theirs from here is tested by their runs."""

import pytest
import torch

from opd.backends.config import TrainConfig
from opd.backends.schedule import schedule_of


def rates(steps, **train):
    """The rates of the first `steps` updates, of 8."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, found = schedule_of(TrainConfig(lr=1.0, **train), optimizer, 8), []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 4, [0, 0.25, 0.5, 0.75, 1, 1]),
        ("linear", 0, [1, 0.875, 0.75, 0.625, 0.5, 0.375]),
        ("linear", 4, [0, 0.25, 0.5, 0.75, 1, 0.75]),
    ],
)
def test_every_schedule_warms_up_and_the_constant_one_stays_there(schedule, warmup, expected):
    assert rates(6, lr_schedule=schedule, warmup_steps=warmup) == expected
