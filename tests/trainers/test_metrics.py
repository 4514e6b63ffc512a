"""The numbers of a step, computed by hand."""

import math
from dataclasses import replace

import pytest
import torch

from opd.trainers.loop.metrics import of_groups, of_samples, of_tokens, of_variance, pass_rates
from opd.types import End, Sample, StopReason, Task, TeacherView, Trajectory, TrajectoryGroup, Turn

TASK = Task(index=0, seed=0)


def sample(turns, *, success=False, policy=0.0, advantage=0.0, distill=0.0, route="distill"):
    size = len(turns)
    return Sample(
        token_ids=[1, *range(2, 2 + size)],
        completion_mask=[0] + [1] * size,
        turn=[turns[0], *turns],
        sampler_logprobs=[math.nan] + [-1.0] * size,
        policy_weight=[0.0] + [policy] * size,
        distill_weight=[0.0] + [distill] * size,
        ce_weight=[0.0] * (size + 1),
        advantage=[0.0] + [advantage] * size,
        teacher_view=TeacherView(token_ids=[9, *range(2, 2 + size)], rows=list(range(size))),
        task=TASK,
        success=success,
        route=route,
    )


def facts(**values):
    return {name: torch.tensor(column) for name, column in values.items()}


def test_the_gap_to_the_teacher_is_split_by_outcome_and_by_turn():
    samples = [sample([0, 0, 1], distill=1.0), sample([0, 9], distill=1.0, success=True)]
    row = of_tokens(samples, {0: facts(nats=[1.0, 3.0, 5.0]), 1: facts(nats=[0.0, 1.0])})
    assert row["distill/nats"] == pytest.approx(2.0)
    assert row["distill/nats_max"] == 5.0
    assert row["distill/nats_wrong"] == pytest.approx(3.0)
    assert row["distill/nats_right"] == pytest.approx(0.5)
    assert row["distill/nats_turn_0"] == pytest.approx(4 / 3)
    assert row["distill/nats_turn_1"] == 5.0
    assert row["distill/nats_turn_7"] == 1.0  # all turns from there on


def test_only_tokens_that_train_by_a_component_count_for_it():
    samples = [sample([0], distill=1.0), sample([0], policy=1.0, advantage=1.0, route="policy")]
    row = of_tokens(
        samples,
        {
            0: facts(nats=[2.0], ratio=[9.0], ratio_clipped=[1.0], entropy=[1.0]),
            1: facts(nats=[7.0], ratio=[1.5], ratio_clipped=[0.0], entropy=[3.0]),
        },
    )
    assert row["distill/nats"] == 2.0
    assert row["policy/ratio_p50"] == 1.5
    assert row["policy/clipped"] == 0.0
    assert row["entropy/student"] == 2.0


def test_tokens_without_a_fact_are_left_out_of_its_mean():
    row = of_tokens(
        [sample([0, 0], distill=1.0)], {0: facts(nats=[math.nan, 4.0], kept=[0.5, 0.7], clipped=[0.0, 0.2])}
    )
    assert (row["distill/nats"], row["distill/kept"]) == (4.0, pytest.approx(0.6))
    assert row["distill/clipped"] == pytest.approx(0.1)


def test_the_gap_between_sampler_and_trainer_is_absolute_and_its_ratio_has_quantiles():
    values = facts(sampler_gap=[-0.5, 0.1], sampler_ratio=[0.6, 1.1], sampler_limited=[1.0, 0.0])
    row = of_tokens([sample([0, 0], distill=1.0)], {0: values})
    assert row["sampler/gap"] == pytest.approx(0.3)
    assert row["sampler/limited"] == 0.5
    assert row["sampler/ratio_p50"] == pytest.approx(0.85)
    assert row["sampler/ratio_p01"] < row["sampler/ratio_p50"] < row["sampler/ratio_p99"]


def test_the_variance_meter_sums_before_it_divides():
    columns = {
        "turn": torch.zeros(2).numpy(),
        "variance_plain": torch.tensor([1.0, 9.0]).numpy(),
        "variance_baselined": torch.tensor([2.0, 3.0]).numpy(),
        "variance_least": torch.tensor([1.0, 1.0]).numpy(),
    }
    row = of_variance(columns)
    ratios = {"variance/baseline": 0.5, "variance/least": 0.2, "variance/reached": 5 / 8}
    assert row == pytest.approx({"variance/plain": 5.0, **ratios})


def test_samples_from_which_nothing_can_be_learned_are_counted():
    samples = [
        sample([0], policy=1.0, advantage=0.0, route="policy"),
        sample([0], policy=1.0, advantage=-2.0, route="policy"),
        sample([0], distill=1.0),
        sample([0]),
    ]
    row = of_samples(samples)
    assert row["signal/zero"] == 0.5
    assert (row["route/policy"], row["route/distill"]) == (2, 2)


def test_routes_have_shares_and_what_teachers_are_shown_is_a_share_of_all_samples():
    unseen = replace(sample([0], route="policy", policy=1.0), teacher_view=None)
    told = sample([0], distill=1.0)
    shows = [("demonstration",), ("demonstration", "feedback"), ()]
    told = [replace(told, teacher_view=replace(told.teacher_view, shows=names)) for names in shows]
    row = of_samples([unseen, *told])
    assert (row["route/policy_share"], row["route/distill_share"]) == (0.25, 0.75)
    assert (row["shown/demonstration"], row["shown/feedback"]) == (0.5, 0.25)


def test_tasks_with_a_solved_episode_and_tasks_with_unequal_rewards_are_shares_of_the_tasks_that_were_played():
    def group(*outcomes):
        turn = Turn(
            prompt_ids=[1], completion_ids=[2], logprobs=[0.0], stop_reason=StopReason.STOP, messages=[], text=""
        )
        played = [
            Trajectory(
                task=TASK,
                member=n,
                turns=[replace(turn, reward=reward)],
                end=End.FINISHED if broken is None else End.BROKEN,
                success=reward == 1 and broken is None,
                failed=broken,
            )
            for n, (reward, broken) in enumerate(outcomes)
        ]
        return TrajectoryGroup(task=TASK, trajectories=played)

    fine, broken = None, "broke"
    row = of_groups(
        [
            group((1, fine), (1, fine)),
            group((1, fine), (0, fine)),
            group((0, fine), (0.5, fine)),
            group((0, fine), (0, fine), (0.5, broken)),
            group((1, broken)),
        ]
    )
    assert (row["signal/solved_groups"], row["signal/mixed_groups"]) == (0.5, 0.5)
    assert "signal/solved_groups" not in of_groups([group((1, broken))])


def test_a_step_without_samples_has_no_means():
    assert of_samples([]) == {}
    assert of_tokens([], {}) == {}


def test_a_pass_rate_is_over_the_episodes_that_were_played_whole():
    turn = Turn(prompt_ids=[1], completion_ids=[2], logprobs=[0.0], stop_reason=StopReason.STOP, messages=[], text="")
    played = [
        Trajectory(task=TASK, member=n, turns=[turn], end=End.FINISHED, success=n == 0)
        if n < 2
        else Trajectory(task=TASK, member=n, turns=[turn], end=End.BROKEN, failed="broke")
        for n in range(3)
    ]
    broken = TrajectoryGroup(task=Task(index=1, seed=1), trajectories=played[2:])
    assert pass_rates([TrajectoryGroup(task=TASK, trajectories=played), broken]) == {TASK.id: 0.5}
