"""Muon in float32 beside torch's, which works in bfloat16."""

import pytest
import torch

from opd.launch.tiny.muon import Muon, orthogonal


def matrices(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 8), (2, 8, 24)])
def test_the_singular_vectors_stay_and_the_values_come_near_one(shape):
    given = matrices(*shape)
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    values = left.mT @ orthogonal(given) @ right.mT
    off = values - torch.diag_embed(values.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-4
    assert values.diagonal(dim1=1, dim2=2).min() > 0.6
    assert values.diagonal(dim1=1, dim2=2).max() < 1.3


def test_matrices_worked_on_together_are_as_each_alone():
    given = matrices(4, 12, 6)
    alone = torch.cat([orthogonal(one[None]) for one in given])
    torch.testing.assert_close(orthogonal(given), alone)


def test_it_walks_where_torchs_own_does():
    shapes = [(8, 8), (16, 8), (8, 16)]
    ours = [torch.nn.Parameter(matrices(*shape, seed=i)) for i, shape in enumerate(shapes)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    idle = torch.nn.Parameter(torch.ones(2, 2))
    optimizers = (
        Muon([*ours, idle], lr=0.1, momentum=0.9),
        torch.optim.Muon(theirs, lr=0.1, momentum=0.9, weight_decay=0.0),
    )
    start = [p.detach().clone() for p in ours]
    for step in range(5):
        for params in (ours, theirs):
            for i, p in enumerate(params):
                p.grad = matrices(*p.shape, seed=100 * step + i)
        for optimizer in optimizers:
            optimizer.step()
    for one, two, before in zip(ours, theirs, start, strict=True):
        assert (one - two).norm() < 0.02 * (one - before).norm()  # bfloat16's rounding, five times
    assert torch.equal(idle, torch.ones(2, 2))
