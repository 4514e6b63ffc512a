"""When a run cannot learn any more. Whole runs are in tests/launch/test_unhealthy_runs.py."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest

from opd.errors import HealthError
from opd.trainers.loop.health import Health
from opd.trainers.loop.loop import whose_numbers
from opd.types import End, Task, Trajectory, TrajectoryGroup


@pytest.fixture
def group(make_chat, make_group):
    return lambda outcomes: make_group(make_chat(), outcomes)


def test_three_rounds_of_broken_episodes_end_a_run_with_the_first_failure(group):
    health = Health(3)
    health.played([group("FF")])
    health.played([group("F"), group("F")])
    with pytest.raises(HealthError, match=r"last 3 rounds.*The first failure: train/0 at it broke\."):
        health.played([group("F")])


def test_one_usable_episode_begins_the_count_anew_and_being_wrong_is_no_fault(group):
    health = Health(2)
    for outcomes in ("F", "FWF", "F", "W", "F"):
        health.played([group(outcomes)])
    with pytest.raises(HealthError):
        health.played([group("F")])


def test_a_round_of_no_tasks_says_nothing(group):
    health = Health(2)
    health.played([group("F")])
    health.played([])
    assert health.streaks["unusable"] == 1


def test_groups_that_lost_too_many_members_are_of_no_use(group):
    lost = group("WF")
    lost = TrajectoryGroup(task=lost.task, trajectories=lost.trajectories, dropped=True)
    with pytest.raises(HealthError, match="train/0 at it broke"):
        Health(1).played([lost])


def test_episodes_without_room_for_a_completion_are_of_no_use_either():
    empty = Trajectory(task=Task(index=4, seed=0), member=0, turns=[], end=End.CONTEXT_FULL)
    with pytest.raises(HealthError, match=r"train/4 has no room for a completion: .*rollout\.max_length"):
        Health(1).played([TrajectoryGroup(task=empty.task, trajectories=[empty])])


def test_three_updates_in_a_row_that_are_not_finite_end_a_run_also_across_steps():
    health = Health(3)
    assert health.updated([math.nan, 1.0], [1.0, math.inf]) is None
    error = health.updated([math.nan], [math.nan])
    assert "the last 3 updates are not finite (loss nan, gradient norm nan)" in str(error)
    assert error.exit_code == 1


def test_a_finite_update_begins_the_count_anew():
    health = Health(2)
    assert health.updated([math.nan, 1.0, math.nan], [math.nan, 1.0, math.nan]) is None
    assert health.updated([1.0], [1.0]) is None
    assert health.updated([math.nan], [1.0]) is None


def test_what_was_counted_before_a_restart_counts():
    health = Health(3, streaks=Counter({"not finite": 2, "unusable": 2}))
    assert "the last 3 updates" in str(health.updated([math.nan], [1.0]))
    assert "the last 3 updates" in str(health.updated([math.nan], [1.0]))


def test_a_stage_too_short_to_be_given_up_ends_so_where_nothing_in_it_was_of_use(group):
    health = Health(3)
    health.played([group("F")])
    with pytest.raises(HealthError, match=r"not one episode of the stage's 1 steps.*it broke"):
        health.ended(steps=1, updates=1)
    health.ended(steps=2, updates=2)
    health.updated([math.nan] * 2, [math.nan] * 2)
    with pytest.raises(HealthError, match=r"not one of the stage's 2 updates is finite"):
        health.ended(steps=2, updates=2)
    Health(0, streaks=health.streaks).ended(steps=1, updates=1)


def test_nothing_ends_a_run_that_is_told_to_go_on(group):
    health = Health(0)
    for _ in range(9):
        health.played([group("F")])
        assert health.updated([math.nan], [math.nan]) is None


def test_after_updates_that_are_not_finite_the_model_that_is_to_blame_is_named(make_model):
    good, bad = make_model(), make_model(seed=1)
    name, weight = list(bad.named_parameters())[3]
    weight.data[0] = math.inf

    def whose(student, other):
        return whose_numbers(SimpleNamespace(student=student, teacher=SimpleNamespace(other=other)))

    assert whose(good, bad) == f"Of the teacher, {name} holds nan or infinity."
    assert whose(bad, None) == f"Of the student, {name} holds nan or infinity."
    list(bad.parameters())[5].data[0] = math.nan
    assert whose(bad, good) == f"Of the student, {name} and 1 more weights hold nan or infinity."
    assert whose(good, good).startswith("All weights are finite")
