"""Advantages by enumeration in float64: what their mean and variance are, not what one sample says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from opd.errors import ConfigError, DataError
from opd.losses import Divergence
from opd.maths.advantage import distillation_advantage, group_advantage
from opd.maths.divergence import token_divergence

V = 7
BASELINES = [
    {"baseline": None},
    {"baseline": "full"},
    {"baseline": "optimal"},
    {"baseline": "top_k", "top_k": 3},
    {"baseline": "top_k", "top_k": 3, "renormalise": True},
]
every_baseline = pytest.mark.parametrize("options", BASELINES, ids=str)


def pair(scale: float = 1.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw logits of one state, the student's wanting a gradient: [V], [V]."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, V, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def advantages(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    """Return the advantage of every token that could have been sampled at this state: [V]."""
    return distillation_advantage(student.expand(V, V), teacher.expand(V, V), torch.arange(V), **options)


def sampled_gradients(student: Tensor, weights: Tensor) -> Tensor:
    """Return the policy gradient of each token that could have been sampled, as a loss: [V, V]."""
    logprobs = student.log_softmax(-1)
    return torch.stack(
        [torch.autograd.grad(-weights[v] * logprobs[v], student, retain_graph=True)[0] for v in range(V)]
    )


def exactly(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=0, atol=atol)


@every_baseline
@pytest.mark.parametrize("scale", [0.1, 1.5, 6.0])
def test_the_expected_sampled_gradient_is_the_gradient_of_the_exact_reverse_kl(options, scale):
    student, teacher = pair(scale)
    p = student.softmax(-1).detach()
    expected = torch.autograd.grad(token_divergence(student, teacher, Divergence("reverse_kl")), student)[0]
    sampled = sampled_gradients(student, advantages(student, teacher, **options))
    assert expected.abs().max() > 1e-3 * scale
    exactly(p @ sampled, expected)


def test_with_the_full_baseline_the_advantage_has_mean_zero_under_the_student():
    student, teacher = pair()
    p = student.softmax(-1).detach()
    exactly(p @ advantages(student, teacher, baseline="full"), torch.tensor(0.0).double())
    exactly(p @ advantages(student, teacher), -token_divergence(student, teacher, Divergence("reverse_kl")).detach())


def test_the_full_baseline_lowers_the_second_moment_by_exactly_the_kl_squared():
    student, teacher = pair()
    p, kl = student.softmax(-1).detach(), token_divergence(student, teacher, Divergence("reverse_kl")).detach()
    plain, centred = advantages(student, teacher), advantages(student, teacher, baseline="full")
    assert kl > 0.1
    exactly(p @ plain.square() - p @ centred.square(), kl.square())


def test_an_advantage_that_does_not_depend_on_the_token_has_no_expected_gradient():
    student, teacher = pair()
    p = student.softmax(-1).detach()
    penalty = token_divergence(student, teacher, Divergence("reverse_kl")).detach().expand(V)
    exactly(p @ sampled_gradients(student, penalty), torch.zeros(V).double(), atol=1e-15)


@every_baseline
def test_it_is_detached(options):
    student, teacher = pair()
    result = advantages(student, teacher.requires_grad_(), **options)
    assert not result.requires_grad
    assert result.grad_fn is None


@every_baseline
def test_a_teacher_equal_to_the_student_gives_zero(options):
    student, _ = pair()
    exactly(advantages(student, student, **options), torch.zeros(V).double(), atol=1e-15)


@pytest.mark.parametrize("renormalise", [False, True])
def test_top_k_over_the_whole_vocabulary_is_the_full_baseline(renormalise):
    student, teacher = pair()
    exactly(
        advantages(student, teacher, baseline="top_k", top_k=V, renormalise=renormalise),
        advantages(student, teacher, baseline="full"),
    )


def test_the_top_k_is_the_students_and_renormalising_changes_the_baseline_alone():
    student, teacher = pair()
    p, q = student.detach().softmax(-1), teacher.softmax(-1)
    ids = p.topk(3).indices
    assert set(ids.tolist()) != set(q.topk(3).indices.tolist())
    plain = (q / p).log()
    truncated = (p[ids] * (p[ids] / q[ids]).log()).sum()
    exactly(advantages(student, teacher, baseline="top_k", top_k=3), plain + truncated)
    pk, qk = p[ids] / p[ids].sum(), q[ids] / q[ids].sum()
    renormalised = (pk * (pk / qk).log()).sum()
    exactly(advantages(student, teacher, baseline="top_k", top_k=3, renormalise=True), plain + renormalised)


def test_the_clip_bounds_the_advantage_on_both_sides():
    student, teacher = pair(scale=4)
    plain = advantages(student, teacher)
    assert plain.min() < -1
    assert plain.max() > 1
    exactly(advantages(student, teacher, clip=1.0), plain.clamp(-1, 1), atol=0)


def test_a_token_that_the_teacher_excludes_needs_a_clip():
    student, teacher = pair()
    teacher[2] = -torch.inf
    with pytest.raises(DataError, match="infinite"):
        advantages(student, teacher)
    clipped = advantages(student, teacher, clip=10.0)
    assert clipped[2] == -10
    assert clipped.isfinite().all()


@every_baseline
def test_entries_excluded_on_both_sides_add_nothing(options):
    student, teacher = pair()
    mask = torch.zeros(V, dtype=torch.float64)
    mask[[0, 4]] = -torch.inf
    kept = mask.isfinite()
    rows = int(kept.sum())
    with_mask = distillation_advantage(
        (student + mask).expand(rows, V), (teacher + mask).expand(rows, V), kept.nonzero().squeeze(-1), **options
    )
    without = distillation_advantage(
        student[kept].expand(rows, rows), teacher[kept].expand(rows, rows), torch.arange(rows), **options
    )
    exactly(with_mask, without, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "value"}, "baseline = 'value' is unknown. Allowed: full, top_k, optimal, or None"),
        ({"baseline": "top_k"}, "the one needs the other"),
        ({"baseline": "full", "top_k": 3}, "the one needs the other"),
        ({"baseline": "top_k", "top_k": V + 1}, "top_k = 8: must be between 1 and the vocabulary's 7"),
        ({"baseline": "full", "renormalise": True}, "renormalise = True has no effect"),
        ({"clip": -1.0}, "clip = -1.0: must be positive"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        advantages(*pair(), **options)


def test_shapes_that_do_not_match_are_refused():
    student, teacher = pair()
    with pytest.raises(DataError, match="do not match"):
        distillation_advantage(student[None], teacher[None], torch.tensor([1, 2]))
    with pytest.raises(DataError, match="do not match"):
        distillation_advantage(student[None], teacher[None, :-1], torch.tensor([1]))


def test_a_group_advantage_is_the_reward_over_the_sample_standard_deviation():
    # Mean 2, squared differences 1 + 0 + 1, over n - 1 = 2: standard deviation 1.
    exactly(group_advantage([1.0, 2.0, 3.0]), torch.tensor([-1.0, 0.0, 1.0]).double() / (1 + 1e-6), atol=1e-15)


def test_without_scale_it_is_the_difference_from_the_mean():
    exactly(group_advantage([1.0, 2.0, 6.0], scale="none"), torch.tensor([-2.0, -1.0, 3.0]).double(), atol=1e-15)


def test_leaving_one_out_compares_with_the_mean_of_the_others():
    expected = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5], dtype=torch.float64)
    exactly(group_advantage([1.0, 2.0, 6.0], scale="none", leave_one_out=True), expected, atol=1e-15)
    deviation = math.sqrt((4 + 1 + 9) / 2)
    exactly(group_advantage([1.0, 2.0, 6.0], leave_one_out=True), expected / (deviation + 1e-6), atol=1e-15)


@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [1.0] * 8, [0.7]])
@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_equal_rewards_and_groups_of_one_give_exact_zeros(rewards, scale, leave_one_out):
    for dtype in (torch.float64, torch.float32):
        result = group_advantage(torch.tensor(rewards, dtype=dtype), scale=scale, leave_one_out=leave_one_out)
        assert result.tolist() == [0.0] * len(rewards)


def test_each_group_of_a_batch_is_its_own():
    rewards = torch.tensor([[0.0, 1.0, 1.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    both = group_advantage(rewards)
    exactly(both, torch.stack([group_advantage(row) for row in rewards]), atol=0)


def test_integer_and_16_bit_rewards_are_widened():
    assert group_advantage(torch.tensor([0, 1])).dtype == torch.float64
    assert group_advantage(torch.tensor([0, 1], dtype=torch.bfloat16)).dtype == torch.float32
    assert group_advantage([True, False]).sum() == 0


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_only_leaving_one_out_leaves_the_expected_policy_gradient_whole(leave_one_out):
    # Two members, two actions with reward 0 and 1, probability p of the second, one logit: enumerate all
    # four groups. d/dlogit of the expected reward is p (1 - p); the plain mean gives half of it at G = 2.
    p = 0.3
    chance, score = {0: 1 - p, 1: p}, {0: -p, 1: 1 - p}
    total = 0.0
    for first in (0, 1):
        for second in (0, 1):
            group = group_advantage([float(first), float(second)], scale="none", leave_one_out=leave_one_out)
            gradient = (group[0] * score[first] + group[1] * score[second]) / 2
            total += chance[first] * chance[second] * gradient.item()
    assert total == pytest.approx(p * (1 - p) * (1.0 if leave_one_out else 0.5), abs=1e-12)


@pytest.mark.parametrize("rewards", [[], [1.0, math.nan], [1.0, math.inf]])
def test_rewards_that_mean_nothing_are_refused(rewards):
    with pytest.raises(DataError, match="reward"):
        group_advantage(rewards)


def test_an_unknown_scale_is_refused():
    with pytest.raises(ConfigError, match=r"scale = .rank. is unknown\. Allowed: std, none"):
        group_advantage([1.0, 2.0], scale="rank")
