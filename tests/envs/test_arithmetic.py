"""The sums are right, the splits apart, and the reward follows the last number."""

import re

import pytest

from opd.envs.worlds.arithmetic import ArithmeticEnv, solution
from opd.errors import ConfigError


def operands(obs):
    a, op, b = re.search(r"(-?\d+) ([-+*]) (\d+)", obs).groups()
    return int(a), op, int(b)


@pytest.mark.parametrize(("op", "compute"), [("+", int.__add__), ("-", int.__sub__), ("*", int.__mul__)])
@pytest.mark.parametrize("digits", [1, 2, 3])
def test_the_right_answer_is_rewarded_and_its_neighbours_are_not(op, compute, digits):
    env = ArithmeticEnv(operators=op, digits=digits)
    for seed in range(20):
        obs, info = env.reset(seed=seed)
        a, shown, b = operands(obs)
        assert shown == op
        assert {len(str(a)), len(str(b))} == {digits}
        right = compute(a, b)
        assert info["privileged"]["answer"] == str(right)
        for answer, reward in ((right, 1.0), (right + 1, 0.0), (right - 1, 0.0)):
            env.reset(seed=seed)
            _, got, terminated, truncated, info = env.step(f"I think {answer}.")
            assert (got, terminated, truncated, info["success"]) == (reward, True, False, reward == 1.0)
            assert ("feedback" in info) == (reward == 0.0)


def test_feedback_says_what_was_wrong_and_not_the_answer():
    env = ArithmeticEnv()
    obs, info = env.reset(seed=1)
    a, _, b = operands(obs)
    texts = []
    for action in ("1", "999", "dunno"):
        env.reset(seed=1)
        texts.append(env.step(action)[4]["feedback"])
    assert texts == [
        f"1 is too low for {a} + {b}.",
        f"999 is too high for {a} + {b}.",
        f"There is no number in the answer to {a} + {b}.",
    ]
    assert all(info["privileged"]["answer"] not in text for text in texts)


@pytest.mark.parametrize(
    ("text", "reward"), [("85", 1.0), (" 85.\n", 1.0), ("It is 85", 0.0), ("85 or so", 0.0), ("", 0.0), ("84", 0.0)]
)
def test_strict_takes_nothing_but_a_number(text, reward):
    env = ArithmeticEnv(strict=True)
    env.reset(seed=0)
    env.result = 85
    assert env.step(text)[1] == reward


@pytest.mark.parametrize(
    ("sum_", "text"),
    [
        ((47, "+", 38), "47 + 38 = 47 + 30 + 8 = 77 + 8 = 85. The answer is 85."),
        ((47, "-", 98), "47 - 98 = 47 - 90 - 8 = -43 - 8 = -51. The answer is -51."),
        ((47, "*", 38), "47 * 38 = 47 * 30 + 47 * 8 = 1410 + 376 = 1786. The answer is 1786."),
        ((40, "+", 30), "40 + 30 = 70. The answer is 70."),
        ((7, "*", 5), "7 * 5 = 35. The answer is 35."),
    ],
)
def test_the_solution_is_worked_out(sum_, text):
    assert solution(*sum_) == text


@pytest.mark.parametrize("op", ["+", "-", "*"])
@pytest.mark.parametrize("b", [3, 30, 33, 103, 999])
def test_every_step_of_a_solution_has_the_same_value(op, b):
    steps, answer = solution(57, op, b).split(". The answer is ")
    assert {eval(step) for step in steps.split(" = ")} == {int(answer.rstrip("."))}


def test_no_sum_is_in_two_splits_even_with_its_operands_swapped():
    env = ArithmeticEnv(operators="+*", digits=1)
    sums = {}
    for split in ("train", "eval", "warm"):
        drawn = set()
        for seed in range(600):
            a, op, b = operands(env.reset(seed=seed, options={"split": split, "index": seed})[0])
            drawn.add((op, *sorted((a, b))))
        sums[split] = drawn
    assert all(len(drawn) > 9 for drawn in sums.values())
    assert sum(map(len, sums.values())) == len(set.union(*sums.values())) == 90  # all sums of one digit


def test_without_options_the_tasks_are_those_of_train():
    env = ArithmeticEnv()
    assert all(env.reset(seed=s)[0] == env.reset(seed=s, options={"split": "train"})[0] for s in range(20))


def test_the_prompt_is_the_callers():
    env = ArithmeticEnv(prompt="{a} plus {b}?", system="Few words.")
    obs, info = env.reset(seed=0)
    assert re.fullmatch(r"\d\d plus \d\d\?", obs)
    assert [message["role"] for message in info["messages"]] == ["system", "user"]


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"operators": "+/"}, r"operators = '\+/' must be one or more of: \+ - \*"),
        ({"operators": ""}, "operators = '' must be one or more"),
        ({"digits": 0}, "digits = 0 must be at least 1"),
        ({"prompt": "What is {a}?"}, r"prompt = .* lacks \{b\}"),
        ({"prompt": "{a} + {b}", "operators": "+-"}, r"prompt = .* lacks \{op\}"),
    ],
)
def test_impossible_settings_are_refused(kwargs, reason):
    with pytest.raises(ConfigError, match=reason):
        ArithmeticEnv(**kwargs)


def test_a_number_of_a_million_digits_is_wrong_and_told_in_short():
    env = ArithmeticEnv()
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step("9" * 1_000_000)
    assert (reward, terminated) == (0.0, True)
    assert len(info["feedback"]) < 200
