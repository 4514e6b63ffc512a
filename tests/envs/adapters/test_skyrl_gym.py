"""skyrl-gym's environments, with rewards at every turn."""

import json

import pytest

from opd.envs import check, make
from opd.episodes.config import EnvConfig
from opd.errors import ConfigError, EnvError
from opd.launch.checks.envs import check_env

pytestmark = pytest.mark.slow

ENV = "skyrl_gym:gsm8k_multi_turn"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        {
            "prompt": [{"role": "user", "content": f"What is {n} and {n}?"}],
            "reward_spec": {"ground_truth": str(2 * n)},
            "extra_info": {"max_turns": 3},
            "answer": f"Twice {n} is {2 * n}, so write #### {2 * n}",
        }
        for n in range(50)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"data": str(path), "privileged_columns": {"solution": "answer"}}


def test_a_real_model_plays_it(one_episode, rows):
    trajectory = one_episode(lambda: make(ENV, rows), max_turns=5)
    assert trajectory.terminated
    assert len(trajectory.turns) == 3  # the environment's own limit, which it calls done
    assert "step-by-step" in trajectory.turns[1].messages[0]["content"]
    assert trajectory.privileged["solution"].startswith("Twice")


def test_its_rewards_are_taken_turn_by_turn(spoken_episode, rows):
    trajectory = spoken_episode(lambda: make(ENV, rows), ["#### 1", "I do not know", "#### 3"])
    part = pytest.approx(0.2 / 3)
    assert [turn.reward for turn in trajectory.turns] == [part, 0.0, part]
    assert (trajectory.terminated, trajectory.success) == (True, False)


def test_the_right_answer_ends_it_with_success(rows):
    env = make(ENV, rows)
    obs, info = env.reset(seed=0, options={"split": "train", "index": 3})
    answer = info["privileged"]["solution"].rsplit(" ", 1)[1]
    *_, reward, terminated, truncated, step = env.step(f"So it is #### {answer}")
    assert (reward, terminated, truncated, step["success"]) == (1.0, True, False, True)
    assert env.reset(seed=0, options={"split": "train", "index": 3})[0] == obs


def test_the_checker_finds_nothing_to_mend(rows):
    assert [finding for finding in check(ENV, rows) if finding.severity != "note"] == []


def test_its_configuration_is_passed_on(tmp_path):
    row = {"db_id": "x", "data": "spider", "reward_spec": {"ground_truth": ""}}
    path = tmp_path / "sql.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}?", **row}) + "\n" for n in range(40)))
    env = make("skyrl_gym:text2sql", {"data": str(path), "config": {"db_path": "/nowhere"}})
    with pytest.raises(EnvError, match=r"cannot begin with this row: .*FileNotFoundError: .*/nowhere/spider/database"):
        env.reset(seed=0)


def test_a_mistake_is_named(rows):
    with pytest.raises(ConfigError, match=r"no environment 'gsm8'.*Did you mean \"gsm8k\""):
        make("skyrl_gym:gsm8", rows)
    with pytest.raises(ConfigError, match="missing a required argument: 'data'"):
        make(ENV)
    with pytest.raises(ConfigError, match=r'no column \'answr\'.*Did you mean "answer"'):
        make(ENV, {**rows, "privileged_columns": {"solution": "answr"}})


@pytest.mark.parametrize("name", ["lcb", "search", "searchcode"])
def test_what_needs_a_network_or_programs_is_refused_unless_it_is_asked_for(rows, name):
    with pytest.raises(ConfigError, match=rf"skyrl_gym:{name} .*unprotected: true and env.workers: processes"):
        make(f"skyrl_gym:{name}", rows)


def test_what_is_unprotected_must_not_run_on_threads():
    env = EnvConfig(id="skyrl_gym:search", kwargs={"unprotected": True}, workers="threads")
    [problem] = check_env(env)
    assert "Set env.workers: processes (auto is that), or leave unprotected out." in problem.text
    for workers in ("processes", "auto"):
        assert check_env(env.model_copy(update={"workers": workers})) == []
    assert check_env(EnvConfig(id="skyrl_gym:search")) == []


def test_an_unprotected_environment_plays_too_and_what_it_cannot_take_ends_the_episode(rows, monkeypatch, caplog):
    env = make(ENV, {**rows, "unprotected": True})
    _, info = env.reset(seed=0)
    answer = info["privileged"]["solution"].rsplit(" ", 1)[1]
    assert env.step(f"#### {answer}")[1] == 1.0
    env.reset(seed=0)
    monkeypatch.setattr(env._session._made._env, "step", lambda action: 1 / 0)
    _, reward, terminated, _, step = env.step("#### 1")
    assert (reward, terminated, step["success"], step["unreadable"]) == (0.0, True, False, True)
    assert "the action '#### 1' ends the episode: it raised ZeroDivisionError" in caplog.text
