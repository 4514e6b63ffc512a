"""`opd envs check` ends in time whatever an environment does, says where it is wrong, and shows an episode of it."""

import re
import time

import pytest

from opd.envs import check
from opd.envs.checker_process import check_within
from opd.errors import ConfigError

SOURCE = """
import os, time
from opd.envs import Reply, Start, TextEnv, ToolEnv, tool

class Echo(TextEnv):
    def __init__(self, way="fine"):
        super().__init__()
        self.way = way
        if way == "make":
            raise KeyError("no map")  # line 10

    def start(self, rng, split, index):
        if self.way == "reset":
            raise ValueError("no task")  # line 14
        hint = " All is fine with that." if self.way == "leak" else ""
        return Start(prompt=f"Say {rng.integers(10**9)}.{hint}", privileged={"solution": "fine"})

    def respond(self, action):
        if self.way == "hang":
            time.sleep(600)
        if self.way == "exit":
            os._exit(3)
        if self.way == "step":
            return helper(action)
        print("an environment may print")
        return Reply(terminated=True, reward=float(action == "fine"), success=action == "fine", rewards={"echo": None})

def helper(action):
    return {}["missing"]  # line 29

class Doors(ToolEnv):
    def __init__(self, works=True):
        super().__init__()
        self.works = works

    def start(self, rng, split, index):
        return Start(prompt=f"Door {rng.integers(10**9)}.", privileged={"action": "push"})

    @tool
    def push(self, strength: int) -> str:
        '''Push the door.'''
        if not self.works:
            raise RuntimeError("it is stuck")  # line 43
        self.finish(1.0, success=True)
        return "open"

    @tool
    def pull(self) -> str:
        '''Pull the door.'''
        return "closed"
"""
ID = "checked_env:Echo"


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "checked_env.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "checked_env", raising=False)
    return str(tmp_path / "checked_env.py")


def errors(findings):
    return [finding.message for finding in findings if finding.severity == "error"]


@pytest.mark.parametrize(
    ("way", "line", "said"),
    [
        ("make", 10, "making the environment raised KeyError: 'no map' ({file}:10, in __init__: `raise KeyError("),
        ("reset", 14, "an episode raised ValueError: no task ({file}:14, in start: `raise ValueError("),
        ("step", 29, "an episode raised KeyError: 'missing' ({file}:29, in helper: `return {{}}[\"missing\"]"),
    ],
)
def test_what_raises_is_told_with_its_file_and_line(module, way, line, said):
    assert said.format(file=module) in "\n".join(errors(check(ID, {"way": way})))


def test_a_tool_that_raises_is_a_warning_with_its_file_and_line(module):
    report = check_within("checked_env:Doors", {"works": False})
    assert not report.broken
    assert "Error: push failed: RuntimeError: it is stuck" in "\n".join(report.episode)
    assert any(f"RuntimeError: it is stuck ({module}:43, in push" in one.message for one in report.findings)


def test_a_text_that_is_the_name_of_a_tool_is_no_leak_where_it_is_offered():
    assert errors(check("checked_env:Doors")) == []


def test_a_leak_is_quoted_with_the_call_that_told_it():
    [message] = errors(check(ID, {"way": "leak"}))
    said = r"reset\(seed=0, options=None\) said 'Say \d+\. All is fine with that\.'"
    assert re.fullmatch(
        rf'info\["privileged"\]\["solution"\] stands in the observations of 24 episodes: {said}', message
    )


def test_a_hang_ends_in_time_and_is_told_by_its_call():
    since = time.monotonic()
    report = check_within(ID, {"way": "hang"}, time_limit=6.0)
    assert time.monotonic() - since < 20
    [message] = errors(report.findings)
    assert message.startswith("no answer within 6 s: gymnasium's check_env.")


def test_an_environment_that_ends_its_process_is_told():
    report = check_within(ID, {"way": "exit"})
    assert errors(report.findings) == ["its process ended with exit code 3: gymnasium's check_env"]


def test_an_episode_is_shown_line_by_line():
    report = check_within(ID)
    assert not report.broken
    shown = [line.split("|") for line in report.episode[1:]]
    assert [name.strip() for name, _ in shown] == [
        "user",
        "teacher alone: solution",
        "action",
        "reward of echo",
        "reward",
    ]
    assert [text.strip() for _, text in shown][1:] == ["fine", "fine", "abstains", "1, terminated, a success"]


def test_the_tools_are_called_once_each_with_what_their_schemas_take():
    shown = "\n".join(check_within("checked_env:Doors").episode)
    assert 'action | <tool_call>{"name": "push", "arguments": {"strength": 1}}</tool_call>' in shown
    assert "tool push | open" in shown


def test_what_cannot_be_named_is_refused_as_a_setting():
    with pytest.raises(ConfigError, match="has no attribute 'Missing'"):
        check_within("checked_env:Missing")
    with pytest.raises(ConfigError, match="time-limit = -1"):
        check_within(ID, time_limit=-1)
