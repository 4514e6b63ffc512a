"""The base class keeps the contract for a subclass that only starts and responds."""

import numpy as np
import pytest

from opd.envs import Reply, Start, TextEnv, task_split
from opd.errors import EnvError


class EchoEnv(TextEnv):
    """Repeats what it is told; `stop` ends the episode with success, `fail` gives feedback."""

    metadata = {"render_modes": [], "tasks": {"train": 10, "eval": None}}  # noqa: RUF012

    def __init__(self, prompt="Say something.", system=None, privileged=None, **kwargs):
        super().__init__(**kwargs)
        self.first = Start(prompt=prompt, system=system, privileged=privileged or {})
        self.started = []

    def start(self, rng, split, index):
        self.started.append((split, index, int(rng.integers(1 << 30))))
        return self.first

    def respond(self, action):
        if action == "stop":
            return Reply(reward=1, terminated=True, success=True)
        return Reply(
            messages=[{"role": "user", "content": action}],
            reward=0.25,
            feedback=f"failed: {action}" if action.startswith("fail") else None,
        )


def test_a_plain_prompt_is_the_observation_and_no_messages_are_given():
    obs, info = EchoEnv().reset(seed=0)
    assert obs == "Say something."
    assert info == {"privileged": {}}


def test_a_system_message_comes_first_in_the_messages_and_not_in_the_observation():
    obs, info = EchoEnv(system="Be brief.").reset(seed=0)
    assert obs == "Say something."
    assert info["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say something."},
    ]


def test_a_prompt_of_messages_keeps_their_roles():
    shots = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2"},
    ]
    obs, info = EchoEnv(prompt=shots).reset(seed=0)
    assert info["messages"] == shots
    assert obs == "1+1\n2\n2+2"


def test_privileged_text_is_in_its_own_place_only():
    obs, info = EchoEnv(privileged={"solution": "say stop"}).reset(seed=0)
    assert info["privileged"] == {"solution": "say stop"}
    assert "say stop" not in obs


def test_the_callers_copy_of_privileged_is_not_the_environments():
    env = EchoEnv(privileged={"solution": "say stop"})
    env.reset(seed=0)[1]["privileged"]["solution"] = "spoilt"
    assert env.reset(seed=0)[1]["privileged"] == {"solution": "say stop"}


def test_a_step_gives_reward_feedback_and_success():
    env = EchoEnv()
    env.reset(seed=0)
    assert env.step("hello") == ("hello", 0.25, False, False, {"success": False})
    assert env.step("fail") == ("fail", 0.25, False, False, {"success": False, "feedback": "failed: fail"})
    assert env.step("stop") == ("", 1.0, True, False, {"success": True, "messages": []})


def test_lone_surrogates_never_leave_the_environment():
    env = EchoEnv(prompt="\ud83d?", privileged={"solution": "\ud83d"})
    obs, info = env.reset(seed=0)
    assert (obs, info["privileged"]) == ("??", {"solution": "?"})
    obs, *_, info = env.step("fail \udead")
    assert (obs, info["feedback"]) == ("fail ?", "failed: fail ?")


def test_without_options_the_split_is_train_and_no_index_is_given():
    env = EchoEnv()
    env.reset(seed=0)
    env.reset(seed=0, options={})
    assert [(split, index) for split, index, _ in env.started] == [("train", None)] * 2


def test_options_address_a_task():
    env = EchoEnv()
    env.reset(seed=0, options={"split": "eval", "index": 7})
    assert env.started[0][:2] == ("eval", 7)


def test_the_seed_alone_decides_what_start_draws():
    one, other = EchoEnv(), EchoEnv()
    for seed in (3, 4):
        one.reset(seed=seed)
    for seed in (4, 3):
        other.reset(seed=seed)
    assert sorted(one.started) == sorted(other.started)
    assert one.started[0] != one.started[1]


def test_an_unknown_split_names_those_that_exist():
    with pytest.raises(EnvError, match=r"no split 'warm'; there are: train, eval"):
        EchoEnv().reset(seed=0, options={"split": "warm"})


def test_an_unknown_option_is_refused():
    with pytest.raises(EnvError, match=r"unknown options \['spilt'\]; allowed: index, split"):
        EchoEnv().reset(seed=0, options={"spilt": "eval"})


def test_a_step_needs_a_running_episode():
    env = EchoEnv()
    with pytest.raises(EnvError, match="no episode running"):
        env.step("hello")
    env.reset(seed=0)
    env.step("stop")
    with pytest.raises(EnvError, match="no episode running"):
        env.step("hello")


def test_max_steps_truncates_but_never_a_terminated_episode():
    env = EchoEnv(max_steps=2)
    env.reset(seed=0)
    assert [env.step("a")[2:4], env.step("b")[2:4]] == [(False, False), (False, True)]
    env.reset(seed=0)
    assert [env.step("a")[2:4], env.step("stop")[2:4]] == [(False, False), (True, False)]
    env.reset(seed=0)
    env.step("a")
    env.reset(seed=0)
    assert [env.step("a")[3], env.step("b")[3]] == [False, True]  # a new episode counts anew


def test_a_task_is_in_the_same_split_on_every_machine():
    # Golden: blake2b of the JSON of the key. A change here moves tasks between train and eval.
    assert [task_split("sum", a, b) for a in (1, 2) for b in (3, 4, 5)] == [
        "eval",
        "train",
        "warm",
        "train",
        "train",
        "eval",
    ]


def test_splits_have_the_shares_asked_for():
    splits = [task_split(i, held_out=0.1, warm=0.3) for i in range(4000)]
    assert np.isclose(splits.count("eval") / 4000, 0.1, atol=0.02)
    assert np.isclose(splits.count("warm") / 4000, 0.3, atol=0.03)


def test_a_key_whose_text_is_not_stable_is_refused():
    with pytest.raises(TypeError, match="int64"):
        task_split(np.int64(3))
