"""Token weightings, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from opd.errors import ConfigError, DataError
from opd.maths.weighting import entropy_weights, pass_rate_weight, step_weights, turn_weights


def test_an_unsure_teacher_weighs_less():
    weights = entropy_weights(torch.tensor([0.0, math.log(2), math.log(4)]))
    assert weights.tolist() == pytest.approx([1.0, 0.5, 0.25])
    assert entropy_weights(torch.tensor([math.log(2)]), beta=2.0).item() == pytest.approx(0.25)


def test_entropy_weights_carry_no_gradient():
    assert not entropy_weights(torch.ones(3, requires_grad=True)).requires_grad


def test_a_pass_rate_weighs_most_where_the_exponents_say():
    rates = [k / 100 for k in range(101)]
    assert max(rates, key=pass_rate_weight) == 0.5
    assert max(rates, key=lambda p: pass_rate_weight(p, alpha=1, beta=3)) == 0.25
    assert pass_rate_weight(0.5) == 0.25
    assert pass_rate_weight(0.25, alpha=2, beta=0.5) == pytest.approx(0.0625 * math.sqrt(0.75))


def test_tasks_that_always_or_never_succeed_weigh_nothing_unless_an_exponent_is_zero():
    assert pass_rate_weight(0.0) == pass_rate_weight(1.0) == 0.0
    assert pass_rate_weight(0.0, alpha=0.0) == pass_rate_weight(1.0, beta=0.0) == 1.0


def test_a_pass_rate_outside_its_range_is_refused():
    with pytest.raises(DataError, match=r"pass rate = 1\.5"):
        pass_rate_weight(1.5)
    with pytest.raises(ConfigError, match="must not be negative"):
        pass_rate_weight(0.5, alpha=-1)


def test_a_turn_weighs_the_first_gap_over_its_own_up_to_a_bound():
    gap = torch.tensor([1.0, 3.0, 4.0, 1.0, 1.9], dtype=torch.float64)
    turn = torch.tensor([0, 0, 1, 2, 3])
    # Means 2, 4, 1, 1.9: ratios 1, 0.5, 2 (bounded), 2 / 1.9.
    weights = step_weights(gap, turn, epsilon=0.0, most=1.2)
    assert weights.tolist() == pytest.approx([1.0, 1.0, 0.5, 1.2, 2 / 1.9])


def test_step_weights_are_the_running_product_of_the_paper():
    gap = torch.tensor([0.5, 0.9, 0.4, 0.7], dtype=torch.float64)
    product, expected = 1.0, [1.0]
    for before, after in zip(gap[:-1].tolist(), gap[1:].tolist(), strict=True):
        product *= (before + 1e-6) / (after + 1e-6)
        expected.append(min(product, 1.2))
    assert step_weights(gap, torch.arange(4)).tolist() == pytest.approx(expected)


def test_a_trajectory_may_start_at_any_turn_and_skip_some():
    gap = torch.tensor([2.0, 4.0])
    assert step_weights(gap, torch.tensor([3, 7])).tolist() == pytest.approx([1.0, 0.5], rel=1e-5)


def test_turns_without_a_gap_do_not_divide_by_zero():
    assert step_weights(torch.zeros(2), torch.tensor([0, 1])).tolist() == [1.0, 1.0]
    assert step_weights(torch.zeros(0), torch.zeros(0, dtype=torch.long)).tolist() == []


def test_step_weights_refuse_what_is_not_one_trajectory():
    with pytest.raises(DataError, match="must not decrease"):
        step_weights(torch.ones(3), torch.tensor([0, 1, 0]))
    with pytest.raises(DataError, match=r"both must be \[tokens\]"):
        step_weights(torch.ones(3), torch.tensor([0, 1]))


def test_each_token_gets_the_weight_of_its_turn():
    assert turn_weights(torch.tensor([0, 0, 2, 1]), [1.0, 0.0, 0.5]).tolist() == [1.0, 1.0, 0.5, 0.0]
    with pytest.raises(DataError, match="turn 2 has no weight"):
        turn_weights(torch.tensor([0, 2]), [1.0, 1.0])
