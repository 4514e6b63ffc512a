"""Why episodes end: each reason, by scripted environments on the real engine with a random model."""

import threading
import time
from dataclasses import replace

import pytest

from opd.envs import Reply, Start, ToolEnv
from opd.errors import DataError
from opd.tracking.files import episode_row
from opd.trainers.loop.metrics import of_groups
from opd.trainers.parts.episodes import read_episode, to_row
from opd.types import End, Fault, StopReason, Task, Trajectory, Turn


def flat(groups):
    return [t for group in groups for t in group.trajectories]


def over(*flags, **info):
    """A play that ends at once: `terminated` and `truncated`, and what info says."""
    return lambda env, action: ("", 0.0, *flags, info)


class Refuses(ToolEnv):
    """A tool environment that ends an episode in which no tool is called."""

    def start(self, rng, split, index):
        return Start(prompt="call me")

    def no_call(self, action):
        return Reply(terminated=True, unreadable=True)


# -- the environment ends it -------------------------------------------------------------------------


def test_an_ending_is_finished_after_a_whole_completion_and_cut_after_a_cut_one(play, scripted_env):
    episodes = flat(play(lambda: scripted_env(over(True, False)), tasks=24))
    ends = {(e.end, e.turns[-1].stop_reason) for e in episodes}
    assert ends == {(End.FINISHED, StopReason.STOP), (End.COMPLETION_CUT, StopReason.LENGTH)}
    assert all(e.terminated and not e.truncated for e in episodes)


def test_only_the_last_completion_counts(play, scripted_env, turns_then_end):
    episodes = flat(play(lambda: scripted_env(turns_then_end(3)), tasks=24))
    assert any(e.end is End.FINISHED and e.turns[0].stop_reason is StopReason.LENGTH for e in episodes)
    assert any(e.end is End.COMPLETION_CUT and e.turns[0].stop_reason is StopReason.STOP for e in episodes)


def test_a_completion_that_the_full_context_cut_is_told_from_one_that_max_tokens_cut(play, scripted_env, make_model):
    options = {"tasks": 1, "model": make_model(), "max_tokens": 12}
    [short] = flat(play(lambda: scripted_env(over(True, False)), **options))
    [full] = flat(
        play(lambda: scripted_env(over(True, False)), max_length=len(short.turns[0].prompt_ids) + 11, **options)
    )
    assert [len(e.turns[0].completion_ids) for e in (short, full)] == [12, 11]
    assert [e.end for e in (short, full)] == [End.COMPLETION_CUT, End.CONTEXT_CUT]
    assert full.terminated


@pytest.mark.parametrize("hosts", ["threads", pytest.param("processes", marks=pytest.mark.slow)])
def test_an_environment_that_could_not_read_the_action_says_so(play, hosts):
    episodes = flat(play(Refuses, tasks=12, hosts=hosts))
    for episode in episodes:
        whole = episode.turns[-1].stop_reason is StopReason.STOP
        assert episode.end is (End.UNREADABLE if whole else End.COMPLETION_CUT)
    assert {e.end for e in episodes} == {End.UNREADABLE, End.COMPLETION_CUT}
    assert all(e.terminated for e in episodes)


def test_an_unreadable_action_that_is_said_in_words_breaks_the_contract(play, scripted_env):
    [episode] = flat(play(lambda: scripted_env(over(True, False, unreadable="no")), tasks=1))
    assert (episode.end, episode.fault) == (End.BROKEN, Fault.INVALID)
    assert "info[\"unreadable\"] is 'no'; it must be a bool" in episode.failed


def test_an_unreadable_action_that_ends_nothing_is_noted_at_its_turn(play, scripted_env):
    [episode] = flat(play(lambda: scripted_env(over(False, False, unreadable=True)), tasks=1))
    assert episode.end is End.MAX_TURNS
    assert all(turn.unreadable for turn in episode.turns)


# -- a limit ends it ---------------------------------------------------------------------------------


def test_a_limit_of_the_environments_own_is_told_from_ours(play, scripted_env):
    [episode] = flat(play(lambda: scripted_env(over(False, True)), tasks=1))
    assert (episode.end, episode.truncated) == (End.ENVIRONMENT_LIMIT, True)


def test_the_turn_limit_is_the_end_also_where_the_last_completion_was_cut(play, scripted_env, turns_then_end):
    episodes = flat(play(lambda: scripted_env(turns_then_end(9)), tasks=12, max_turns=2))
    assert {e.end for e in episodes} == {End.MAX_TURNS}
    assert {e.turns[-1].stop_reason for e in episodes} == set(StopReason)


def test_a_full_context_is_the_end_before_the_first_turn_and_after_some(play, scripted_env, turns_then_end):
    options = {"max_turns": 99, "max_length": 100, "max_tokens": 25}
    [later] = flat(play(lambda: scripted_env(turns_then_end(99)), tasks=1, **options))
    [first] = flat(play(lambda: scripted_env(turns_then_end(99), first="x" * 500), tasks=1, **options))
    assert [e.end for e in (first, later)] == [End.CONTEXT_FULL] * 2
    assert first.turns == []
    assert later.turns


def test_time_is_the_end_while_a_step_runs_and_before_a_turn(play, scripted_env, turns_then_end):
    gate = threading.Event()
    [during] = flat(play(lambda: scripted_env(lambda *_: gate.wait()), tasks=1, episode_timeout=0.5))
    gate.set()

    def slow(messages, privileged):  # on the scheduler's own thread, before the first turn
        time.sleep(0.6)
        return messages

    [before] = flat(play(lambda: scripted_env(turns_then_end(1)), tasks=1, episode_timeout=0.5, rewrite=slow))
    assert [(e.end, len(e.turns), e.truncated) for e in (during, before)] == [(End.TIME, 1, True), (End.TIME, 0, True)]


# -- something breaks --------------------------------------------------------------------------------


def test_an_environment_that_raises_broke(play, scripted_env):
    [episode] = flat(play(lambda: scripted_env(lambda env, _: 1 / 0), tasks=1))
    assert (episode.end, episode.fault, episode.terminated, episode.truncated) == (
        End.BROKEN,
        Fault.RAISED,
        False,
        False,
    )
    assert episode.failed.startswith("step 1: ZeroDivisionError")


# -- what is logged and kept -------------------------------------------------------------------------


def test_a_step_logs_the_share_of_each_end_by_name(play, scripted_env):
    def by_seed(env, action):
        env.seed = env.seed % 4
        return {0: over(True, False), 1: over(False, True), 2: over(False, False), 3: lambda *_: 1 / 0}[env.seed](
            env, ""
        )

    groups = play(lambda: scripted_env(by_seed), tasks=16, group_size=2, max_turns=1)
    row = of_groups(groups)
    ends = [e.end for e in flat(groups)]
    assert {end: row[f"end/{end}"] for end in End} == {end: ends.count(end) / 32 for end in End}
    assert {End.ENVIRONMENT_LIMIT, End.MAX_TURNS, End.BROKEN} < set(ends)
    assert not any(key.startswith("end/") for key in of_groups([]))


def test_an_episode_is_written_with_its_end_and_read_as_it_was(play, scripted_env):
    for episode in flat(play(lambda: scripted_env(over(True, False)), tasks=12)):
        assert episode_row(1, episode)["end"] == str(episode.end)
        back = read_episode(to_row(episode))
        assert (back.end, back.turns[0].stop_reason) == (episode.end, episode.turns[0].stop_reason)


def test_a_kept_episode_of_no_known_end_is_no_episode(play, scripted_env):
    [episode] = flat(play(lambda: scripted_env(over(True, False)), tasks=1))
    with pytest.raises(ValueError, match="'bored' is not a valid End"):
        read_episode(to_row(episode) | {"end": "bored"})


# -- what contradicts itself -------------------------------------------------------------------------

TURN = Turn(prompt_ids=[1], completion_ids=[2], logprobs=[-1.0], stop_reason=StopReason.STOP, messages=[], text="x")
CUT = replace(TURN, stop_reason=StopReason.LENGTH)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"end": End.BROKEN}, "ended by broken has failed = None"),
        ({"end": End.FINISHED, "failed": "it broke"}, "ended by finished has failed = 'it broke'"),
        ({"end": End.FINISHED, "fault": Fault.DIED}, "did not fail has fault = died"),
        ({"end": End.BROKEN, "failed": "it broke", "success": True}, "broke cannot have solved"),
        ({"end": End.FINISHED, "turns": []}, "without turns cannot have ended by finished"),
        ({"end": End.MAX_TURNS, "turns": []}, "without turns cannot have ended by max_turns"),
        ({"end": End.FINISHED, "turns": [CUT]}, "ended by finished, but its last completion by length"),
        ({"end": End.UNREADABLE, "turns": [CUT]}, "ended by unreadable, but its last completion by length"),
        ({"end": End.COMPLETION_CUT}, "ended by completion_cut, but its last completion by stop"),
        ({"end": End.CONTEXT_CUT}, "ended by context_cut, but its last completion by stop"),
    ],
)
def test_a_trajectory_whose_end_contradicts_its_other_facts_is_refused(fields, reason):
    with pytest.raises(DataError, match=reason):
        Trajectory(**{"task": Task(index=0, seed=0), "member": 0, "turns": [TURN]} | fields)


def test_an_end_is_one_of_terminated_truncated_and_broken():
    kinds = {end: (end.terminated, end.truncated, end is End.BROKEN) for end in End}
    assert {sum(kind) for kind in kinds.values()} == {1}
