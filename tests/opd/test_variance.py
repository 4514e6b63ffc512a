"""The closed-form variance against every gradient that could have been sampled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from opd.errors import DataError
from opd.maths.advantage import chunked_advantages, distillation_advantage, state_baseline
from opd.maths.variance import GradientVariance, chunked_gradient_variance, gradient_variance

V = 6
BASELINES = [
    {"baseline": "full"},
    {"baseline": "optimal"},
    {"baseline": "top_k", "top_k": 2},
    {"baseline": "top_k", "top_k": 2, "renormalise": True},
]
every_baseline = pytest.mark.parametrize("options", BASELINES, ids=str)


def states(count: int = 3, scale: float = 1.5, vocabulary: int = V) -> tuple[Tensor, Tensor]:
    """Draw logits of a student, and of a teacher that is near it: [count, V] each."""
    generator = torch.Generator().manual_seed(0)
    student, noise = torch.randn(2, count, vocabulary, generator=generator, dtype=torch.float64)
    return scale * student, scale * student + noise


def enumerated_variance(student: Tensor, teacher: Tensor, baseline: Tensor) -> Tensor:
    """Compute one state's mean squared distance of the sampled gradients from their mean, by autograd."""
    logits = student.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    gradients = torch.stack([torch.autograd.grad(logprobs[v], logits, retain_graph=True)[0] for v in range(V)])
    p = student.softmax(-1)
    gradients *= (teacher.log_softmax(-1) - student.log_softmax(-1) - baseline)[:, None]
    return p @ (gradients - p @ gradients).square().sum(-1)


def exactly(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=0, atol=atol)


@every_baseline
def test_the_closed_form_is_the_variance_over_the_enumerated_vocabulary(options):
    student, teacher = states()
    variance = gradient_variance(student, teacher, **options)
    baseline = state_baseline(student, teacher, **options)
    for state in range(len(student)):
        sides = student[state], teacher[state]
        exactly(variance.plain[state], enumerated_variance(*sides, torch.tensor(0.0)))
        exactly(variance.baselined[state], enumerated_variance(*sides, baseline[state]))


def test_no_baseline_does_better_than_the_optimal_one():
    student, teacher = states(50)
    least = gradient_variance(student, teacher, "optimal").baselined
    best = state_baseline(student, teacher, "optimal")
    for other in (torch.zeros(50), best + 0.01, best - 0.01, state_baseline(student, teacher, "full")):
        for state in range(5):
            assert enumerated_variance(student[state], teacher[state], other[state]) > least[state]
    for options in BASELINES:
        assert (gradient_variance(student, teacher, **options).baselined >= least - 1e-12).all()


def test_the_full_baseline_is_nearly_optimal_where_the_student_is_flat():
    variance = gradient_variance(*states(500, scale=0.1, vocabulary=50), "full")
    assert variance.ratio < 0.9
    assert variance.reached > 0.99
    assert variance.raised == 0.0


def test_the_full_baseline_raises_the_variance_at_many_peaked_states():
    variance = gradient_variance(*states(500, scale=6.0, vocabulary=50), "full")
    assert variance.raised > 0.3
    assert variance.reached < 0.5
    assert gradient_variance(*states(500, scale=6.0, vocabulary=50), "optimal").raised == 0.0


def test_the_summary_sums_before_it_divides():
    variance = GradientVariance(
        plain=torch.tensor([1.0, 9.0]), baselined=torch.tensor([2.0, 3.0]), least=torch.tensor([1.0, 1.0])
    )
    assert (variance.ratio, variance.reached, variance.raised) == (0.5, 5 / 8, 0.5)


@every_baseline
def test_from_hidden_states_it_is_the_same(options):
    student, teacher = states(7)
    head = torch.randn(V, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden, teacher_hidden = student[:, :4], teacher[:, :4]
    ids = torch.arange(7) % V
    sides, logits = (hidden, head, teacher_hidden, head), (hidden @ head.T / 1.3, teacher_hidden @ head.T / 1.3)
    for chunk_size in (1, 3, None):
        chunked = chunked_gradient_variance(*sides, temperature=1.3, chunk_size=chunk_size, **options)
        for ours, theirs in zip(chunked, gradient_variance(*logits, **options), strict=True):
            exactly(ours, theirs)
        exactly(
            chunked_advantages(*sides, ids, temperature=1.3, chunk_size=chunk_size, **options).values,
            distillation_advantage(*logits, ids, **options),
        )


def test_no_tokens_give_no_variances_and_no_advantages():
    sides = (torch.zeros(0, 4), torch.ones(V, 4), torch.zeros(0, 4), torch.ones(V, 4))
    assert chunked_gradient_variance(*sides, "full").plain.shape == (0,)
    assert chunked_advantages(*sides, torch.zeros(0, dtype=torch.long)).values.shape == (0,)


def test_sides_that_do_not_belong_together_are_refused():
    student, teacher = states()
    with pytest.raises(DataError, match=r"teacher logits \[3, 5\]"):
        gradient_variance(student, teacher[:, :5], "full")
    sides = (torch.zeros(3, 4), torch.ones(V, 4), torch.zeros(3, 4), torch.ones(V, 4))
    with pytest.raises(DataError, match=r"\[2\] token ids for 3 hidden states"):
        chunked_advantages(*sides, torch.tensor([1, 2]))
