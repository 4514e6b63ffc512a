"""One suite over every environment of ours, and the example: registering one tests it."""

import dataclasses
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from opd.envs import TextEnv, TextSpace, check, list_envs, make

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_env.py"
spec = importlib.util.spec_from_file_location("custom_env_example", EXAMPLE)
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])

ROWS = [
    {"prompt": f"Naïve question {i} 漢字?", "answer": f"réponse {i}", "proof": f"the proof of number {i}"}
    for i in range(80)
]
ENVS = [*list_envs(), "custom_env_example:GuessEnv"]
ACTIONS = ["", " ", "é漢字😀\0", "x" * 100_000, "<tool_call>", '{"name": 3}', "\ud83d", "42"]


@pytest.fixture(params=ENVS)
def made(request, tmp_path):
    """Return the id of an environment and the arguments that it needs."""
    if request.param != "opd/Dataset-v0":
        return request.param, {}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return request.param, {
        "path": str(path),
        "rewards": ["contains_answer"],
        "privileged_columns": {"solution": "proof", "answer": "answer"},
    }


def test_gymnasiums_checker_passes_without_a_warning(made):
    env = make(*made).unwrapped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env, skip_render_check=env.spec is None)


def test_our_checker_finds_nothing_to_mend(made):
    assert [finding for finding in check(*made) if finding.severity != "note"] == []


def test_every_environment_says_what_only_a_teacher_may_see(made):
    _, info = make(*made).reset(seed=0)
    assert info["privileged"].get("solution")


def test_no_action_makes_a_step_raise_and_every_text_is_in_its_space(made):
    env = make(*made)
    for seed, action in enumerate(ACTIONS):
        obs, _ = env.reset(seed=seed)
        assert obs in env.observation_space
        obs, reward, terminated, truncated, info = env.step(action)
        assert obs in env.observation_space
        assert (type(reward), type(terminated), type(truncated), type(info["success"])) == (float, bool, bool, bool)
        assert all(message["content"] in TextSpace() for message in info.get("messages", []))


def test_privileged_text_never_reaches_the_student(made):
    env = make(*made)
    for seed in range(30):
        obs, info = env.reset(seed=seed)
        secret = info["privileged"]["solution"]
        seen = [obs, *(message["content"] for message in info.get("messages", []))]
        for action in ("", "42", '{"name": "answer", "arguments": {"value": "red"}}'):
            obs, _, terminated, truncated, info = env.step(action)
            seen += [obs, *(message["content"] for message in info.get("messages", []))]
            if terminated or truncated:
                break
        assert not any(secret in text for text in seen)


def test_the_same_seed_gives_the_same_task_in_any_order(made):
    one, other = make(*made), make(*made)
    tasks = [one.reset(seed=seed) for seed in range(12)]
    assert [other.reset(seed=seed) for seed in reversed(range(12))] == tasks[::-1]
    assert len({task[1]["privileged"]["solution"] for task in tasks}) > 1


@pytest.mark.parametrize("vector", [SyncVectorEnv, lambda fns: AsyncVectorEnv(fns, shared_memory=False)])
def test_vector_environments_play_it(made, vector):
    single = make(*made)
    envs = vector([lambda: make(*made)] * 3)
    try:
        assert envs.single_observation_space == TextSpace()
        obs, info = envs.reset(seed=[1, 2, 3])
        expected = [single.reset(seed=seed) for seed in (1, 2, 3)]
        assert obs == tuple(text for text, _ in expected)
        assert list(info["privileged"]["solution"]) == [i["privileged"]["solution"] for _, i in expected]
        for actions in (("", "é" * 50_000, "x\0"), envs.action_space.sample()):
            obs, reward, terminated, truncated, _ = envs.step(actions)
            assert all(text in TextSpace() for text in obs)
            assert [len(obs), *(array.shape for array in (reward, terminated, truncated))] == [3, (3,), (3,), (3,)]
    finally:
        envs.close()


def speaking(env, text):
    """Return the class of an environment, made to say nothing but `text`, at the start and at every step."""
    cls = type(env)

    class Speaking(cls):
        if issubclass(cls, TextEnv):

            def start(self, *args):
                return dataclasses.replace(super().start(*args), prompt=text, system=None)

            def respond(self, action):
                said = [{"role": "user", "content": text}]
                return dataclasses.replace(super().respond(action), messages=said)

        else:

            def reset(self, *, seed=None, options=None):
                return text, super().reset(seed=seed, options=options)[1]

            def step(self, action):
                return text, *super().step(action)[1:]

    return Speaking


@pytest.mark.parametrize("text", ["", "Ω≈ç√ é 漢字 😀", "x" * 100_000], ids=["empty", "unicode", "100 kB"])
@pytest.mark.parametrize("vector", [SyncVectorEnv, lambda fns: AsyncVectorEnv(fns, shared_memory=False)])
def test_any_observation_passes_the_checker_and_a_vector_environment(made, text, vector):
    env_id, kwargs = made
    cls = speaking(make(env_id, kwargs).unwrapped, text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(cls(**kwargs), skip_render_check=True)
    envs = vector([lambda: cls(**kwargs)] * 2)
    try:
        assert envs.reset(seed=0)[0] == (text, text)
        assert envs.step(("", text))[0] == (text, text)
    finally:
        envs.close()
