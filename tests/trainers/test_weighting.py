"""Weightings on samples: means over the whole step, what they touch, and what they leave alone."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from opd.objective.config import PassRateWeighting, StepWeighting, WeightingConfig
from opd.trainers.loop.weighting import by_entropy, by_steps, by_task, by_turn, weigh
from opd.types import Sample, Task, TeacherView

TASKS = [Task(index=i, seed=i) for i in range(3)]


def one_rank(sums):
    return sums


def sample(turns, *, task=0, member=0, distill=1.0, policy=0.0, entropy=None, gaps=None):
    """One prompt token, then a sampled token for each entry of `turns`; the teacher's entropy and gap at each."""
    size = len(turns)
    stream = [math.nan] + [-1.0] * size
    return Sample(
        token_ids=[1, *range(2, 2 + size)],
        completion_mask=[0] + [1] * size,
        turn=[turns[0], *turns],
        sampler_logprobs=stream,
        policy_weight=[0.0] + [policy] * size,
        distill_weight=[0.0] + [distill] * size,
        ce_weight=[0.0] * (size + 1),
        advantage=[0.0] * (size + 1),
        teacher_logprobs=None if gaps is None else [math.nan, *(-1.0 - gap for gap in gaps)],
        teacher_entropy=None if entropy is None else [math.nan, *entropy],
        teacher_view=TeacherView(token_ids=[9, *range(2, 2 + size)], rows=list(range(size))),
        task=TASKS[task],
        member=member,
    )


def test_a_function_of_ones_own_runs_where_ranks_agree_and_no_other_weighting_does():
    """An error of one rank must reach the others, which else wait for it in the next exchange."""
    agreed = []

    def agree(work):
        agreed.append(work)
        return [[3.0, 3.0]]

    own = SimpleNamespace(found=SimpleNamespace(factors=lambda *_: 1 / 0, streams=("distill_weight",)), kwargs={})
    config = SimpleNamespace(entropy=1.0, steps=None, pass_rate=None, turns=None, functions=[own])
    [weighed] = weigh([sample([0], entropy=[1.0])], config, {}, one_rank, agree)
    assert weighed.distill_weight == [0.0, 3.0]
    assert len(agreed) == 1


def test_entropy_weights_have_mean_one_over_all_distilled_tokens_of_the_step():
    samples = [sample([0, 0], entropy=[0.0, 1.0]), sample([0], entropy=[2.0])]
    weighed = by_entropy(samples, 1.0, one_rank)
    raw = [1, math.exp(-1), math.exp(-2)]
    mean = sum(raw) / 3
    assert weighed[0].distill_weight == pytest.approx([0.0, raw[0] / mean, raw[1] / mean])
    assert weighed[1].distill_weight == pytest.approx([0.0, raw[2] / mean])


def test_the_mean_of_entropy_weights_is_taken_over_all_ranks_and_over_distilled_tokens_alone():
    samples = [sample([0], entropy=[1.0]), sample([0], entropy=[7.0], distill=0.0, policy=1.0)]
    [first, second] = by_entropy(samples, 1.0, lambda sums: [sums[0] + 1.0, sums[1] + 1.0])
    weight = math.exp(-1)
    assert first.distill_weight[1] == pytest.approx(weight / ((weight + 1) / 2))
    assert (second.distill_weight, second.policy_weight) == ([0.0, 0.0], [0.0, 1.0])


def test_a_teacher_that_is_very_unsure_everywhere_still_teaches():
    """e^-110 is 0 in float32: both tokens would count for nothing, in the mean and in the denominator."""
    [weighed] = by_entropy([sample([0, 0], entropy=[11.0, 11.1])], 10.0, one_rank)
    mean = (1 + math.exp(-1)) / 2
    assert weighed.distill_weight == pytest.approx([0.0, 1 / mean, math.exp(-1) / mean])


def test_beta_zero_gives_uniform_weights():
    samples = [sample([0, 0], entropy=[0.3, 5.0], distill=0.5)]
    assert by_entropy(samples, 0.0, one_rank)[0].distill_weight == [0.0, 0.5, 0.5]


def test_a_sample_that_no_teacher_sees_needs_no_scores():
    plain = replace(sample([0], distill=0.0, policy=1.0), teacher_view=None)
    assert by_entropy([plain], 1.0, one_rank) == [plain]
    assert by_steps([plain], epsilon=1e-6, most=1.2) == [plain]


def test_step_weights_compare_each_turn_with_the_first_of_its_episode():
    [weighed] = by_steps([sample([0, 0, 1, 2], gaps=[1.0, 3.0, 4.0, -0.5])], epsilon=1e-9, most=1.2)
    assert weighed.distill_weight[1:] == pytest.approx([1.0, 1.0, 0.5, 1.2])


def test_sequences_of_one_episode_are_weighed_together_and_episodes_apart():
    parts = [sample([0], gaps=[1.0]), sample([1], gaps=[2.0]), sample([0], member=1, gaps=[8.0])]
    weighed = by_steps(parts, epsilon=1e-9, most=1.2)
    assert [w.distill_weight[1] for w in weighed] == pytest.approx([1.0, 0.5, 1.0])


def test_tasks_weigh_by_their_factor_over_its_mean_by_token():
    samples = [sample([0, 0, 0], task=0), sample([0], task=1)]
    factors = {TASKS[0].id: 0.25, TASKS[1].id: 0.05}
    mean = (3 * 0.25 + 0.05) / 4
    for all_sum, scale in ((one_rank, 1 / mean), (None, 1.0)):
        weighed = by_task(samples, factors, all_sum)
        assert weighed[0].distill_weight[1:] == pytest.approx([0.25 * scale] * 3)
        assert weighed[1].distill_weight[1:] == pytest.approx([0.05 * scale])


def test_tasks_that_teach_nothing_leave_nothing_rather_than_nan():
    [weighed] = by_task([sample([0])], {TASKS[0].id: 0.0}, one_rank)
    assert weighed.distill_weight == [0.0, 0.0]


def test_tasks_without_weight_leave_the_size_of_the_step_to_the_others():
    """A denominator counts tokens whose weight is not 0; over these the mean is 1."""
    samples = [sample([0, 0, 0], task=0), sample([0], task=1), sample([0], task=2)]
    weighed = by_task(samples, {TASKS[0].id: 0.0, TASKS[1].id: 0.25, TASKS[2].id: 0.05}, one_rank)
    assert [w.distill_weight[1] for w in weighed] == pytest.approx([0.0, 0.25 / 0.15, 0.05 / 0.15])


@pytest.mark.parametrize(("on", "policy"), [("distilled", 1.0), ("all", 0.25)])
def test_pass_rates_weigh_what_rewards_teach_only_where_that_is_asked_for(on, policy):
    config = WeightingConfig(pass_rate=PassRateWeighting(normalise=False, on=on))
    [weighed] = weigh([sample([0], policy=1.0)], config, {TASKS[0].id: 0.5}, one_rank)
    assert (weighed.policy_weight[1], weighed.distill_weight[1]) == (policy, 0.25)


def test_turn_weights_touch_every_component_and_the_last_stands_for_the_rest():
    [weighed] = by_turn([sample([0, 1, 2, 3], policy=2.0)], [0.0, 0.5])
    assert weighed.distill_weight == [0.0, 0.0, 0.5, 0.5, 0.5]
    assert weighed.policy_weight == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_weightings_compose():
    config = WeightingConfig(
        entropy=1.0, pass_rate=PassRateWeighting(normalise=False), steps=StepWeighting(), turns=[1.0, 0.5]
    )
    samples = [sample([0, 1], entropy=[0.0, 0.0], gaps=[1.0, 2.0])]
    [weighed] = weigh(samples, config, {TASKS[0].id: 0.5}, one_rank)
    assert weighed.distill_weight[1:] == pytest.approx([0.25, 0.25 * 0.5 * 0.5], rel=1e-5)


def test_nothing_asked_for_changes_nothing():
    samples = [sample([0, 1], policy=1.0)]
    assert weigh(samples, WeightingConfig(), {}, one_rank) == samples


@pytest.mark.parametrize("turns", [[], [-1.0], [0.0, 0.0]])
def test_turn_weights_that_mean_nothing_are_refused(turns):
    with pytest.raises(ValueError, match="turns"):
        WeightingConfig(turns=turns)
