"""A tool environment answers every action: with results, or with a short text that says what was wrong."""

import json
import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.envs import Reply, Start, TextSpace, ToolEnv, ToolError, tool
from opd.errors import ConfigError


class SafeEnv(ToolEnv):
    """Find the code of a safe: `peek` tells it, `open_safe` ends the episode."""

    def start(self, rng, split, index):
        self.code = int(rng.integers(1000, 10_000))
        self.log = []
        return Start(prompt="Open the safe.", privileged={"solution": f"The code is {self.code}."})

    @tool
    def peek(self, digit: int) -> int:
        """Look at one digit of the code.

        Args:
            digit: which, from 0 to 3.
        """
        self.log.append(digit)
        return int(str(self.code)[digit])

    @tool
    def open_safe(self, code: int) -> str:
        """Open the safe."""
        right = code == self.code
        self.finish(1.0 if right else 0.0, success=right, feedback=None if right else f"{code} is wrong.")
        return "open" if right else "locked"

    @tool
    def repeat(self, text: str, times: int = 1) -> str:
        """Repeat a text."""
        return text * times

    @tool
    def refuse(self) -> None:
        """Refuse."""
        raise ToolError("not today")

    @tool
    def leave(self) -> None:
        """Leave the interpreter."""
        sys.exit(3)

    @tool
    def loop(self) -> object:
        """Give a result that JSON cannot hold."""
        result: list[object] = []
        result.append(result)
        return result


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.fixture
def env():
    env = SafeEnv()
    env.reset(seed=0)
    return env


def contents(info):
    return [message["content"] for message in info["messages"]]


def test_the_tools_are_offered_at_reset():
    _, info = SafeEnv().reset(seed=0)
    names = [schema["function"]["name"] for schema in info["tools"]]
    assert names == ["peek", "open_safe", "repeat", "refuse", "leave", "loop"]


def test_a_result_comes_back_as_a_tool_message(env):
    obs, reward, terminated, truncated, info = env.step(call("peek", digit=0))
    digit = str(env.code)[0]
    assert (obs, reward, terminated, truncated) == (digit, 0.0, False, False)
    assert info == {"success": False, "messages": [{"role": "tool", "name": "peek", "content": digit}]}


def test_several_calls_run_in_order(env):
    *_, info = env.step("".join(call("peek", digit=d) for d in (3, 1, 2)))
    assert env.log == [3, 1, 2]
    assert contents(info) == [str(env.code)[d] for d in (3, 1, 2)]


def test_finish_ends_the_episode_with_its_reward(env):
    obs, reward, terminated, truncated, info = env.step(call("open_safe", code=env.code))
    assert (obs, reward, terminated, truncated, info["success"]) == ("open", 1.0, True, False, True)
    assert "feedback" not in info


def test_a_failed_finish_gives_its_feedback(env):
    _, reward, terminated, _, info = env.step(call("open_safe", code=1))
    assert (reward, terminated, info["success"], info["feedback"]) == (0.0, True, False, "1 is wrong.")


def test_calls_after_finish_are_not_run(env):
    *_, info = env.step(call("peek", digit=0) + call("open_safe", code=1) + call("peek", digit=2))
    assert env.log == [0]
    assert len(info["messages"]) == 2


def test_a_new_episode_does_not_remember_the_end_of_the_last(env):
    env.step(call("open_safe", code=1))
    env.reset(seed=1)
    assert env.step(call("peek", digit=0))[2] is False


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("<tool_call>{</tool_call>", "Error: the tool call is not valid JSON"),
        (call("peak", digit=1), "Error: there is no tool 'peak'.*Did you mean peek?"),
        (call("x" * 5000), "Error: there is no tool 'x{80}'. The tools are: peek, "),
        (call("finish", reward=1), "Error: there is no tool 'finish'"),
        (call("peek"), "Error: wrong arguments for peek: digit: field required"),
        (call("peek", digit=9), "Error: peek failed: IndexError: string index out of range"),
        (call("refuse"), "Error: not today"),
        (call("leave"), "Error: leave failed: SystemExit: 3"),
        (call("loop"), "Error: loop failed: ValueError: Circular reference detected"),
    ],
)
def test_a_failed_call_becomes_a_message_and_the_turns_feedback(env, action, reason):
    import re

    obs, reward, terminated, truncated, info = env.step(action)
    assert re.match(reason.replace("?", r"\?"), obs)
    assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)
    assert info["feedback"] == obs
    assert [message["role"] for message in info["messages"]] == ["tool"]
    assert len(obs) < 300


def test_a_name_that_the_model_made_up_is_no_tools_name(env):
    *_, info = env.step(call("made_up") + call("refuse"))
    assert [message.get("name") for message in info["messages"]] == [None, "refuse"]


def test_only_the_failed_calls_of_an_action_are_feedback(env):
    *_, info = env.step(call("repeat", text="fine") + call("refuse"))
    assert contents(info) == ["fine", "Error: not today"]
    assert info["feedback"] == "Error: not today"


def test_a_bug_in_a_tool_is_logged_and_a_refusal_is_not(env, caplog):
    with caplog.at_level(logging.WARNING):
        env.step(call("refuse"))
        assert not caplog.records
        env.step(call("peek", digit=9))
    assert [record.exc_info[0] for record in caplog.records] == [IndexError]


def test_an_action_without_a_call_gets_a_reminder(env):
    obs, reward, terminated, _, info = env.step("The code is 1234.")
    assert obs == info["feedback"] == "Call a tool. The tools are: peek, open_safe, repeat, refuse, leave, loop."
    assert (reward, terminated) == (0.0, False)
    assert "messages" not in info


def test_a_subclass_decides_what_an_action_without_a_call_does():
    class Strict(SafeEnv):
        def no_call(self, action):
            return Reply(terminated=True, reward=-1.0, feedback="no call")

    env = Strict()
    env.reset(seed=0)
    assert env.step("hello")[1:3] == (-1.0, True)


def test_a_long_result_is_cut_with_a_notice():
    env = SafeEnv(max_result_chars=10)
    env.reset(seed=0)
    assert env.step(call("repeat", text="ab", times=5))[0] == "ababababab"
    assert env.step(call("repeat", text="ab", times=6))[0] == "ababababab\n[cut: 10 of 12 characters shown]"


def test_functions_can_be_passed_as_tools():
    def double(x: int) -> int:
        """Double a number."""
        return 2 * x

    env = SafeEnv(tools=[double])
    env.reset(seed=0)
    assert env.step(call("double", x=21))[0] == "42"


def test_two_tools_of_one_name_are_refused():
    def peek() -> None:
        """Peek."""

    with pytest.raises(ConfigError, match="SafeEnv has two tools named 'peek'"):
        SafeEnv(tools=[peek])


def test_max_steps_truncates():
    env = SafeEnv(max_steps=1)
    env.reset(seed=0)
    assert env.step("hello")[2:4] == (False, True)


_tools = st.sampled_from(["peek", "open_safe", "repeat", "refuse", "loop", "leave", "", "nope", "\ud800"])
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_arguments = st.dictionaries(st.sampled_from(["digit", "code", "text", "times", "x"]), _values, max_size=3)
_calls = st.builds(lambda name, arguments: call(name, **arguments), _tools, _arguments)
_scraps = st.sampled_from(["<tool_call>", "</tool_call>", "{", "}", '{"name": "peek"', '"arguments": {', "[" * 99_999])
_actions = st.lists(_calls | _scraps | st.text(st.characters(codec=None)), max_size=5).map("".join)


@given(_actions)
def test_no_action_whatever_makes_a_step_raise(action):
    env = SafeEnv(max_result_chars=500)
    env.reset(seed=0)
    obs, reward, terminated, truncated, info = env.step(action)
    assert obs in TextSpace()
    assert isinstance(reward, float)
    assert terminated in (True, False)
    assert truncated is False
    assert all(message["content"] in TextSpace() for message in info.get("messages", []))
    assert "The code is" not in obs


@pytest.mark.parametrize("action", ["x" * 100_000, call("x" * 100_000), call("peek", **{"k" * 100_000: 1})])
def test_a_long_action_is_answered_briefly(env, action):
    assert len(env.step(action)[0]) < 5000


def test_calls_beyond_the_limit_are_not_run_and_the_model_is_told():
    env = SafeEnv(max_calls=2)
    env.reset(seed=0)
    *_, info = env.step(call("peek", digit=0) * 5)
    assert env.log == [0, 0]
    assert contents(info)[2:] == ["Error: only 2 calls are run in one turn"]
    *_, info = env.step(call("peek", digit=0) * 2)
    assert len(info["messages"]) == 2
