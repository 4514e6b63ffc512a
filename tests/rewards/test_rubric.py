"""Reward functions by name, their weighted sum, and TRL's own functions used as they are."""

import math

import pytest

from opd.errors import ConfigError, EnvError
from opd.rewards import BUILT_IN, Rubric, exact_match, resolve


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def abstain(completions, **kwargs):
    return [None for _ in completions]


def needs_ids(completions, completion_ids):
    return [0.0]


async def slow(completions, **kwargs):
    return [0.0]


def test_a_name_a_path_and_a_function_resolve():
    assert resolve("exact_match") is exact_match
    assert resolve("opd.rewards:exact_match") is exact_match
    assert resolve(length) is length


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("exact_mach", r'reward \'exact_mach\' is unknown. Built in: .*exact_match.*Did you mean "exact_match"\?'),
        ("nowhere.to:be_found", "'nowhere.to:be_found' cannot be imported: No module named 'nowhere'"),
        ("opd.rewards:nothing", "'opd.rewards:nothing' cannot be imported: .*no attribute 'nothing'"),
        ("opd.rewards:", "cannot be imported|not a function"),
        ("opd.rewards:BUILT_IN", "is dict, not a function"),
        (slow, "is an async function; pass a plain one"),
    ],
)
def test_what_cannot_be_a_reward_is_refused(spec, reason):
    with pytest.raises(ConfigError, match=reason):
        resolve(spec)


def test_built_ins_are_known_by_their_own_names():
    assert all(function.__name__ == name for name, function in BUILT_IN.items())


def test_a_list_weighs_each_function_once():
    score = Rubric(["exact_match", length]).score("q", "abc", {"answer": "abc"})
    assert score.total == 4.0
    assert score.parts == {"exact_match": 1.0, "length": 3.0}


@pytest.mark.parametrize("one", ["exact_match", exact_match])
def test_one_reward_needs_no_list(one):
    assert Rubric(one).score("q", "abc", {"answer": "abc"}).parts == {"exact_match": 1.0}


def test_a_weight_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="the weight 'high' must be a number"):
        Rubric({"exact_match": "high"})


def test_a_mapping_gives_the_weights_and_parts_stay_unweighted():
    score = Rubric({"exact_match": 2.0, length: -0.5}).score("q", "abc", {"answer": "abc"})
    assert score.total == 0.5
    assert score.parts == {"exact_match": 1.0, "length": 3.0}


def test_weights_add_up_exactly():
    def one(completions):
        return [1.0]

    def another(completions):
        return [1.0]

    def third(completions):
        return [1.0]

    assert 0.7 + 0.2 + 0.1 < 1.0
    assert Rubric({one: 0.7, another: 0.2, third: 0.1}).score("q", "a", {}).total == 1.0


def test_none_abstains():
    score = Rubric([length, abstain]).score("q", "abc", {})
    assert (score.total, score.parts) == (3.0, {"length": 3.0, "abstain": None})


def test_a_completion_that_nobody_scores_is_an_error():
    with pytest.raises(EnvError, match=r"every reward function abstained \(returned None\): abstain"):
        Rubric([abstain]).score("q", "abc", {})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_an_error(value):
    def broken(completions, **kwargs):
        return [value]

    with pytest.raises(EnvError, match=f"reward broken returned {value}; a reward must be finite"):
        Rubric([broken]).score("q", "abc", {})


@pytest.mark.parametrize("output", [[], [1.0, 2.0], 1.0, ["high"]])
def test_a_reward_of_the_wrong_form_is_an_error(output):
    def broken(completions, **kwargs):
        return output

    with pytest.raises(EnvError, match="reward broken raised"):
        Rubric([broken]).score("q", "abc", {})


def test_an_exception_is_told_with_the_form_of_the_completion():
    def conversational(completions, **kwargs):
        return [len(completion[0]["content"]) for completion in completions]

    with pytest.raises(EnvError, match=r"conversational raised TypeError: .*\(a completion was given as str\)"):
        Rubric([conversational]).score("q", "abc", {})


def test_a_function_gets_only_the_columns_it_names():
    def picky(completions, answer):
        return [float(completions == ["abc"] and answer == [7])]

    assert Rubric([picky]).score("q", "abc", {"answer": 7, "other": 1}).total == 1.0


def test_a_function_with_open_arguments_gets_all_columns_as_lists():
    seen = {}

    def curious(**kwargs):
        seen.update(kwargs)
        return [0.0]

    Rubric([curious]).score("q", "abc", {"answer": 7})
    assert seen == {"prompts": ["q"], "completions": ["abc"], "answer": [7]}


def test_a_missing_column_is_named_before_anything_runs():
    with pytest.raises(ConfigError, match=r"reward exact_match needs the column 'answer'\. There are: answers, x"):
        Rubric(["exact_match"]).require(["answers", "x"])
    Rubric(["exact_match"]).require(["answer"])


def test_an_argument_with_a_default_needs_no_column():
    def logging_reward(completions, *, log_extra=None, **kwargs):
        return [1.0]

    Rubric(logging_reward).require([])


def test_a_function_that_needs_token_ids_is_refused():
    with pytest.raises(ConfigError, match="reward needs_ids needs the column 'completion_ids'"):
        Rubric([needs_ids]).require(["answer"])


def test_no_rewards_and_two_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="rewards is empty"):
        Rubric([])
    with pytest.raises(ConfigError, match="two reward functions have the same name: exact_match, exact_match"):
        Rubric(["exact_match", exact_match])


def test_a_reward_of_trl_works_as_it_is():
    rubric = Rubric(["trl.rewards:think_format_reward"])
    rubric.require(["answer"])
    prompt = [{"role": "user", "content": "Why?"}]
    for text, reward in (("<think>\nhm\n</think>\nSo.", 1.0), ("hm. So.", 0.0)):
        assert rubric.score(prompt, [{"role": "assistant", "content": text}], {"answer": "x"}).total == reward


def test_a_function_gives_trl_and_us_the_same_numbers():
    # The call that trl's GRPOTrainer makes, for the built-in functions.
    prompts = [[{"role": "user", "content": "1+1"}]] * 2
    completions = [[{"role": "assistant", "content": text}] for text in ("2", "3")]
    columns = {"answer": "2", "tests": "assert open('solution.py').read() == '2'"}
    for name in BUILT_IN:
        in_trl = resolve(name)(
            prompts=prompts,
            completions=completions,
            completion_ids=[[5], [6]],
            **{column: [value] * 2 for column, value in columns.items()},
            trainer_state=None,
            log_extra=print,
            log_metric=print,
        )
        ours = [Rubric([name]).score(p, c, columns).total for p, c in zip(prompts, completions, strict=True)]
        assert in_trl == ours == [1.0, 0.0]
