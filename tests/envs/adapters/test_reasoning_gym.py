"""reasoning-gym's data sets, scored by their own scorers."""

import pytest

from opd.envs import check, make
from opd.errors import ConfigError


def test_a_real_model_answers_a_question(one_episode):
    trajectory = one_episode(lambda: make("reasoning_gym:chain_sum", {"config": {"min_terms": 2, "max_terms": 2}}))
    assert trajectory.terminated
    assert 0.0 <= trajectory.reward <= 1.0
    system, user = trajectory.turns[0].messages
    assert (system["role"], user["role"]) == ("system", "user")
    assert "+" in user["content"] or "-" in user["content"]
    assert int(trajectory.privileged["solution"]) is not None


@pytest.mark.parametrize("name", ["chain_sum", "gcd", "mini_sudoku", "spell_backward"])
def test_the_checker_finds_nothing_to_mend(name):
    assert [finding for finding in check(f"reasoning_gym:{name}") if finding.severity != "note"] == []


@pytest.mark.parametrize("form", ["{}", "Let me see. <answer>{}</answer>", "<answer>1</answer> <answer> {} </answer>"])
def test_the_right_answer_gets_the_whole_reward_in_tags_or_alone(form):
    env = make("reasoning_gym:gcd")
    for seed in range(5):
        _, info = env.reset(seed=seed)
        _, reward, terminated, truncated, step = env.step(form.format(info["privileged"]["solution"]))
        assert (reward, terminated, truncated, step["success"]) == (1.0, True, False, True)


def test_a_wrong_answer_gets_the_data_sets_own_partial_score():
    env = make("reasoning_gym:chain_sum")
    _, info = env.reset(seed=0)
    answer = info["privileged"]["solution"]
    _, reward, _, _, step = env.step(f"{answer} I think")
    assert 0 < reward < 1  # the scorer gives a part for an answer among other words
    assert not step["success"]
    assert step["feedback"].startswith("The answer scored 0.")
    env.reset(seed=0)
    assert env.step("")[1] == 0.0


def test_no_question_is_in_two_splits():
    env = make("reasoning_gym:gcd", {"config": {"max_value": 12, "min_value": 1}})  # few questions, drawn often
    seen = {
        split: {env.reset(seed=n, options={"split": split})[0] for n in range(100)}
        for split in ("train", "eval", "warm")
    }
    assert min(map(len, seen.values())) > 1
    assert not seen["train"] & seen["eval"]
    assert not seen["eval"] & seen["warm"]
    assert not seen["train"] & seen["warm"]


def test_questions_drawn_from_the_global_generator_depend_on_the_seed_alone():
    first, second = (make("reasoning_gym:list_functions") for _ in range(2))
    tasks = [first.reset(seed=seed) for seed in range(5)]
    assert [second.reset(seed=seed) for seed in reversed(range(5))][::-1] == tasks


def test_a_scorer_that_raises_makes_the_answer_wrong(monkeypatch, caplog):
    env = make("reasoning_gym:gcd")
    env.reset(seed=0)
    monkeypatch.setattr(env._data, "score_answer", lambda answer, entry: 1 / 0)
    assert env.step("3")[1] == 0.0
    assert "the scorer of reasoning-gym raised" in caplog.text


@pytest.mark.parametrize(
    ("name", "config", "problem"),
    [
        ("chain_sums", {}, "no data set 'chain_sums'. Did you mean \"chain_sum\"?"),
        ("chain_sum", {"terms": 3}, "refuses .*terms"),
        ("chain_sum", {"min_terms": -1}, "refuses .*min_terms"),
    ],
)
def test_a_mistake_is_named(name, config, problem):
    with pytest.raises(ConfigError, match=problem):
        make(f"reasoning_gym:{name}", {"config": config})
