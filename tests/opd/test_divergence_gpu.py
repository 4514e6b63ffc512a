"""The chunked functions on a GPU, where 16-bit products are summed in float32. Skips itself where there is none."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from opd.losses import Divergence
from opd.maths import divergence_tiles
from opd.maths.divergence import chunked_divergence, weighted_divergence
from opd.maths.formulas import kinds, with_beta
from opd.maths.head import Head
from opd.maths.logprobs import chunked_logprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the CUDA path of opd.maths.head is not tested"),
]

N, H, V = 300, 64, 5000


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, H), (V, H), (N, H), (V, H))
    sides = [(0.3 * torch.randn(*shape, generator=generator)).to("cuda", dtype) for shape in shapes]
    return sides[0].requires_grad_(), sides[1].requires_grad_(), sides[2], sides[3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("chunk_size", [None, 128])
def test_the_gpu_gives_the_float64_values_and_gradients(dtype, kind, chunk_size):
    narrow = inputs(dtype)
    exact = [side.detach().cpu().double().requires_grad_(side.requires_grad) for side in narrow]
    weights = torch.linspace(-1, 1, N)
    loss = chunked_divergence(*narrow, Divergence(kind), weights=weights.cuda(), chunk_size=chunk_size)
    reference = chunked_divergence(*exact, Divergence(kind), weights=weights.double())
    assert_close(loss.detach().cpu().double(), reference.detach(), rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(
        torch.autograd.grad(loss, narrow[:2]), torch.autograd.grad(reference, exact[:2]), strict=True
    ):
        assert ours.dtype == dtype
        # A gradient tile is rounded to the head's type before its product.
        assert (ours.cpu().double() - theirs).norm() < 4 * torch.finfo(dtype).eps * theirs.norm() + 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("clip", [None, 1e-4])
@pytest.mark.parametrize("bias", [False, True])
def test_the_kernel_does_what_the_plain_operations_do(monkeypatch, dtype, kind, clip, bias):
    """A vocabulary of no whole block, tiles that begin anywhere, a temperature; an entry that both sides exclude."""
    student, weight, teacher, teacher_weight = inputs(dtype)
    excluded = torch.zeros(V, device="cuda")
    excluded[7] = -torch.inf
    leaves = [student, weight] + ([excluded.clone().requires_grad_()] if bias else [])
    head = Head(weight, bias=leaves[2]) if bias else weight
    teacher_head = Head(teacher_weight, bias=excluded) if bias else teacher_weight
    weights = torch.linspace(-1, 1, N, device="cuda")
    assert divergence_tiles._kernel(torch.empty(1, device="cuda")) is not None

    def run() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        sides = (student, head, teacher, teacher_head)
        rule = Divergence(kind, beta=0.3 if kind in with_beta() else None, temperature=1.3, clip=clip)
        found = weighted_divergence(*sides, rule, weights=weights, chunk_size=101)
        values = chunked_divergence(*sides, rule, chunk_size=101)
        totals = (found.total, values @ weights)
        return [x.detach() for x in (*found, values)], [g for t in totals for g in torch.autograd.grad(t, leaves)]

    columns, gradients = run()
    monkeypatch.setattr(divergence_tiles, "KERNEL", False)
    plain_columns, plain_gradients = run()
    # Rounding decides whether an entry beside the clip is cut.
    assert_close(columns, plain_columns, rtol=1e-4, atol=1e-4 if clip is None else 1e-3)
    tolerance = 4 * max(torch.finfo(dtype).eps, 5e-6 if clip is None else 5e-4)
    for ours, theirs in zip(gradients, plain_gradients, strict=True):
        assert ours.isfinite().all()
        assert (ours.double() - theirs.double()).norm() < tolerance * theirs.double().norm() + 1e-5


def test_a_head_in_float16_loses_no_small_gradient():
    sides, weights = inputs(torch.float16), torch.full((N,), 1e-7, device="cuda")
    total = chunked_divergence(*sides, Divergence("forward_kl"), weights=weights)
    exact = [side.detach().double().requires_grad_(side.requires_grad) for side in sides]
    reference = chunked_divergence(*exact, Divergence("forward_kl"), weights=weights.double())
    factor = torch.tensor(1e7, device="cuda")
    for ours, theirs in zip(
        torch.autograd.grad(total, sides[:2], factor),
        torch.autograd.grad(reference, exact[:2], factor.double()),
        strict=True,
    ):
        assert (ours.double() - theirs).norm() < 4e-3 * theirs.norm()


def test_the_gpu_gives_the_log_probs_of_the_cpu():
    hidden, head, _, _ = inputs(torch.bfloat16)
    ids = torch.arange(N) % V
    ours = chunked_logprobs(hidden, head, ids.cuda(), chunk_size=128)
    theirs = chunked_logprobs(hidden.detach().cpu().double(), head.detach().cpu().double(), ids)
    assert_close(ours.detach().cpu().double(), theirs, rtol=0, atol=1e-4)
