"""gymnasium's environments of discrete actions, unchanged, played by a real model on the real scheduler."""

import re

import gymnasium
import numpy as np
import pytest

from opd.envs import check, make
from opd.envs.adapters.planning import optimal_policy, plan
from opd.errors import ConfigError

TOY_TEXT = ["FrozenLake-v1", "CliffWalking-v1", "Taxi-v4", "Blackjack-v1"]


def walk(env, solution):
    """Follow a privileged plan; what each step returned."""
    names = re.search(r": (.*)\.", solution).group(1).split(", ")
    return [env.step(name) for name in names]


@pytest.mark.parametrize("name", TOY_TEXT)
def test_a_real_model_plays_it_to_an_end(name, play):
    groups = play(lambda: make(f"gymnasium:{name}"), tasks=3, max_turns=3, max_length=4096)
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    assert [t.failed for t in trajectories] == [None] * 3
    assert all(t.terminated != t.truncated for t in trajectories)
    assert all(t.completion_tokens > 0 and t.privileged["solution"] for t in trajectories)


@pytest.mark.parametrize("name", TOY_TEXT)
def test_the_checker_finds_nothing_to_mend(name):
    findings = check(f"gymnasium:{name}")
    assert [finding for finding in findings if finding.severity == "error"] == []
    warned = [finding.message for finding in findings if finding.severity == "warning"]
    assert all("are one task" in message for message in warned)  # FrozenLake and CliffWalking have one start
    assert bool(warned) == (name in ("FrozenLake-v1", "CliffWalking-v1"))


def test_the_best_plan_crosses_a_lake_that_is_not_slippery():
    env = make("gymnasium:FrozenLake-v1", {"config": {"is_slippery": False}})
    _, info = env.reset(seed=0)
    steps = walk(env, info["privileged"]["solution"])
    assert len(steps) == 6
    text, reward, terminated, truncated, info = steps[-1]
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    assert "You reached the goal." in text


def test_a_hole_is_an_end_without_success():
    env = make("gymnasium:FrozenLake-v1", {"config": {"is_slippery": False}})
    env.reset(seed=0)
    env.step("right")
    text, reward, terminated, _, info = env.step("I think I go Down")
    assert (reward, terminated, info["success"]) == (0.0, True, False)
    assert "You fell into a hole." in text


def test_the_environments_own_limit_truncates():
    env = make("gymnasium:FrozenLake-v1", {"config": {"is_slippery": False, "max_episode_steps": 2}})
    env.reset(seed=0)
    assert env.step("left")[2:4] == (False, False)
    assert env.step("left")[2:4] == (False, True)


def test_the_best_plan_keeps_off_the_cliff():
    env = make("gymnasium:CliffWalking-v1")
    _, info = env.reset(seed=0)
    steps = walk(env, info["privileged"]["solution"])
    assert [reward for _, reward, *_ in steps] == [-1.0] * 13
    assert steps[-1][2]
    assert steps[-1][4]["success"]  # although the total is negative


def test_the_best_plan_brings_every_passenger_home():
    env = make("gymnasium:Taxi-v4")
    for seed in range(5):
        _, info = env.reset(seed=seed)
        steps = walk(env, info["privileged"]["solution"])
        assert (steps[-1][1], steps[-1][2]) == (20.0, True)


def test_on_slippery_ice_the_plan_names_an_action_for_every_place():
    env = make("gymnasium:FrozenLake-v1")
    _, info = env.reset(seed=0)
    lines = info["privileged"]["solution"].split("\n")[1:]
    actions = dict(line.split(": ") for line in lines)
    assert len(actions) == 11  # 16 places without four holes and the goal
    # The best policy reaches the goal of this map in about three episodes of four within its 100 steps.
    reached = 0
    for seed in range(100):
        text, _ = env.reset(seed=seed)
        over = False
        while not over:
            place = re.search(r"You are at (row \d, column \d)", text).group(1)
            text, reward, terminated, truncated, _ = env.step(actions[place])
            over = terminated or truncated
        reached += reward
    assert 60 <= reached <= 88


def test_the_policy_of_a_small_process_is_the_best_one():
    """Two ways from 0 to the end: a sure 1 at once, or 2 with even odds of nothing at all."""
    process = {
        0: {0: [(1.0, 1, 1.0, True)], 1: [(0.5, 1, 3.0, True), (0.5, 1, 0.0, True)]},
        1: {0: [(1.0, 1, 0.0, True)], 1: [(1.0, 1, 0.0, True)]},
    }
    assert optimal_policy(process)[0] == 1
    assert plan(process, np.array([0, 0]), 0, ("wait", "bet"), str) == "The best plan: wait."


def test_a_process_without_an_end_has_no_plan():
    circle = {0: {0: [(1.0, 0, 0.0, False)]}}
    assert plan(circle, optimal_policy(circle), 0, ("turn",), str) is None


@pytest.mark.parametrize(
    ("text", "position"),
    [("go right", 1), ("left, no: RIGHT!", 1), ("right, no: left", 0), ("rightly", 0), ("", 0), ("copyright", 0)],
)
def test_the_last_name_of_an_action_counts_and_only_whole_words(text, position):
    env = make("gymnasium:FrozenLake-v1", {"config": {"is_slippery": False}})
    env.reset(seed=0)
    env.step(text)
    assert env.step("up")[0].split("\n")[0].index("@") == position


def test_a_text_without_an_action_costs_a_turn_and_not_a_step():
    env = make("gymnasium:FrozenLake-v1", {"config": {"is_slippery": False, "max_episode_steps": 1}})
    env.reset(seed=0)
    obs, reward, terminated, truncated, info = env.step("hello")
    assert (obs, reward, terminated, truncated) == ("Say one of: left, down, right, up.", 0.0, False, False)
    assert info["feedback"] == obs


def test_no_taxi_task_is_in_two_splits():
    env = make("gymnasium:Taxi-v4")
    seen = {
        split: {env.reset(seed=n, options={"split": split})[0] for n in range(200)}
        for split in ("train", "eval", "warm")
    }
    assert min(map(len, seen.values())) > 20
    assert not seen["train"] & seen["eval"]
    assert not seen["train"] & seen["warm"]
    assert not seen["eval"] & seen["warm"]


def test_a_seed_decides_everything():
    runs = []
    for _ in range(2):
        env = make("gymnasium:CliffWalkingSlippery-v1")
        env.reset(seed=5)
        runs.append([env.step("up")[0] for _ in range(8)])
        env.reset(seed=6)
        runs.append([env.step("up")[0] for _ in range(8)])
    assert runs[:2] == runs[2:]
    assert runs[0] != runs[1]


def sum_up(env, observation):
    return f"The cards sum to {observation[0]}."


def test_any_discrete_environment_is_played_through_a_function_that_describes_it(play):
    kwargs = {"describe": sum_up, "actions": ["hold", "draw"], "rules": "Come close to 21.", "varied": False}
    groups = play(lambda: make("gymnasium:Blackjack-v1", kwargs), tasks=2, max_turns=2)
    first = groups[0].trajectories[0].turns[0].messages[0]["content"]
    assert re.fullmatch(r"Come close to 21\.\n\nThe cards sum to \d+\.", first)
    env = make("gymnasium:Blackjack-v1", kwargs)
    env.reset(seed=0)
    assert env.step("hold")[2]


class Corridor(gymnasium.Env):
    """Five places in a row, one way to go; actions are numbered from 3."""

    def __init__(self):
        self.observation_space = gymnasium.spaces.Discrete(5)
        self.action_space = gymnasium.spaces.Discrete(2, start=3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0
        return 0, {}

    def step(self, action):
        self.place += {3: 0, 4: 1}[int(action)]
        return self.place, float(self.place == 4), self.place == 4, False, {}


def test_an_unknown_environment_needs_only_a_description():
    gymnasium.register("Corridor-v0", Corridor)
    try:
        env = make("gymnasium:Corridor-v0", {"describe": lambda env, place: f"place {place}"})
        assert env.reset(seed=0) == ("place 0", {"privileged": {}})
        steps = [env.step(action) for action in ("1", "0", "1", "1", "1")]
        assert [text for text, *_ in steps] == ["place 1", "place 1", "place 2", "place 3", "place 4"]
        assert steps[-1][1:3] == (1.0, True)
        with pytest.raises(ConfigError, match=r"env\.kwargs\.describe is missing"):
            make("gymnasium:Corridor-v0")
    finally:
        del gymnasium.registry["Corridor-v0"]


@pytest.mark.parametrize(
    ("name", "kwargs", "problem"),
    [
        ("FrozenLake-v9", {}, "gymnasium cannot make 'FrozenLake-v9'"),
        ("FrozenLake-v1", {"config": {"slipery": True}}, "gymnasium cannot make"),
        ("FrozenLake-v1", {"slippery": True}, "takes no 'slippery'"),
        ("FrozenLake-v1", {"actions": ["left", "right"]}, "must be 4 different names"),
        ("FrozenLake-v1", {"actions": ["a", "b", "c", "A"]}, "must be 4 different names"),
        ("FrozenLake-v1", {"describe": "nowhere:fn"}, r"env\.kwargs\.describe: 'nowhere:fn' cannot be imported"),
        ("FrozenLake-v1", {"describe": "math:pi"}, "is a float, which cannot be called"),
        ("Pendulum-v1", {}, "only Discrete ones have names"),
        ("", {}, "must go on after the colon"),
    ],
)
def test_a_mistake_is_named(name, kwargs, problem):
    with pytest.raises(ConfigError, match=problem):
        make(f"gymnasium:{name}", kwargs)
