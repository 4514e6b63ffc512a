"""Wall seconds of a step, by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

PHASES = ("rollout", "teacher", "train", "sync")


@dataclass(slots=True)
class Timer:
    """Adds up wall seconds by phase: `with timer("train"): ...`."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        since = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels run on after the call that started them has returned
        self.seconds[phase] += time.perf_counter() - since

    def row(self) -> dict[str, float]:
        """The seconds as metrics."""
        return {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
