"""Countdown: the solver, the reading of expressions, and both forms of the game."""

import itertools
import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.envs.text_env import task_split
from opd.envs.worlds.countdown import CountdownEnv, CountdownExpressionEnv
from opd.envs.worlds.countdown_solver import (
    MOST_VALUE,
    OPERATORS,
    Combination,
    apply,
    combine,
    evaluate,
    expression,
    solve,
    steps,
)
from opd.errors import ConfigError, DataError, EnvError

ENVS = [CountdownEnv, CountdownExpressionEnv]
small = st.lists(st.integers(1, 12), min_size=2, max_size=4).map(lambda numbers: tuple(sorted(numbers)))


def combining(a, op, b):
    return f"<tool_call>{json.dumps({'name': 'combine', 'arguments': {'a': a, 'op': op, 'b': b}})}</tool_call>"


def at(numbers, target, cls=CountdownEnv, **options):
    """Make an environment in which this task has just begun."""
    env = cls(**options)
    env.reset(seed=0)
    if cls is CountdownEnv:
        env.left = tuple(sorted(numbers))
    else:
        env.numbers = tuple(sorted(numbers))
    env.target = target
    return env


def reachable(numbers):
    """Return every value that uses all the numbers, by trying every order, and fractions refused."""
    if len(numbers) == 1:
        return set(numbers)
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [numbers[k] for k in range(len(numbers)) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        for value in (a + b, a - b, a * b, Fraction(a, b)):
            if value >= 1 and value == int(value):
                found |= reachable([*rest, int(value)])
    return found


@settings(max_examples=settings.default.max_examples * 3 // 5)
@given(numbers=small, target=st.integers(1, 60))
def test_the_solver_finds_a_solution_exactly_where_there_is_one(numbers, target):
    found = solve(numbers, target)
    assert (found is not None) == (target in reachable(list(numbers)))
    left = numbers
    for step in found or ():
        left = apply(left, step)
    assert found is None or left == (target,)


@settings(max_examples=settings.default.max_examples * 3 // 5)
@given(numbers=small, target=st.integers(1, 60))
def test_a_solution_as_an_expression_has_the_value_and_the_numbers(numbers, target):
    found = solve(numbers, target)
    if found:
        value, used = evaluate(expression(found))
        assert (value, tuple(sorted(used))) == (target, numbers)


def test_no_step_is_offered_twice_or_against_the_rules():
    assert [(*step,) for step in steps((2, 2, 6))] == [
        (2, "+", 2), (2, "*", 2), (2, "/", 2), (6, "+", 2), (6, "-", 2), (6, "*", 2), (6, "/", 2),
    ]  # fmt: skip
    assert {step.op for step in steps((2, 3), "+-")} == {"+", "-"}


def test_more_numbers_than_can_be_searched_are_refused():
    with pytest.raises(DataError, match="6 numbers are too many to search; at most 5"):
        solve((1, 2, 3, 4, 5, 6), 100)


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [("1 + 2 * 3", 7, [1, 2, 3]), ("(1+2)*3", 9, [1, 2, 3]), ("8 ÷ 4 × 3", 6, [8, 4, 3]), ("((5))", 5, [5])],
)
def test_an_expression_is_worth_what_it_says(text, value, numbers):
    assert evaluate(text) == (value, numbers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not an expression"),
        ("2 +", "is not an expression"),
        ("__import__('os').system('true')", "is not an expression"),
        ("2 + x", "is not an expression"),
        ("1.5 + 2", "is not an expression"),
        ("1 if 1 is 1 else 2", "is not an expression"),
        ("007", "is not an expression"),
        ("٣ + 2", "is not an expression"),
        ("1 +\n2", "is not an expression"),
        ("2 ** 9", "nothing else"),
        ("9 // 2", "nothing else"),
        ("-3 + 9", "nothing else"),
        ("1(2)", "nothing else"),
        ("9999999 + 1", "nothing else"),
        ("7 / 2", "7 / 2 is not a whole number"),
        ("7 / 0", "nothing else"),
        ("0", "whole numbers from 1 to 1,000,000"),
        ("3 - 3", "3 - 3 is not above zero"),
        ("1000000 * 2", "is above 1,000,000"),
        ("(" * 200 + "1" + ")" * 199, "is not an expression"),
        ("1" * 401, "the expression has 401 characters; at most 400 are read"),
    ],
)
def test_whatever_else_stands_in_an_expression_is_refused_and_never_run(text, message):
    with pytest.raises(DataError, match=message):
        evaluate(text)


def test_the_longest_expressions_are_read_without_trouble():
    assert evaluate("+".join(["1"] * 200))[0] == 200
    assert evaluate("(" * 90 + "1" + ")" * 90) == (1, [1])


@settings(max_examples=settings.default.max_examples * 3 // 5)
@given(st.text(max_size=60))
def test_no_text_makes_the_evaluation_raise_anything_else(text):
    try:
        value, _ = evaluate(text)
    except DataError:
        return
    assert 1 <= value <= MOST_VALUE


@settings(max_examples=settings.default.max_examples * 3 // 5)
@given(st.text(alphabet="0123456789+-*/() ", max_size=12))
def test_a_value_is_the_one_that_python_gives(text):
    try:
        value, numbers = evaluate(text)
    except DataError:
        return
    names = iter(numbers)
    exact = "".join(f"F({next(names)})" if word.isdigit() else word for word in _words(text))
    assert value == eval(exact, {"F": Fraction})


def _words(text):
    return ["".join(group) for _, group in itertools.groupby(text, lambda c: c.isdigit() or c)]


@pytest.mark.parametrize("numbers", [2, 3, 4, 5])
@pytest.mark.parametrize("split", ["train", "eval", "warm"])
def test_the_oracle_is_rewarded_at_its_last_action_and_not_before(numbers, split):
    env = CountdownEnv(numbers=numbers)
    for index in range(8):
        env.reset(seed=index, options={"split": split, "index": index})
        *first, last = env.oracle()
        assert len(first) == numbers - 2
        for action in first:
            _, reward, terminated, truncated, info = env.step(action)
            assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)
        _, reward, terminated, truncated, info = env.step(last)
        assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
        assert "feedback" not in info


def test_the_privileged_texts_are_steps_operations_and_an_expression():
    for seed in range(20):
        env = CountdownEnv()
        _, info = env.reset(seed=seed)
        lines = info["privileged"]["solution"].split("\n")
        verbs = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
        assert [verbs[word] for word in info["privileged"]["plan"].split(", then ")] == [s.split()[1] for s in lines]
        for line in lines:
            a, op, b, _, result = line.split()
            text, reward, *_ = env.step(combining(a, op, b))
            assert text.startswith(f"{a} {op} {b} = {result}")
        assert reward == 1.0
        one = CountdownExpressionEnv()
        _, info = one.reset(seed=seed)
        assert one.step(info["privileged"]["answer"])[1] == 1.0
        assert info["privileged"]["solution"].endswith("answer: " + info["privileged"]["answer"])


def test_a_combination_replaces_two_numbers_by_their_result():
    env = at((3, 4, 5), 17)
    assert env.step(combining(3, "*", "4"))[0] == "3 * 4 = 12. Left: 5, 12"
    text, reward, terminated, _, info = env.step(combining(12, "+", 5))
    assert (text, reward, terminated, info["success"]) == ("12 + 5 = 17", 1.0, True, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, "^", 4), "there is no operator '^'; the operators are + - * /"),
        ((3, "+", 9), "9 is not among the numbers that are left: 3, 4, 5"),
        ((3, "+", 3), "3 is not among the numbers that are left"),
        ((3, "-", 4), "3 - 4 is not above zero"),
        ((5, "/", 3), "5 / 3 is not a whole number"),
        ((5, "/", 0), "0 is not among"),
        ((1.5, "+", 3), "wrong arguments for combine: a:"),
    ],
)
def test_a_combination_against_the_rules_is_answered_and_changes_nothing(arguments, message):
    env = at((3, 4, 5), 17)
    text, reward, terminated, _, info = env.step(combining(*arguments))
    assert message in text
    assert (reward, terminated, info["feedback"], env.left) == (0.0, False, text, (3, 4, 5))


def test_feedback_names_the_step_after_which_the_target_was_out_of_reach():
    env = at((3, 4, 5), 17)
    env.step(combining(4, "+", 3))
    _, reward, terminated, _, info = env.step(combining(5, "+", 7))
    assert (reward, terminated, info["success"]) == (0.0, True, False)
    assert info["feedback"] == "12 is not 17: after 4 + 3 = 7 it was out of reach."
    with pytest.raises(EnvError, match="17 cannot be reached with 12"):
        env.oracle()


@pytest.mark.parametrize(
    "action",
    [
        "3 * 4 + 5",
        "First 3 * 4.\nThen add:\n5 + (4 * 3) = 17",
        "<answer>3 * 4 + 5</answer>",
        "<answer>9</answer> no: <answer>\n3*4+5 = 17\n</answer> indeed",
    ],
)
def test_the_last_line_or_the_last_tag_is_the_answer(action):
    env = at((3, 4, 5), 17, CountdownExpressionEnv)
    assert env.step(action)[1:3] == (1.0, True)


@pytest.mark.parametrize(
    ("action", "feedback"),
    [
        ("3 * 4 + 4", "Wrong: every one of 3, 4, 5 must be used exactly once."),
        ("3 * 4", "Wrong: every one of 3, 4, 5 must be used exactly once."),
        ("17", "Wrong: every one of 3, 4, 5 must be used exactly once."),
        ("3 + 4 + 5", "Wrong: 3 + 4 + 5 is 12, not 17."),
        ("3 - 4 + 5", "Wrong: 3 - 4 is not above zero."),
        ("I give up", "Wrong: 'I give up' is not an expression of whole numbers, + - * / and brackets."),
        ("3 * 4 + 5 = 17 = 17", "Wrong: '3 * 4 + 5 = 17' is not an expression of whole numbers, + - * / and brackets."),
    ],
)
def test_a_wrong_expression_gets_nothing_and_is_told_why(action, feedback):
    env = at((3, 4, 5), 17, CountdownExpressionEnv)
    _, reward, terminated, _, info = env.step(action)
    assert (reward, terminated, info["success"], info["feedback"]) == (0.0, True, False, feedback)


@pytest.mark.parametrize("cls", ENVS)
def test_no_numbers_with_their_target_are_in_two_splits(cls):
    seen = {}
    for split in ("train", "eval", "warm"):
        env = cls()
        for seed in range(150):
            _, info = env.reset(seed=seed, options={"split": split, "index": seed})
            numbers = env.left if cls is CountdownEnv else env.numbers
            assert task_split(numbers, env.target) == split
            assert env.target not in numbers
            seen.setdefault(split, set()).add(info["messages"][-1]["content"])
    assert all(len(asked) > 100 for asked in seen.values())


@pytest.mark.parametrize("cls", ENVS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"numbers": 6}, "numbers = 6 must be from 2 to 5"),
        ({"highest": 1}, "highest = 1 must be from 2 to 1000"),
        ({"target": (9, 2)}, r"target = \[9, 2\] must be two numbers, 1 or more, in order"),
        ({"operators": "+^"}, r"operators = '\+\^' must be one or more of: \+ - \* /"),
    ],
)
def test_settings_that_make_no_game_are_refused(cls, options, message):
    with pytest.raises(ConfigError, match=message):
        cls(**options)


def test_a_target_that_nothing_reaches_is_reported_with_the_settings():
    env = CountdownEnv(numbers=2, highest=2, target=(40, 50))
    with pytest.raises(EnvError, match=r"no Countdown task .* numbers = 2, highest = 2, target = \[40, 50\]"):
        env.reset(seed=0)


def test_settings_decide_what_is_drawn():
    env = CountdownEnv(numbers=4, highest=6, target=(10, 12), operators="+-")
    for seed in range(20):
        _, info = env.reset(seed=seed)
        assert len(env.left) == 4
        assert max(env.left) <= 6
        assert 10 <= env.target <= 12
        assert set(info["privileged"]["plan"].split(", then ")) <= {"add", "subtract"}
    assert "there is no operator '*'; the operators are + -" in env.step(combining(env.left[0], "*", env.left[1]))[0]


@pytest.mark.parametrize("op", OPERATORS)
def test_a_combination_shows_its_result(op):
    assert str(Combination(6, op, 2)) == f"6 {op} 2 = {combine(6, op, 2)}"
