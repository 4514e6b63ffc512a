"""The plain data: what a trajectory, a view and a sample accept, and what they derive."""

import doctest
import math
from dataclasses import is_dataclass, replace
from inspect import isfunction

import pytest

from opd import types
from opd.errors import DataError
from opd.types import STREAMS, End, Sample, StopReason, Task, TeacherView, Trajectory, TrajectoryGroup, Turn, to_sample

TASK = Task(index=3, seed=5)


def turn(prompt, completion, *, forked=False, reward=0.0):
    return Turn(
        prompt_ids=prompt,
        completion_ids=completion,
        logprobs=[-0.5 * n for n in range(len(completion))],
        stop_reason=StopReason.STOP,
        messages=[],
        text="",
        forked=forked,
        reward=reward,
    )


def trajectory(*turns, **fields):
    fields = {"end": End.BROKEN if "failed" in fields else End.FINISHED, **fields}
    return Trajectory(task=TASK, member=1, turns=list(turns), **fields)


def sample(**fields):
    plain = {
        "token_ids": [1, 2, 7],
        "completion_mask": [0, 0, 1],
        "turn": [0, 0, 0],
        "sampler_logprobs": [math.nan, math.nan, -1.0],
        "policy_weight": [0.0, 0.0, 0.0],
        "distill_weight": [0.0, 0.0, 1.0],
        "ce_weight": [0.0, 0.0, 0.0],
        "advantage": [0.0, 0.0, 0.0],
    }
    return Sample(**{**plain, **fields})


def test_a_turn_with_as_many_logprobs_as_ids_is_the_only_kind():
    with pytest.raises(DataError, match="2 completion ids but 1 log-probs"):
        replace(turn([1], [2, 3]), logprobs=[-1.0])


def test_the_trained_sequence_is_the_concatenation_of_the_turns():
    whole = trajectory(turn([1, 2], [7]), turn([3], [8, 9]))
    [segment] = whole.segments()
    made = to_sample(whole, segment, distill=0.5)
    assert made.token_ids == [1, 2, 7, 3, 8, 9]
    assert made.completion_mask == [0, 0, 1, 0, 1, 1]
    assert made.turn == [0, 0, 0, 1, 1, 1]
    assert made.distill_weight == [0, 0, 0.5, 0, 0.5, 0.5]
    assert made.ce_weight == [0] * 6
    assert made.completion_ids == [7, 8, 9]
    assert made.rows == [1, 3, 4]
    assert made.task == TASK
    assert made.member == 1


def test_a_logprob_outside_the_mask_is_nan_and_not_a_number_that_could_be_read():
    whole = trajectory(turn([1, 2], [7]), turn([3], [8, 9]))
    made = to_sample(whole, whole.segments()[0])
    assert [math.isnan(p) for p in made.sampler_logprobs] == [True, True, False, True, False, False]
    assert made.sampler_logprobs[4:] == [0.0, -0.5]


def test_a_fork_cuts_the_trajectory_into_two_sequences_that_keep_the_turn_numbers():
    whole = trajectory(turn([1], [2]), turn([3], [4]), turn([5, 6], [7], forked=True), turn([8], [9]))
    first, second = whole.segments()
    assert (first.start, len(first.turns)) == (0, 2)
    assert (second.start, len(second.turns)) == (2, 2)
    made = to_sample(whole, second)
    assert made.token_ids == [5, 6, 7, 8, 9]
    assert made.turn == [2, 2, 2, 3, 3]


def test_every_sampled_token_is_in_exactly_one_segment():
    whole = trajectory(*(turn([n], [10 + n], forked=n in (0, 2, 3)) for n in range(5)))
    ids = [i for segment in whole.segments() for t in segment.turns for i in t.completion_ids]
    assert ids == [10, 11, 12, 13, 14]


def test_an_episode_without_turns_has_no_segments():
    assert trajectory(end=End.CONTEXT_FULL).segments() == []


def test_a_reward_is_the_exact_sum_of_the_steps():
    assert trajectory(*(turn([1], [2], reward=0.1) for _ in range(10))).reward == 1.0


def test_a_group_trains_neither_what_failed_nor_what_never_spoke():
    good, silent = trajectory(turn([1], [2])), trajectory(end=End.CONTEXT_FULL)
    broken = trajectory(turn([1], [2]), failed="step 1: it broke")
    cut = trajectory(turn([1], [2]), end=End.MAX_TURNS)
    assert TrajectoryGroup(task=TASK, trajectories=[good, silent, broken, cut]).usable == [good, cut]


@pytest.mark.parametrize("rows", [[-1], [2], [0, 5]])
def test_a_view_refuses_a_row_that_predicts_nothing(rows):
    with pytest.raises(DataError, match=r"lies outside 0\.\.1"):
        TeacherView(token_ids=[1, 2, 3], rows=rows)


def test_a_view_refuses_rows_out_of_order():
    with pytest.raises(DataError, match="increase strictly"):
        TeacherView(token_ids=[1, 2, 3, 4], rows=[1, 1])


def test_a_view_names_the_ids_that_its_rows_predict():
    assert TeacherView(token_ids=[9, 8, 7, 6], rows=[0, 2]).targets == [8, 6]


def test_a_sample_refuses_a_view_that_is_one_row_off():
    view = TeacherView(token_ids=[5, 5, 5, 7, 1], rows=[2])
    assert sample(teacher_view=view).teacher_view is view
    for row in (1, 3):
        with pytest.raises(DataError, match="does not hold the sampled ids"):
            sample(teacher_view=replace(view, rows=[row]))


def test_a_sample_refuses_a_view_of_too_few_or_too_many_tokens():
    with pytest.raises(DataError, match="does not hold the sampled ids"):
        sample(teacher_view=TeacherView(token_ids=[5, 7, 7], rows=[0, 1]))
    with pytest.raises(DataError, match="does not hold the sampled ids"):
        sample(teacher_view=TeacherView(token_ids=[5, 7], rows=[]))


@pytest.mark.parametrize("name", STREAMS)
def test_a_sample_refuses_a_stream_of_another_length(name):
    with pytest.raises(DataError, match=rf"sample\.{name} has 2 entries for 3 tokens"):
        sample(**{name: [0, 0]})


@pytest.mark.parametrize("name", ["policy_weight", "distill_weight", "ce_weight"])
@pytest.mark.parametrize("weight", [1.0, -1.0, math.nan])
def test_a_weight_on_a_token_that_was_not_sampled_is_refused(name, weight):
    with pytest.raises(DataError, match=rf"sample\.{name} is non-zero on a token that was not sampled"):
        sample(**{name: [0.0, weight, 0.0]})


def test_the_first_token_cannot_be_trained():
    with pytest.raises(DataError, match="no row predicts it"):
        sample(completion_mask=[1, 0, 1])


def test_new_weights_leave_the_old_sample_alone():
    old = sample()
    new = replace(old, distill_weight=[0.0, 0.0, 0.25])
    assert new.distill_weight == [0.0, 0.0, 0.25]
    assert old.distill_weight == [0.0, 0.0, 1.0]
    with pytest.raises(DataError, match="was not sampled"):
        replace(old, ce_weight=[1.0, 0.0, 0.0])


def test_one_episode_runs_through_the_examples_of_all_types_and_they_are_true():
    examples = [test for test in doctest.DocTestFinder().find(types, globs={}) if test.examples]
    shared, runner, report = dict(vars(types)), doctest.DocTestRunner(), []
    for test in sorted(examples, key=lambda test: test.lineno):
        test.globs = shared
        runner.run(test, out=report.append, clear_globs=False)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
    data = {name for name, kind in vars(types).items() if is_dataclass(kind)} | {"Segment"}
    shown = {test.name.removeprefix("opd.types.") for test in examples}
    assert {name for name in shown if not isfunction(vars(types)[name])} == data
