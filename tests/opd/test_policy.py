"""The clipped surrogate and the correction between sampler and trainer, against hand-made numbers and enumeration."""

import math

import pytest
import torch

from opd.errors import ConfigError, DataError
from opd.losses import Correction
from opd.maths.policy import importance_weights, policy_loss

A = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
RATIO = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.0, 1.5], dtype=torch.float64)


def loss_and_slope(ratio=RATIO, advantages=A, **options):
    logprobs = ratio.log().requires_grad_()
    part = policy_loss(logprobs, advantages, old_logprobs=torch.zeros_like(ratio), **options)
    (slope,) = torch.autograd.grad(part.values.sum(), logprobs)
    return part, slope


def test_the_surrogate_is_pessimistic_on_both_sides():
    part, slope = loss_and_slope(clip_low=0.2, clip_high=0.3)
    assert part.values.tolist() == pytest.approx([-0.5, -1.0, -1.3, 0.8, 1.0, 1.5])
    # Clipped where a better token is already likelier, or a worse one already less likely: no gradient there.
    assert part.clipped.tolist() == [0, 0, 1, 1, 0, 0]
    assert slope.tolist() == pytest.approx([-0.5, -1.0, 0.0, 0.0, 1.0, 1.5])
    assert part.ratio.tolist() == pytest.approx(RATIO.tolist())


def test_a_bound_that_is_off_does_not_bind():
    part, slope = loss_and_slope(clip_low=None, clip_high=None)
    assert part.clipped.sum() == 0
    assert slope.tolist() == pytest.approx((-RATIO * A).tolist())
    assert loss_and_slope(clip_low=None, clip_high=0.2)[0].clipped.tolist() == [0, 0, 1, 0, 0, 0]
    assert loss_and_slope(clip_low=0.2, clip_high=None)[0].clipped.tolist() == [0, 0, 0, 1, 0, 0]


def test_before_the_first_update_the_ratio_is_one_in_value_and_the_policy_gradient_in_slope():
    logprobs = torch.tensor([-0.3, -2.0], dtype=torch.float64, requires_grad=True)
    part = policy_loss(logprobs, torch.tensor([0.7, -1.2], dtype=torch.float64))
    (slope,) = torch.autograd.grad(part.values.sum(), logprobs)
    assert part.values.tolist() == [-0.7, 1.2]
    assert slope.tolist() == [-0.7, 1.2]
    assert part.ratio.tolist() == [1.0, 1.0]


def test_advantages_and_old_log_probs_get_no_gradient():
    leaves = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    policy_loss(leaves[0], leaves[1], old_logprobs=leaves[2]).values.sum().backward()
    assert leaves[0].grad is not None
    assert (leaves[1].grad, leaves[2].grad) == (None, None)


def test_a_sequence_ratio_is_the_geometric_mean_of_its_tokens_with_the_tokens_own_gradient():
    ratio = torch.tensor([1.2, 0.9, 2.0, 0.25], dtype=torch.float64)
    advantages = torch.tensor([1.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    part, slope = loss_and_slope(ratio, advantages, clip_low=None, clip_high=None, level="sequence", lengths=[2, 2])
    means = [math.sqrt(1.2 * 0.9)] * 2 + [math.sqrt(0.5)] * 2
    assert part.ratio.tolist() == pytest.approx(means)
    assert slope.tolist() == pytest.approx([-m * a for m, a in zip(means, advantages.tolist(), strict=True)])


def test_with_one_advantage_a_sequence_the_sequence_ratio_has_the_gradient_of_gspo():
    old = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    logprobs = torch.tensor([-0.8, -2.2, -0.6], dtype=torch.float64, requires_grad=True)
    ours = policy_loss(logprobs, torch.full((3,), 0.7), old_logprobs=old, level="sequence", lengths=[3]).values.mean()
    gspo = -((logprobs - old).mean().exp() * 0.7)
    assert ours.item() == pytest.approx(gspo.item())
    for mine, theirs in zip(torch.autograd.grad(ours, logprobs), torch.autograd.grad(gspo, logprobs), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_sequence_is_clipped_as_a_whole():
    ratio = torch.tensor([1.9, 1.0, 1.0, 1.0], dtype=torch.float64)
    part, slope = loss_and_slope(ratio, torch.ones(4), level="sequence", lengths=[2, 2])
    assert part.clipped.tolist() == [1, 1, 0, 0]
    assert slope.tolist() == pytest.approx([0, 0, -1, -1])


def test_an_outlier_is_large_and_finite():
    logprobs = torch.tensor([0.0, -500.0], requires_grad=True)
    part = policy_loss(logprobs, torch.tensor([-1.0, -1.0]), old_logprobs=torch.tensor([-500.0, 0.0]))
    part.values.sum().backward()
    assert part.values.isfinite().all()
    assert logprobs.grad.isfinite().all()


def test_truncated_weights_are_the_ratio_up_to_the_bound():
    log_ratio = torch.tensor([0.1, 0.5, 3.0, 1.0], dtype=torch.float64).log()
    found = importance_weights(log_ratio, torch.zeros(4, dtype=torch.float64), Correction(high=2.0))
    assert found.weights.tolist() == pytest.approx([0.1, 0.5, 2.0, 1.0])
    assert found.ratio.tolist() == pytest.approx([0.1, 0.5, 3.0, 1.0])
    assert found.limited.tolist() == [0, 0, 1, 0]


def test_masked_weights_are_the_ratio_inside_the_band_and_nothing_outside():
    log_ratio = torch.tensor([0.1, 0.6, 3.0, 1.0], dtype=torch.float64).log()
    rule = Correction(mode="mask", low=0.5, high=2.0)
    found = importance_weights(log_ratio, torch.zeros(4, dtype=torch.float64), rule)
    assert found.weights.tolist() == pytest.approx([0, 0.6, 0, 1.0])
    assert found.limited.tolist() == [1, 0, 1, 0]


def test_a_sequence_weight_is_the_product_of_its_tokens_ratios():
    log_ratio = torch.tensor([2.0, 0.5, 1.5, 3.0, 0.9], dtype=torch.float64).log()
    for mode, expected in (("truncate", [1.0, 1.0, 2.0, 2.0, 0.9]), ("mask", [1.0, 1.0, 0.0, 0.0, 0.9])):
        rule = Correction(mode=mode, level="sequence", low=0.5, high=2.0)
        found = importance_weights(log_ratio, torch.zeros(5, dtype=torch.float64), rule, lengths=[2, 2, 1])
        assert found.weights.tolist() == pytest.approx(expected)


def test_weights_without_truncation_make_another_samplers_tokens_unbiased():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(-1)
    sampler = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(-1)
    values = torch.randn(7, generator=generator, dtype=torch.float64)
    weights = importance_weights(student, sampler, Correction(high=math.inf)).weights
    torch.testing.assert_close((sampler.exp() * weights * values).sum(), (student.exp() * values).sum())


def test_empty_sequences_and_no_tokens_at_all_are_fine():
    nothing = torch.zeros(0)
    assert policy_loss(nothing, nothing, level="sequence", lengths=[]).values.shape == (0,)
    two = torch.zeros(2)
    assert policy_loss(two, two, level="sequence", lengths=[0, 2, 0]).ratio.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clip_low": 0.0}, ConfigError, "clip_low = 0.0: must be positive"),
        ({"clip_high": -1.0}, ConfigError, "clip_high = -1.0: must be positive"),
        ({"clip_low": 1.5}, ConfigError, "never below 0"),
        ({"level": "sequence"}, DataError, "needs lengths that add up to 2 tokens, got None"),
        ({"level": "sequence", "lengths": [3]}, DataError, r"add up to 2 tokens, got \[3\]"),
        ({"old_logprobs": torch.zeros(3)}, DataError, "must all be"),
    ],
)
def test_what_cannot_be_computed_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        policy_loss(torch.zeros(2), torch.zeros(2), **options)
