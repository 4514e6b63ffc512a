"""The named parts of a reward, from an environment's info to metrics.jsonl and rollouts.jsonl."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.envs.dataset_env import DatasetEnv
from opd.episodes.answers import MOST_PARTS
from opd.tracking import Tracker
from opd.tracking.config import TrackingConfig
from opd.tracking.files import read_rows
from opd.trainers.loop import metrics
from opd.types import End, StopReason, Task, Trajectory, TrajectoryGroup, Turn


def told(rewards, env=None):
    return "Go on.", 0.0, env is not None and env.turn == 2, False, {"rewards": rewards}


def episodes(groups):
    return [episode for group in groups for episode in group.trajectories]


def test_parts_are_summed_over_the_turns_of_an_episode(play, scripted_env):
    parts = [{"speed": 0.5, "taste": None, "sight": None}, {"speed": np.float32(0.5), "taste": 2}]
    groups = play(lambda: scripted_env(lambda env, action: told(parts[env.turn - 1], env)))
    for episode in episodes(groups):
        assert [turn.rewards for turn in episode.turns] == [
            {"speed": 0.5, "taste": None, "sight": None},
            {"speed": 0.5, "taste": 2.0},
        ]
        assert episode.reward_parts == {"speed": 1.0, "taste": 2.0, "sight": None}
    row = metrics.of_groups(groups)
    assert {name: row[name] for name in row if name.startswith(("reward/part/", "reward/abstained/"))} == {
        "reward/part/speed": 1.0,
        "reward/part/taste": 2.0,
        "reward/abstained/sight": 2.0,
    }


def test_a_mean_is_over_the_episodes_that_a_part_told_of(play, scripted_env):
    def some(env, action):
        return "", 1.0, True, False, {"rewards": {"taste": None if env.seed % 2 else 3.0}} if env.seed % 3 else {}

    groups = play(lambda: scripted_env(some), tasks=12)
    seeds = [episode.task.seed for episode in episodes(groups) if episode.task.seed % 3]
    row = metrics.of_groups(groups)
    assert row["reward/part/taste"] == 3.0
    assert row["reward/abstained/taste"] == sum(seed % 2 for seed in seeds) > 0


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ({"a": math.nan}, r"info\[.rewards.\]\['a'\] is nan; it must be a finite number or None"),
        ({"a": math.inf}, r"is inf; it must be a finite number"),
        ({"a": 1e31}, r"is 1e\+31; it must be a finite number"),
        ({"a": "1"}, r"is '1'; it must be a finite number"),
        ({"a": [1.0]}, r"step 1: \w+"),
        ({3: 1.0}, r"a name must be 1 to 100 printable characters; got 3"),
        ({"": 1.0}, r"a name must be 1 to 100 printable characters"),
        ({"a\nb": 1.0}, r"a name must be 1 to 100 printable characters"),
        ({"a" * 101: 1.0}, r"a name must be 1 to 100 printable characters"),
        ({str(n): 1.0 for n in range(MOST_PARTS + 1)}, rf"must be a dict of at most {MOST_PARTS} parts"),
        ([1.0], r"must be a dict of at most"),
    ],
)
def test_parts_that_break_the_contract_fail_the_episode_and_no_metric_holds_them(play, scripted_env, rewards, reason):
    groups = play(lambda: scripted_env(lambda env, action: told(rewards)), tasks=1)
    [episode] = episodes(groups)
    assert episode.failed is not None
    assert re.search(reason, episode.failed), episode.failed
    assert all(math.isfinite(value) for value in metrics.of_groups(groups).values())
    assert not [name for name in metrics.of_groups(groups) if name.startswith("reward/part/")]


def test_a_data_sets_rubric_is_logged_by_name_to_the_files_of_a_run(play, tmp_path):
    rows = "".join(f'{{"prompt": "{n}?", "answer": "{n}"}}\n' for n in range(50))
    (tmp_path / "rows.jsonl").write_text(rows)

    def brief(completions):
        return [float(len(completion) < 9) for completion in completions]

    def unsure(completions):
        return [None] * len(completions)

    rewards = {"exact_match": 1.0, brief: 0.5, unsure: 1.0, "penalty": {"reward": "length", "weight": -1.0}}
    groups = play(lambda: DatasetEnv(str(tmp_path / "rows.jsonl"), rewards=rewards), tasks=3)
    everyone = episodes(groups)
    assert [episode.failed for episode in everyone] == [None] * 3
    config = TrackingConfig(wandb="disabled", console=False, plot=False)
    with Tracker(tmp_path / "run", config, run_config={}, total_steps=1) as run:
        run.log(1, metrics.of_groups(groups))
        run.log_rollouts(1, everyone)
    [row] = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["reward/part/brief"] == np.mean([float(len(e.turns[0].text) < 9) for e in everyone])
    assert row["reward/part/penalty"] == 1.0
    assert row["reward/abstained/unsure"] == 3.0
    assert "reward/part/unsure" not in row
    expected = row["reward/part/exact_match"] + 0.5 * row["reward/part/brief"] - row["reward/part/penalty"]
    assert row["reward/mean"] == pytest.approx(expected)
    first = read_rows(tmp_path / "run" / "rollouts.jsonl")[0]
    assert first["reward_parts"] == everyone[0].reward_parts
    assert set(first["reward_parts"]) == {"exact_match", "brief", "unsure", "penalty"}


_parts = st.dictionaries(st.sampled_from("abc"), st.none() | st.integers(-5, 5).map(float), max_size=3)


@given(st.lists(_parts, max_size=5))
def test_an_episodes_part_is_the_sum_of_what_was_told_of_it(turns):
    task = Task(index=0, seed=0)
    made = [
        Turn(
            prompt_ids=[1],
            completion_ids=[2],
            logprobs=[-1.0],
            stop_reason=StopReason.STOP,
            messages=[],
            text="",
            rewards=parts,
        )
        for parts in turns
    ]
    trajectory = Trajectory(task=task, member=0, turns=made, end=End.FINISHED if made else End.TIME)
    for name in "abc":
        values = [parts[name] for parts in turns if name in parts]
        numbers = [value for value in values if value is not None]
        assert (name in trajectory.reward_parts) == bool(values)
        assert trajectory.reward_parts.get(name) == (sum(numbers) if numbers else None)
    row = metrics.of_groups([TrajectoryGroup(task=task, trajectories=[trajectory])])
    assert all(math.isfinite(value) for value in row.values())
