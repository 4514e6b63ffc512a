"""The file agent: its tasks can be solved by their own commands, and only what was asked for is rewarded."""

import json

import numpy as np
import pytest

from opd.envs import make
from opd.envs.worlds.file_tasks import LEVELS, draw_tree
from opd.envs.worlds.files import FilesEnv
from opd.errors import ConfigError

EVERY_TASK = [(level, number) for level, tasks in LEVELS.items() for number in range(len(tasks))]


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def started(seed, split="train", index=None, **options):
    env = FilesEnv(**options)
    _, info = env.reset(seed=seed, options={"split": split, "index": index})
    return env, info


def given(task):
    """Make an environment that has this very task."""
    env, _ = started(0)
    env.task = task
    env.session = env.sandbox.session(task.given)
    return env


def task_of(level, number, seed):
    rng = np.random.default_rng(seed)
    return LEVELS[level][number](rng, draw_tree(rng))


def play(env, actions):
    """Play these actions; return the last step."""
    for action in actions:
        step = env.step(action)
    return step


@pytest.mark.parametrize(("level", "number"), EVERY_TASK)
def test_the_commands_of_the_solution_solve_the_task(level, number):
    for seed in range(4):
        env = given(task_of(level, number, seed))
        _, reward, terminated, _, info = play(env, env.oracle())
        assert (reward, terminated, info["success"]) == (1.0, True, True), (env.task.commands, info.get("feedback"))
        assert "feedback" not in info


@pytest.mark.parametrize(("level", "number"), EVERY_TASK)
def test_doing_nothing_solves_no_task(level, number):
    for seed in range(10):
        task = task_of(level, number, seed)
        if task.answer is None:
            assert play(given(task), [call("submit", answer="")])[1] == 0.0
        else:
            assert play(given(task), [call("submit", answer="x")])[1] == 0.0


@pytest.mark.parametrize("split", ["train", "eval", "warm"])
def test_the_oracle_of_a_drawn_task_is_rewarded(split):
    for index in range(6):
        env, _ = started(100 + index, split, index)
        assert play(env, env.oracle())[1] == 1.0


def test_a_question_is_judged_by_its_answer_however_it_is_quoted():
    task = task_of(1, 2, 0)  # a path
    for answer in (task.answer, f" ./{task.answer}\n", f"`{task.answer}`"):
        assert play(given(task), [call("submit", answer=answer)])[1] == 1.0
    step = play(given(task), [call("submit", answer="docs/other.md")])
    assert (step[1], step[4]["feedback"]) == (0.0, "The answer 'docs/other.md' is wrong.")


def test_files_beyond_those_asked_for_cost_the_reward_and_are_named():
    task = task_of(1, 3, 0)
    *commands, submit = given(task).oracle()
    step = play(given(task), [*commands, call("shell", command="touch extra.txt"), submit])
    assert step[1] == 0.0
    assert step[4]["feedback"] == "The files are not as they should be: 1 too many, such as 'extra.txt'."


def test_a_file_that_was_not_to_be_changed_costs_the_reward():
    task = task_of(1, 3, 0)
    *commands, submit = given(task).oracle()
    path = sorted(task.result)[0]
    step = play(given(task), [*commands, call("shell", command=f"echo more >> {path}"), submit])
    assert (step[1], "1 with the wrong content" in step[4]["feedback"]) == (0.0, True)


def test_a_link_in_place_of_a_file_is_no_file():
    task = task_of(1, 3, 1)
    *commands, submit = given(task).oracle()
    path = sorted(task.result)[0]
    cheat = call("shell", command=f"mv {path} /tmp/x; ln -s /tmp/x {path}")
    assert play(given(task), [*commands, cheat, submit])[1] == 0.0


def test_a_file_may_lack_its_last_end_of_line():
    task = task_of(2, 2, 0)
    target = next(path for path in task.result if path.endswith(".list"))
    text = task.result[target].rstrip("\n")
    step = play(given(task), [call("shell", command=f"printf '{text}' > {target}"), call("submit")])
    assert step[1] == 1.0


def test_files_last_from_one_turn_to_the_next_but_not_into_the_next_episode():
    env, _ = started(5)
    env.step(call("shell", command="echo hello > mine"))
    assert env.step(call("shell", command="cat mine"))[0] == "hello"
    env.reset(seed=5)
    assert "No such file" in env.step(call("shell", command="cat mine"))[0]


def test_what_the_shell_shows_is_cut_and_keeps_its_exit_code():
    env, _ = started(5, max_result_chars=500)
    text = env.step(call("shell", command="seq 1 5000; echo oops >&2; exit 3"))[0]
    assert len(text) <= 500
    assert text.startswith("1\n2\n3\n")
    assert "characters shown]" in text
    assert text.endswith("oops\n[exit code 3]")


def test_levels_are_mixed_evenly_with_an_index():
    asked = [started(seed, "eval", seed, levels=(1, 3))[0].task for seed in range(20)]
    prompts = {seed: task.prompt for seed, task in enumerate(asked)}
    assert len(set(prompts.values())) > 15
    assert all(len(task.plan.split(", ")) >= 3 for task in asked[1::2])  # several steps


@pytest.mark.parametrize("levels", [(), (0,), (1, 4)])
def test_unknown_levels_are_refused(levels):
    with pytest.raises(ConfigError, match="must name some of 1, 2, 3"):
        FilesEnv(levels=levels)


def test_no_task_is_in_two_splits():
    asked = {
        split: {started(seed, split, seed)[0].task.prompt for seed in range(150)} for split in ("train", "eval", "warm")
    }
    assert all(len(prompts) > 100 for prompts in asked.values())
    assert not asked["train"] & asked["eval"]
    assert not asked["train"] & asked["warm"]
    assert not asked["eval"] & asked["warm"]


def test_every_tree_has_files_of_each_ending_and_no_two_of_one_name():
    for seed in range(200):
        tree = draw_tree(np.random.default_rng(seed))
        names = [path.rpartition("/")[2] for path in tree]
        assert len(set(names)) == len(names) >= 10
        for extension in ("csv", "log", "md", "txt"):
            assert sum(name.endswith(f".{extension}") for name in names) >= 2
        assert all(text.endswith("\n") and text.strip() for text in tree.values())


def test_an_unknown_limit_is_named():
    with pytest.raises(ConfigError, match=r"there is no 'second'\. Allowed: .*Did you mean \"seconds\""):
        make("opd/Files-v0", {"limits": {"second": 1}})


def test_a_command_that_takes_too_long_is_stopped_and_the_episode_goes_on():
    env, _ = started(5, limits={"seconds": 0.5})
    assert env.step(call("shell", command="echo begun; sleep 60"))[0] == "begun\n[stopped after 0.5 s]"
    assert play(env, env.oracle())[1] == 1.0
