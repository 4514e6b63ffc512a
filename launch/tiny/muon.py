"""Muon in float32, for the warm start of tiny models on a CPU.

`torch.optim.Muon` makes its update orthogonal in bfloat16. A processor without bfloat16 arithmetic emulates it:
on one such the update of a tiny model took 1.4 s of each step, in float32 it takes 0.09 s. Its rounding also
differs from one processor to the next, and with it how far a warm start comes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""K. Jordan et al., "Muon" (2024): singular values of 0.002 to 1 come to 0.68 to 1.2 in five steps."""


class Muon(torch.optim.Optimizer):
    """Momentum, and of it the nearest orthogonal matrix: for the matrices inside a model's layers."""

    def __init__(self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Matrices of one shape are worked on together: one product of many small ones."""
        for group in self.param_groups:
            same: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    average = self.state[param].setdefault("momentum", torch.zeros_like(param))
                    average.lerp_(param.grad, 1 - group["momentum"])
                    same[param.shape].append((param, param.grad.lerp(average, group["momentum"])))
            for (rows, columns), pairs in same.items():
                scale = max(1.0, rows / columns) ** 0.5
                updates = orthogonal(torch.stack([update for _, update in pairs]))
                for (param, _), update in zip(pairs, updates, strict=True):
                    param.sub_(update, alpha=group["lr"] * scale)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return nearly orthogonal matrices of the same singular vectors: [n, rows, columns], float32 or wider."""
    a, b, c = _QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
