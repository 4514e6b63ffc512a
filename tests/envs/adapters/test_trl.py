"""Classes written for TRL's `environment_factory`: the tools, the tasks and the scores that TRL would see."""

import inspect
import json
import sys
import types

import pytest
from transformers.utils import get_json_schema

from opd.envs import check, make
from opd.errors import ConfigError


class Counter:
    """An environment as TRL's documentation describes them."""

    def __init__(self, step=1):
        self.by = step
        self.scored = 0

    def reset(self, target=3, **row):
        self.count, self.target, self.row = 0, target, row
        return f" The target is {target}."

    def add(self, amount: int) -> str:
        """Add to the counter.

        Args:
            amount: How much to add.
        """
        self.count += amount * self.by
        return f"The counter is at {self.count}."

    async def look(self) -> str:
        """Look at the counter."""
        return f"It shows {self.count}."

    def fail(self) -> str:
        """Always go wrong."""
        raise ValueError("no such luck")

    def get_reward(self) -> float:
        self.scored += 1
        return float(self.count == self.target)

    def _helper(self):
        raise AssertionError("a private method is no tool")

    @property
    def danger(self):
        raise AssertionError("a property is not looked at")


class Plain:
    """One without a score of its own."""

    def reset(self, **row):
        return None

    def ping(self) -> str:
        """Ping."""
        return "pong"


class Drawing(Plain):
    def reset(self, seed=0):
        return f"Task {seed}."

    def get_reward(self):
        return 0.5


def shows_two(completions, environments, target, **columns):
    both = zip(completions, environments, target, strict=True)
    return [float(len(said) > 1 and env.count == 2 == wanted) for said, env, wanted in both]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    module = types.ModuleType("trl_environments")
    for thing in (Counter, Plain, Drawing, shows_two):
        setattr(module, thing.__name__, thing)
    monkeypatch.setitem(sys.modules, "trl_environments", module)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"Count to {n}.", "target": n, "plan": f"Add one, {n} times over."} for n in range(1, 41)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def test_a_real_model_plays_it(one_episode, rows):
    kwargs = {"data": rows, "privileged_columns": {"solution": "plan"}}
    trajectory = one_episode(lambda: make("trl:trl_environments:Counter", kwargs), max_turns=3)
    assert trajectory.terminated  # text without a call is TRL's end of a rollout
    assert (trajectory.reward, trajectory.success) == (0.0, False)
    assert [tool["function"]["name"] for tool in trajectory.tools] == ["add", "fail", "look"]
    assert trajectory.privileged["solution"].startswith("Add one")
    assert "Count to" in trajectory.turns[0].messages[0]["content"]


def test_tools_that_are_called_change_the_state_that_is_scored(spoken_episode):
    made = []

    def factory():
        made.append(make("trl:trl_environments:Counter", {"config": {"step": 3}}))
        return made[-1]

    trajectory = spoken_episode(factory, [call("add", amount=1), call("look"), "done"])
    assert [turn.messages[-1]["content"] for turn in trajectory.turns] == [
        " The target is 3.",
        "The counter is at 3.",
        "It shows 3.",
    ]
    assert (trajectory.terminated, trajectory.reward, trajectory.success) == (True, 1.0, True)
    [env] = made
    assert env._theirs.scored == 1  # TRL asks once, at the end


@pytest.mark.parametrize("kwargs", [{}, {"config": {"step": 2}}])
def test_the_schemas_are_those_that_trl_shows(kwargs):
    _, info = make("trl:trl_environments:Counter", kwargs).reset(seed=0)
    ours = {tool["function"]["name"]: tool["function"] for tool in info["tools"]}
    theirs = [f for name, f in inspect.getmembers(Counter, inspect.isfunction) if name in ours]
    for schema in (get_json_schema(function)["function"] for function in theirs):
        mine = ours[schema["name"]]
        assert mine["description"] == schema["description"]
        for name, wanted in schema["parameters"]["properties"].items():
            assert mine["parameters"]["properties"][name].items() >= wanted.items()
        assert mine["parameters"].get("required", []) == schema["parameters"].get("required", [])


def test_the_columns_of_a_row_reach_reset_and_the_reward_functions(spoken_episode, rows):
    env = make("trl:trl_environments:Counter", {"data": rows, "rewards": ["trl_environments:shows_two"]})
    assert env.reset(seed=0, options={"split": "train", "index": 1})[0] == "Count to 2. The target is 2."
    assert set(env._theirs.row) == {"prompt", "plan"}
    env.step(call("add", amount=2))
    assert env.step("done")[1] == 2.0  # get_reward and the function, each with weight 1


def test_a_rollout_that_its_own_limit_cuts_is_scored_as_it_stands():
    env = make("trl:trl_environments:Counter", {"max_turns": 2})
    env.reset(seed=0)
    assert env.step(call("add", amount=1))[1:4] == (0.0, False, False)
    assert env.step(call("add", amount=2))[1:4] == (1.0, False, True)


def test_a_tool_that_raises_is_answered_and_the_rollout_goes_on():
    env = make("trl:trl_environments:Counter")
    env.reset(seed=0)
    obs, _, terminated, _, info = env.step(call("fail"))
    assert "no such luck" in obs
    assert "no such luck" in info["feedback"]
    assert not terminated


def test_an_environment_that_draws_its_own_tasks_gets_the_seed():
    env = make("trl:trl_environments:Drawing")
    first, second = env.reset(seed=1)[0], env.reset(seed=2)[0]
    assert first != second
    assert env.reset(seed=1)[0] == first


def test_the_checker_finds_no_error(rows):
    findings = check("trl:trl_environments:Counter", {"data": rows, "privileged_columns": {"solution": "plan"}})
    assert [finding for finding in findings if finding.severity != "note"] == []


@pytest.mark.parametrize(
    ("name", "kwargs", "problem"),
    [
        ("trl_environments:Contour", {}, "cannot be imported"),
        ("trl_environments:Plain", {}, r"env\.kwargs\.rewards is missing"),
        ("builtins:dict", {}, "without a reset method"),
        ("trl_environments:Counter", {"privileged_columns": {"solution": "plan"}}, r"there is no env\.kwargs\.data"),
    ],
)
def test_a_mistake_is_named(name, kwargs, problem):
    with pytest.raises(ConfigError, match=problem):
        make(f"trl:{name}", kwargs)
