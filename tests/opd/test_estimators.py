"""The expected gradient of every estimator, by enumeration in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from opd.errors import ConfigError, DataError
from opd.losses import Divergence
from opd.maths.divergence import token_divergence
from opd.maths.estimators import estimate, estimator_loss

V = 6


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student logits, which want a gradient, and the teacher's log-probs: [V], [V]."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, V, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher.log_softmax(-1)


def expected_gradient(student: Tensor, losses: Tensor, sampler: Tensor | None = None) -> Tensor:
    """The mean over the token that the sampler (or the student) draws of each token's own gradient."""
    p = (student if sampler is None else sampler).detach().softmax(-1)
    return torch.autograd.grad(losses, student, grad_outputs=p)[0]


def divergence_gradient(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    return torch.autograd.grad(token_divergence(student, teacher, Divergence(kind)), student)[0]


def exactly(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=0, atol=atol)


def test_k1_as_a_loss_would_lose_the_teacher():
    student, teacher = pair()
    k1 = student.log_softmax(-1) - teacher
    exactly(expected_gradient(student, k1), torch.zeros(V).double(), atol=1e-15)


def test_k1_as_a_loss_is_refused():
    student, teacher = pair()
    with pytest.raises(ConfigError, match="k1' cannot be a loss: its expected gradient is 0"):
        estimator_loss(student.log_softmax(-1), teacher, "k1")


@pytest.mark.parametrize(
    ("kind", "divergence"), [("k2", "reverse_kl"), ("k3", "forward_kl"), ("weighted_k3", "reverse_kl")]
)
def test_each_loss_has_the_expected_gradient_of_its_divergence(kind, divergence):
    student, teacher = pair()
    losses = estimator_loss(student.log_softmax(-1), teacher, kind)
    exactly(expected_gradient(student, losses), divergence_gradient(student, teacher, divergence))
    other = {"reverse_kl": "forward_kl", "forward_kl": "reverse_kl"}[divergence]
    gap = expected_gradient(student, estimator_loss(student.log_softmax(-1), teacher, kind))
    assert (gap - divergence_gradient(student, teacher, other)).abs().max() > 0.01


def test_weighted_k3_corrects_for_another_sampler():
    student, teacher = pair()
    sampler = pair(seed=1)[1]
    losses = estimator_loss(student.log_softmax(-1), teacher, "weighted_k3", sampler_logprobs=sampler)
    exactly(expected_gradient(student, losses, sampler), divergence_gradient(student, teacher, "reverse_kl"))


def test_a_ratio_beyond_its_bound_loses_its_gradient():
    student, teacher = pair()
    logprobs = student.log_softmax(-1)
    sampler = logprobs.detach() - torch.tensor([2.0, 0, 0, 0, 0, 0])
    bounded = estimator_loss(logprobs, teacher, "weighted_k3", sampler_logprobs=sampler, max_ratio=2.0)
    free = estimator_loss(logprobs, teacher, "weighted_k3", sampler_logprobs=sampler)
    exactly(bounded[1:], free[1:], atol=0)
    exactly(bounded[0], 2.0 * estimator_loss(logprobs, teacher, "k3")[0], atol=1e-15)
    of_bounded = torch.autograd.grad(bounded[0], student, retain_graph=True)[0]
    of_k3 = torch.autograd.grad(2.0 * estimator_loss(logprobs, teacher, "k3")[0], student)[0]
    exactly(of_bounded, of_k3, atol=1e-15)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_estimate_the_reverse_kl_without_bias(kind):
    student, teacher = pair()
    p = student.detach().softmax(-1)
    values = estimate(student.log_softmax(-1), teacher, kind)
    assert not values.requires_grad
    exactly(p @ values, token_divergence(student, teacher, Divergence("reverse_kl")).detach())


def test_k2_has_a_bias_that_shrinks_faster_than_the_divergence():
    student, _ = pair()
    direction = pair(seed=1)[1]
    biases = []
    for distance in (0.1, 0.01):
        teacher = (student.detach() + distance * direction).log_softmax(-1)
        kl = token_divergence(student, teacher, Divergence("reverse_kl")).detach()
        p = student.detach().softmax(-1)
        biases.append(((p @ estimate(student.log_softmax(-1), teacher, "k2") - kl) / kl).item())
    assert 1e-4 < abs(biases[0]) < 0.2
    assert abs(biases[1]) < 0.2 * abs(biases[0])


def test_k2_and_k3_are_never_negative_not_even_for_tiny_gaps_in_float32():
    gaps = torch.cat([torch.logspace(-8, 1, 50), -torch.logspace(-8, 1, 50)])
    for kind in ("k2", "k3"):
        assert (estimate(gaps, torch.zeros(100), kind) >= 0).all()
    tiny = estimate(torch.tensor([1e-3]), torch.zeros(1), "k3").item()
    assert tiny == pytest.approx(0.5e-6, rel=0.1)


def test_the_teacher_gets_no_gradient():
    student, teacher = pair()
    for kind in ("k2", "k3", "weighted_k3"):
        estimator_loss(student.log_softmax(-1), teacher.requires_grad_(), kind).sum().backward()
    assert teacher.grad is None


def test_what_cannot_be_computed_is_refused():
    student, teacher = pair()
    with pytest.raises(ConfigError, match=r"estimator = 'k4' is unknown\. Allowed: k1, k2, k3"):
        estimate(student, teacher, "k4")
    with pytest.raises(ConfigError, match=r"'k4' is unknown as a loss\. Allowed: k2, k3, weighted_k3"):
        estimator_loss(student, teacher, "k4")
    with pytest.raises(ConfigError, match="have no effect on 'k2'"):
        estimator_loss(student, teacher, "k2", max_ratio=2.0)
    with pytest.raises(DataError, match=r"\[6\] student log-probs, \[5\] teacher's"):
        estimator_loss(student, teacher[:5], "k2")
