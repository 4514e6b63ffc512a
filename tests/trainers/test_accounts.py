"""Where each sampled token went: episodes and samples small enough to count by eye."""

import math
from dataclasses import replace

import pytest

from opd.trainers.loop.accounts import account
from opd.types import End, Fault, StopReason, Task, Trajectory, TrajectoryGroup, Turn, to_sample


def turn(*ids, forked=False):
    return Turn(
        prompt_ids=[1, 2],
        completion_ids=list(ids),
        logprobs=[-1.0] * len(ids),
        stop_reason=StopReason.STOP,
        messages=[],
        text="",
        forked=forked,
    )


def episode(index=0, member=0, turns=((7,), (8, 9)), **how):
    made = [turn(*ids) for ids in turns]
    how = {"end": End.BROKEN if "failed" in how else End.FINISHED, **how}
    return Trajectory(task=Task(index=index, seed=0), member=member, turns=made, **how)


def group(*trajectories, **how):
    return TrajectoryGroup(task=trajectories[0].task, trajectories=list(trajectories), **how)


def samples(*groups, weight=1.0):
    return [to_sample(t, s, distill=weight) for g in groups for t in g.usable for s in t.segments()]


def test_tokens_that_a_loss_weighs_are_trained():
    g = group(episode(), episode(member=1, turns=[[5]]))
    assert account([g], samples(g)) == {"tokens/sampled": 4, "tokens/trained": 4, "tokens/masked": 0}


def test_tokens_of_a_sample_without_a_weight_are_masked():
    g = group(episode())
    [sample] = samples(g)
    one = replace(sample, distill_weight=[0.0 if t != 9 else 0.5 for t in sample.token_ids])
    assert account([g], [one]) == {"tokens/sampled": 3, "tokens/trained": 1, "tokens/masked": 2}
    # A second sample of the same tokens may weigh what the first one does not, and nothing is counted twice.
    other = replace(sample, distill_weight=[0.0] * 7, ce_weight=[0.0 if t != 7 else 1.0 for t in sample.token_ids])
    assert account([g], [one, other]) == {"tokens/sampled": 3, "tokens/trained": 2, "tokens/masked": 1}


def test_every_segment_of_a_forked_episode_is_counted():
    forked = replace(episode(), turns=[turn(7), turn(8, 9, forked=True), turn(5)])
    g = group(forked)
    assert len(samples(g)) == 2
    assert account([g], samples(g)) == {"tokens/sampled": 4, "tokens/trained": 4, "tokens/masked": 0}
    assert account([g], samples(g)[1:])["tokens/dropped/unused"] == 1


@pytest.mark.parametrize("fault", Fault)
def test_a_failed_episode_is_dropped_for_the_kind_of_its_failure(fault):
    g = group(episode(failed="why", fault=fault), episode(member=1))
    row = account([g], samples(g))
    assert row == {
        "tokens/sampled": 6,
        "tokens/trained": 3,
        "tokens/masked": 0,
        f"tokens/dropped/{fault.value}": 3,
    }


def test_attempts_that_were_played_again_and_groups_that_became_too_small_are_told_apart():
    g = group(
        episode(failed="why", fault=Fault.DIED),
        episode(member=1, turns=[[5]]),
        replaced=[episode(turns=[[7]] * 4, failed="why", fault=Fault.TIMEOUT)],
        dropped=True,
    )
    assert samples(g) == []
    assert account([g], []) == {
        "tokens/sampled": 8,
        "tokens/trained": 0,
        "tokens/masked": 0,
        "tokens/dropped/retried": 4,
        "tokens/dropped/died": 3,
        "tokens/dropped/small_group": 1,
    }


def test_episodes_that_the_method_passed_over_are_unused_and_an_update_left_out_is_skipped():
    groups = [group(episode()), group(episode(index=1, turns=[[5]]))]
    assert account(groups, samples(groups[0]))["tokens/dropped/unused"] == 1
    row = account(groups, samples(groups[1]), skipped=samples(groups[0]))
    assert row == {"tokens/sampled": 4, "tokens/trained": 1, "tokens/masked": 0, "tokens/dropped/skipped": 3}


def test_the_parts_add_up_when_tokens_have_every_fate():
    groups = [
        group(episode(), episode(member=1, failed="x", fault=Fault.INVALID), replaced=[episode(member=1)]),
        group(episode(index=1), dropped=True),
        group(episode(index=2)),
        group(episode(index=3, end=End.MAX_TURNS)),
        group(episode(index=4, turns=[], end=End.CONTEXT_FULL)),
    ]
    trained = [*samples(groups[0]), *samples(groups[3], weight=0.0)]
    row = account(groups, trained)
    assert row["tokens/sampled"] == 18 == math.fsum(row.values()) - 18
    assert row["tokens/masked"] == 3


def test_a_stored_set_may_hold_a_task_more_than_once():
    short, long = samples(group(episode(turns=[[5]]))), samples(group(episode(turns=[[5, 6]])))
    assert account([], [*short, *long]) == {"tokens/sampled": 0, "tokens/trained": 3, "tokens/masked": 0}
