"""The world of look-ups: its questions can be answered, its splits are apart, and its feedback gives nothing away."""

import json
import re

import numpy as np
import pytest

from opd.envs.worlds.lookup import ATTRIBUTES, FIELDS, MEANING, PEOPLE, RELATIONS, VALUES, LookupEnv, Question
from opd.errors import ConfigError


def started(seed, split="train", index=None, **options):
    env = LookupEnv(**options)
    _, info = env.reset(seed=seed, options={"split": split, "index": index})
    return env, info


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def play(env, actions):
    """Play these actions; return the last step."""
    for action in actions:
        step = env.step(action)
    return step


@pytest.mark.parametrize("split", ["train", "eval", "warm"])
def test_the_oracle_is_rewarded_at_its_last_action_and_not_before(split):
    for index in range(30):
        env, _ = started(index, split, index)
        *gets, answer = env.oracle()
        assert len(gets) == index % 3 + 1
        for action in gets:
            _, reward, terminated, truncated, info = env.step(action)
            assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)
        _, reward, terminated, truncated, info = env.step(answer)
        assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
        assert "feedback" not in info


def test_another_answer_gets_nothing():
    env, info = started(3)
    right = info["privileged"]["solution"].rpartition("answer: ")[2]
    other = next(value for values in VALUES.values() for value in values if value != right)
    _, reward, terminated, _, info = play(env, [*env.oracle()[:-1], call("answer", value=other)])
    assert (reward, terminated, info["success"]) == (0.0, True, False)
    assert info["feedback"] == "Wrong answer: it is not what the last look-up returned."


def test_a_question_reads_from_the_value_back_to_the_person():
    asked = Question("ann", ("manager", "coach", "hue"))
    assert str(asked) == "What is the hue of the coach of the manager of ann?"


def test_the_plan_and_the_solution_name_the_fields_that_the_words_of_the_question_mean():
    for seed in range(30):
        env, info = started(seed)
        question = info["messages"][-1]["content"]
        words = re.findall(r"the (\w+) of", question)[::-1]
        fields = [MEANING[word] for word in words]
        assert info["privileged"]["plan"] == ", ".join(fields)
        *steps, answer = info["privileged"]["solution"].split("\n")
        assert [step.split(" of ")[0] for step in steps] == fields
        person = question.rstrip("?").split()[-1]
        for step, field in zip(steps, fields, strict=True):
            found = env.step(call("get", person=person, field=field))[0]
            assert step == f"{field} of {person}: {found}"
            person = found
        assert answer == f"answer: {person}"


def test_no_question_is_in_two_splits():
    asked = {
        split: {started(seed, split, seed)[1]["messages"][-1]["content"] for seed in range(200)}
        for split in ("train", "eval", "warm")
    }
    assert all(len(questions) > 100 for questions in asked.values())
    assert not asked["train"] & asked["eval"]
    assert not asked["train"] & asked["warm"]
    assert not asked["eval"] & asked["warm"]


def test_lengths_are_mixed_evenly_with_an_index_and_nearly_so_without():
    with_index = [len(started(seed, "eval", seed)[0].plan) for seed in range(30)]
    assert [with_index.count(hops) for hops in (1, 2, 3)] == [10, 10, 10]
    without = [len(started(seed, "eval")[0].plan) for seed in range(300)]
    assert all(70 < without.count(hops) < 130 for hops in (1, 2, 3))


def test_hops_are_what_was_asked_for():
    assert {len(started(seed, hops=(4,))[0].plan) for seed in range(5)} == {4}
    env, _ = started(0, hops=(4,))
    assert play(env, env.oracle())[1] == 1.0


@pytest.mark.parametrize("hops", [(), (0, 1)])
def test_questions_without_a_look_up_are_refused(hops):
    with pytest.raises(ConfigError, match="at least one number of look-ups"):
        LookupEnv(hops=hops)


def test_an_episode_is_truncated_two_turns_after_the_longest_question_could_be_answered():
    env, _ = started(0, index=2)
    look = env.oracle()[0]
    assert [env.step(look)[3] for _ in range(5)] == [False] * 4 + [True]


def test_the_same_seed_gives_the_same_table_and_another_seed_another():
    def table(seed):
        env, _ = started(seed)
        return [[env.get(person, field) for field in FIELDS] for person in PEOPLE]

    assert table(7) == table(7)
    assert table(7) != table(8)


def test_the_table_holds_people_and_values_where_they_belong():
    env, _ = started(11)
    for person in PEOPLE:
        assert all(env.get(person, field) in set(PEOPLE) - {person} for field in RELATIONS)
        assert all(env.get(person, field) in VALUES[field] for field in ATTRIBUTES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"person": "nobody", "field": "boss"}, "Error: there is nobody called 'nobody'"),
        ({"person": "ann", "field": "manager"}, "Error: there is no field 'manager'; the fields are boss, coach,"),
        ({"person": "ann"}, "Error: wrong arguments for get: field"),
    ],
)
def test_a_look_up_that_cannot_be_answered_says_why_and_the_episode_goes_on(arguments, message):
    env, _ = started(5)
    _, reward, terminated, _, info = env.step(call("get", **arguments))
    assert (reward, terminated) == (0.0, False)
    assert info["messages"][0]["content"].startswith(message)
    assert play(env, env.oracle())[1] == 1.0


def test_the_tools_know_a_field_by_its_own_name_alone():
    env, _ = started(5)
    for word in MEANING:
        failed = "no field" in env.step(call("get", person="ann", field=word))[0]
        assert failed == (word not in FIELDS)
        env.reset(seed=5)


def test_feedback_names_each_word_that_was_taken_for_another_field():
    env, _ = started(0)
    env.question = Question("ann", ("manager", "coach", "hue"))
    env.plan = ("boss", "coach", "color")
    feedback = play(env, env.oracle(("boss", "rival", "car")))[4]["feedback"]
    assert feedback == "Wrong answer: coach means coach, not rival; hue means color, not car."


def test_feedback_names_the_look_ups_that_were_left_out():
    env, _ = started(0)
    env.question = Question("ann", ("manager", "hue"))
    env.plan = ("boss", "color")
    feedback = play(env, [env.oracle()[0], call("answer", value="cairo")])[4]["feedback"]
    assert feedback == "Wrong answer: hue means color, which was not looked up."


def test_feedback_never_holds_the_answer_nor_a_person_on_the_way_to_it():
    rng = np.random.default_rng(0)
    for seed in range(100):
        env, info = started(seed)
        plan = [str(rng.choice(list(RELATIONS))) for _ in env.plan[:-1]] + [str(rng.choice(list(ATTRIBUTES)))]
        *_, last = play(env, env.oracle(plan))
        found = {line.rpartition(": ")[2] for line in info["privileged"]["solution"].split("\n")}
        assert not found & set(re.findall(r"\w+", last.get("feedback", "")))


def test_every_word_means_one_field_and_the_fields_of_a_tool_are_those_of_the_table():
    words = [word for alternatives in FIELDS.values() for word in alternatives]
    assert len(words) == len(set(words)) == len(MEANING) == 36
    get = next(tool["function"] for tool in LookupEnv().tool_schemas() if tool["function"]["name"] == "get")
    listed = re.findall(r"\w+", get["parameters"]["properties"]["field"]["description"].replace(" or ", ", "))
    assert listed == list(FIELDS)


def test_no_name_word_or_value_stands_for_two_things():
    everything = [*PEOPLE, *MEANING, *(value for values in VALUES.values() for value in values)]
    assert len(everything) == len(set(everything))
