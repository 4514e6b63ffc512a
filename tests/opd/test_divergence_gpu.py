"""The chunked functions on a GPU, where 16-bit products are summed in float32. Skips itself where there is none."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from opd.divergence import chunked_divergence
from opd.logprobs import chunked_logprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the CUDA path of opd.head is not tested"),
]

N, H, V = 300, 64, 5000


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((N, H), (V, H), (N, H), (V, H))
    sides = [(0.3 * torch.randn(*shape, generator=generator)).to("cuda", dtype) for shape in shapes]
    return sides[0].requires_grad_(), sides[1].requires_grad_(), sides[2], sides[3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("chunk_size", [None, 128])
def test_the_gpu_gives_the_float64_values_and_gradients(dtype, kind, chunk_size):
    narrow = inputs(dtype)
    exact = [side.detach().cpu().double().requires_grad_(side.requires_grad) for side in narrow]
    weights = torch.linspace(-1, 1, N)
    loss = chunked_divergence(*narrow, kind, weights=weights.cuda(), chunk_size=chunk_size)
    reference = chunked_divergence(*exact, kind, weights=weights.double())
    assert_close(loss.detach().cpu().double(), reference.detach(), rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(
        torch.autograd.grad(loss, narrow[:2]), torch.autograd.grad(reference, exact[:2]), strict=True
    ):
        assert ours.dtype == dtype
        # A gradient tile is rounded to the head's type before its product.
        assert (ours.cpu().double() - theirs).norm() < 4 * torch.finfo(dtype).eps * theirs.norm() + 1e-5


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_compiled_tile_is_the_plain_one(monkeypatch, kind):
    sides, weights = inputs(torch.bfloat16), torch.linspace(-1, 1, N, device="cuda")
    compiled = chunked_divergence(*sides, kind, weights=weights, chunk_size=128)
    monkeypatch.setattr("opd.divergence.COMPILE", False)
    assert_close(compiled, chunked_divergence(*sides, kind, weights=weights, chunk_size=128), rtol=1e-5, atol=1e-5)


def test_the_gpu_gives_the_log_probs_of_the_cpu():
    hidden, head, _, _ = inputs(torch.bfloat16)
    ids = torch.arange(N) % V
    ours = chunked_logprobs(hidden, head, ids.cuda(), chunk_size=128)
    theirs = chunked_logprobs(hidden.detach().cpu().double(), head.detach().cpu().double(), ids)
    assert_close(ours.detach().cpu().double(), theirs, rtol=0, atol=1e-4)
