"""Reward functions by name, their weighted sum, and TRL's own functions used as they are."""

import asyncio
import logging
import math
import sys
import threading
import time

import numpy as np
import pytest
import torch

from opd.errors import ConfigError, EnvError
from opd.rewards import (
    BUILT_IN,
    CodeTests,
    Length,
    Matches,
    MathVerify,
    Part,
    Rubric,
    SoftOverlong,
    Tags,
    TrainerState,
    exact_match,
    resolve,
)


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def abstain(completions, **kwargs):
    return [None for _ in completions]


def needs_ids(completions, completion_ids):
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
    ],
)
def test_what_cannot_be_a_reward_is_refused(spec, reason):
    with pytest.raises(ConfigError, match=reason):
        resolve(spec)


def test_built_ins_are_known_by_their_own_names():
    assert {name: function.__name__ for name, function in BUILT_IN.items() if not isinstance(function, type)} == {
        name: name for name in ("exact_match", "normalized_match", "contains_answer", "number_match", "f1")
    }
    made = [Matches("a"), Tags("a"), Length(), SoftOverlong(2, 1), MathVerify(), CodeTests()]
    assert {function.__name__: type(function) for function in made} == {
        name: maker for name, maker in BUILT_IN.items() if isinstance(maker, type)
    }


def test_a_list_weighs_each_function_once():
    score = Rubric(["exact_match", length]).score("q", "abc", {"answer": "abc"})
    assert score.total == 4.0
    assert score.parts == {"exact_match": 1.0, "length": 3.0}


@pytest.mark.parametrize("one", ["exact_match", exact_match])
def test_one_reward_needs_no_list(one):
    assert Rubric(one).score("q", "abc", {"answer": "abc"}).parts == {"exact_match": 1.0}


def test_a_weight_that_is_no_number_is_refused():
    for weight in ("high", None, True, math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"the weight {weight!r} of exact_match must be a finite number"):
            Rubric({"exact_match": weight})


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


def test_a_completion_that_nobody_scores_is_unscored():
    score = Rubric([abstain]).score("q", "abc", {})
    assert (score.total, score.parts, score.unscored) == (0.0, {"abstain": None}, True)
    assert not Rubric([length, abstain]).score("q", "abc", {}).unscored


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_an_error(value):
    def broken(completions, **kwargs):
        return [value]

    with pytest.raises(EnvError, match=f"reward broken returned {value}; a reward must be finite"):
        Rubric([broken]).score("q", "abc", {})


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ([], "returned 0 numbers for 1 completions"),
        ([1.0, 2.0], "returned 2 numbers for 1 completions"),
        (1.0, "returned 1.0; it must return a list of numbers or None"),
        (["high"], r"returned \['high'\]; it must return a list"),
        (None, "returned None; it must return a list"),
    ],
)
def test_a_reward_of_the_wrong_form_is_an_error(output, reason):
    def broken(completions, **kwargs):
        return output

    with pytest.raises(EnvError, match=f"reward broken {reason}"):
        Rubric([broken]).score("q", "abc", {})


def test_arrays_and_tensors_are_lists_of_numbers():
    def array(completions):
        return np.array([0.5], dtype=np.float32)

    def tensor(completions):
        return torch.tensor([2])

    assert Rubric([array, tensor]).score("q", "a", {}).parts == {"array": 0.5, "tensor": 2.0}


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
    for name in ("trainer_state", "log_extra", "log_metric"):
        seen.pop(name)
    assert seen == {"prompts": ["q"], "completions": ["abc"], "answer": [7]}


def test_a_missing_column_is_named_before_anything_runs():
    with pytest.raises(ConfigError, match=r"reward exact_match needs the column 'answer'\. There are: answers, x"):
        Rubric(["exact_match"]).require(["answers", "x"])
    Rubric(["exact_match"]).require(["answer"])


def test_an_argument_with_a_default_needs_no_column():
    def logging_reward(completions, *, log_extra=None, **kwargs):
        return [1.0]

    Rubric(logging_reward).require([])


def test_a_function_that_needs_token_ids_sees_the_group_and_scores_nothing_by_itself():
    rubric = Rubric([needs_ids, length])
    rubric.require(["answer"])
    assert rubric.compares
    assert rubric.score_batch(["q"], ["abc"], {"completion_ids": [[1, 2]]}, when="group")[0].parts == {"needs_ids": 0.0}
    assert rubric.score("q", "abc", {}, when="episode").parts == {"length": 3.0}
    with pytest.raises(EnvError, match="reward needs_ids takes completion_ids, which only a trainer has"):
        rubric.score("q", "abc", {})


def compares(completions, **kwargs):
    return [float(len(completion) == max(map(len, completions))) for completion in completions]


@pytest.mark.parametrize("isolated", [False, True])
def test_a_part_that_compares_is_called_once_with_all_completions(isolated):
    rubric = Rubric({"best": {"reward": compares, "group": True, "isolated": isolated}, "exact_match": 1.0})
    columns = {"answer": ["a", "x", "x"]}
    scores = rubric.score_batch(["q"] * 3, ["a", "bb", "c"], columns, when="group")
    assert [score.parts for score in scores] == [{"best": 0.0}, {"best": 1.0}, {"best": 0.0}]
    assert rubric.score("q", "a", {"answer": "a"}, when="episode").parts == {"exact_match": 1.0}


def hangs_once(completions, **kwargs):
    time.sleep(60 if "bad" in completions else 0)
    return [0.0] * len(completions)


def test_an_isolated_comparison_that_hangs_scores_nobody():
    part = {"reward": hangs_once, "group": True, "isolated": True, "time_limit": 1}
    with pytest.raises(EnvError, match=r"reward best could not compare 2: no answer within 1 s \(time_limit\)"):
        Rubric({"best": part}).score_batch(["q"] * 2, ["good", "bad"], {}, when="group")


@pytest.mark.parametrize(("name", "value"), [("group", "yes"), ("isolated", 1)])
def test_a_switch_of_a_part_is_true_or_false(name, value):
    with pytest.raises(ConfigError, match=f"reward exact_match: {name} = {value!r} must be true or false"):
        Rubric({"exact_match": {name: value}})


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
    for name in (
        "exact_match",
        "normalized_match",
        "f1",
        "contains_answer",
        "number_match",
        "math_verify",
        "code_tests",
    ):
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


# -- batches, time, and functions that answer later -------------------------------------------------------


def test_a_batch_is_scored_by_one_call_and_row_by_row():
    sizes = []

    def counting(prompts, completions, answer, **kwargs):
        sizes.append((len(prompts), len(completions), len(answer)))
        return [
            None if prompt == "c" else float(len(completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    rubric = Rubric({counting: 1.0, "exact_match": 10.0})
    scores = rubric.score_batch(["a", "b", "c"], ["x", "yy", "z"], {"answer": ["x", "y", "z"]})
    assert sizes == [(3, 3, 3)]
    assert [score.total for score in scores] == [11.0, 2.0, 10.0]
    assert [score.parts["counting"] for score in scores] == [1.0, 2.0, None]


def test_async_functions_work_as_they_are_and_wait_at_the_same_time():
    both = {"there": 0, "most": 0}

    async def meet(completions, **kwargs):
        both["there"] += 1
        for _ in range(200):
            both["most"] = max(both["most"], both["there"])
            await asyncio.sleep(0.005)
            if both["most"] == 2:
                return [1.0]
        return [0.0]

    class Judge:
        async def __call__(self, completions, answer):
            return [(await meet(completions))[0] + answer[0]]

    rubric = Rubric({meet: 1.0, Judge(): 10.0})
    rubric.require(["answer"])
    assert rubric.score("q", "a", {"answer": 2}).parts == {"meet": 1.0, "Judge": 3.0}
    rubric.close()


@pytest.mark.parametrize("blocks", [False, True])
def test_an_async_function_that_hangs_is_an_error_in_time(blocks):
    async def hang(completions):
        if blocks:
            time.sleep(6)
        await asyncio.sleep(600)

    rubric = Rubric(hang, time_limit=0.2)
    since = time.monotonic()
    with pytest.raises(EnvError, match=r"reward hang raised TimeoutError: no answer within 0.2 s") as caught:
        rubric.score("q", "a", {})
    assert time.monotonic() - since < 5
    assert isinstance(caught.value.__cause__, TimeoutError)  # how the scheduler tells it from a bug


def test_a_plain_function_that_hangs_is_an_error_in_time():
    release = threading.Event()

    def hang(completions):
        release.wait(60)
        return [1.0]

    with pytest.raises(EnvError, match=r"reward hang raised TimeoutError: no answer within 0.2 s"):
        Rubric(hang, time_limit=0.2).score("q", "a", {})
    release.set()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_async_reward_that_is_not_finite_is_an_error_too(value):
    async def broken(completions):
        return [value]

    with pytest.raises(EnvError, match=f"reward broken returned {value}; a reward must be finite"):
        Rubric(broken).score("q", "a", {})


def test_a_function_that_leaves_the_interpreter_is_an_error():
    def leave(completions):
        sys.exit(3)

    async def leave_later(completions):
        sys.exit(4)

    for function in (leave, leave_later):
        with pytest.raises(EnvError, match=f"reward {function.__name__} raised SystemExit: [34]"):
            Rubric(function).score("q", "a", {})


# -- parts with settings ------------------------------------------------------------------------------------


def test_a_part_has_a_name_a_weight_and_settings_of_its_own():
    rubric = Rubric(
        {
            "brief": {"reward": "length", "weight": 0.5, "settings": {"maximum": 3}},
            "long": Part(reward=Length(minimum=4), weight=0.25),
            "tags": {"settings": {"tags": ["a"]}},
        }
    )
    assert rubric.score("q", "<a></a>", {}).parts == {"brief": 0.0, "long": 1.0, "tags": 1.0}
    assert rubric.score("q", "abc", {}).total == 0.5


@pytest.mark.parametrize(
    ("rewards", "reason"),
    [
        ("length", None),
        ("matches", "reward matches: missing a required argument: 'pattern'. Its settings: pattern"),
        (
            {"length": {"settings": {"max": 3}}},
            "reward length: got an unexpected keyword argument 'max'. Its settings: ",
        ),
        ({"length": {"setings": {}}}, r"reward length has no 'setings'. Allowed: .*Did you mean \"settings\"\?"),
        ({"exact_match": {"settings": {"answer": [], "completions": []}}}, "reward exact_match takes no settings"),
        ({"soft_overlong": {"settings": {"maximum": 10, "cache": 11}}}, "cache = 11 must be more than 0 and at most"),
    ],
)
def test_settings_that_do_not_fit_are_told_before_anything_runs(rewards, reason):
    if reason is None:
        Rubric(rewards)
        return
    with pytest.raises(ConfigError, match=reason):
        Rubric(rewards)


def test_a_time_limit_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="time_limit = 0 of the rewards must be more than 0"):
        Rubric("exact_match", time_limit=0)


@pytest.mark.parametrize("name", ["", "a\nb", "a" * 101])
def test_a_name_that_cannot_be_that_of_a_metric_is_refused(name):
    with pytest.raises(ConfigError, match="must be 1 to 100 printable characters"):
        Rubric({name: Part(reward="exact_match")})


# -- TRL's own --------------------------------------------------------------------------------------------------


def test_trls_accuracy_and_reasoning_rewards_work_as_they_are():
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its signals do not work in threads
    rubric = Rubric(["trl.rewards:accuracy_reward", "trl.rewards:reasoning_accuracy_reward"])
    rubric.require(["solution"])
    prompt = [{"role": "user", "content": "1/2?"}]
    completion = [{"role": "assistant", "content": r"<think>hm</think> \boxed{\frac{2}{4}}"}]
    assert rubric.score(prompt, completion, {"solution": "$0.5$"}).parts == {
        "trl.rewards:accuracy_reward": 1.0,
        "trl.rewards:reasoning_accuracy_reward": 1.0,
    }


def test_a_reward_of_trl_that_is_made_from_settings_is_made_and_gets_token_ids():
    part = {
        "reward": "trl.rewards:get_soft_overlong_punishment",
        "settings": {"max_completion_len": 10, "soft_punish_cache": 5},
    }
    rubric = Rubric({"overlong": part})
    rubric.require(["answer"])
    ids = {"completion_ids": [list(range(3)), list(range(8)), list(range(20))]}
    scores = rubric.score_batch(["q"] * 3, ["a"] * 3, ids, when="group")
    assert [score.total for score in scores] == pytest.approx([0.0, -0.6, -1.0])


def test_what_trls_trainer_passes_besides_is_given_and_what_is_logged_is_kept():
    def demanding(completions, trainer_state, log_extra, log_metric=None, **kwargs):
        log_extra("column", [text.upper() for text in completions])
        log_metric("metric", 1.0)
        log_metric("metric", 2.0)
        return [trainer_state.global_step / trainer_state.max_steps for _ in completions]

    rubric = Rubric(demanding)
    rubric.require([])
    state = TrainerState.at(30, 40)
    [one, two] = rubric.score_batch(["q", "q"], ["a", "b"], {}, state=state)
    assert (one.total, one.metrics, one.notes, two.notes) == (0.75, {"metric": 1.5}, {"column": "A"}, {"column": "B"})


@pytest.mark.parametrize(
    ("log", "reason"),
    [(("log_extra", "x", [1, 2]), "got 2 values for 1 completions"), (("log_metric", "x", math.nan), "not finite")],
)
def test_what_cannot_be_logged_is_refused_by_name(log, reason):
    name, *arguments = log

    def logging_reward(completions, **kwargs):
        kwargs[name](*arguments)
        return [1.0]

    with pytest.raises(EnvError, match=rf"{name}\('x'\) .*{reason}"):
        Rubric(logging_reward).score("q", "a", {})
