"""A tool environment answers every action: with results, or with a short text that says what was wrong."""

import asyncio
import gc
import json
import logging
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.envs import Reply, Start, TextSpace, ToolEnv, ToolError, format_call, tool
from opd.envs.spaces import without_addresses
from opd.errors import ConfigError, EnvError


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


def test_a_result_names_the_tool_that_was_called_even_one_that_there_is_none_of(env):
    *_, info = env.step(call("made_up") + call("refuse") + "<tool_call>oops</tool_call>")
    assert [message.get("name") for message in info["messages"]] == ["made_up", "refuse", None]
    assert all("tool_call_id" not in message for message in info["messages"])


def test_a_result_carries_the_id_of_its_call(env):
    *_, info = env.step("[TOOL_CALLS]refuse[CALL_ID]a1b2c3d4e[ARGS]{}")
    assert [message.get("tool_call_id") for message in info["messages"]] == ["a1b2c3d4e"]


def test_a_trainer_says_how_calls_are_read_where_nobody_else_has():
    env, own = SafeEnv(), SafeEnv(tool_format="hermes", starts_thinking=True)
    for made in (env, own):
        made.read_calls_as("pythonic", starts_thinking=False)
        made.reset(seed=0)
    assert (env.tool_format, env.starts_thinking, own.tool_format, own.starts_thinking) == (
        *("pythonic", False, "hermes", True),
    )
    assert env.step("[peek(digit=0)]")[0] == str(env.code)[0]
    env.read_calls_as("hermes", starts_thinking=True)
    assert (env.tool_format, env.starts_thinking) == ("hermes", True)
    with pytest.raises(ConfigError, match="tool_format = 'hermse' is unknown"):
        env.read_calls_as("hermse", starts_thinking=False)


@pytest.mark.parametrize(
    ("tool_format", "action"),
    [
        ("hermes", "<think>\nIs it 1?\n</think>\n\nIt is 2.<|im_end|>"),
        (
            "harmony",
            "<|channel|>analysis<|message|>Is it 1?<|end|><|start|>assistant<|channel|>final<|message|>It is 2.",
        ),
        ("auto", "<think>Is it 1?</think>It is 2."),
    ],
)
def test_an_action_without_a_call_is_taken_by_what_it_says(tool_format, action):
    class Answers(SafeEnv):
        def no_call(self, action):
            return Reply(terminated=True, reward=float(action == "It is 2."))

    env = Answers(tool_format=tool_format)
    env.reset(seed=0)
    assert env.step(action)[1] == 1.0


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
            return Reply(terminated=True, unreadable=True, reward=-1.0, feedback="no call")

    env = Strict()
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step("hello")
    assert (reward, terminated, info["unreadable"]) == (-1.0, True, True)


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
_scraps = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<think>", "[TOOL_CALLS]", "<|python_tag|>", "{", "}"),
        *('{"name": "peek"', '"arguments": {', "[" * 99_999),
    ]
)
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


# -- formats --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool_format", ["auto", "hermes", "llama", "mistral", "json"])
def test_an_environment_reads_calls_in_its_format(tool_format):
    env = SafeEnv(tool_format=tool_format)
    env.reset(seed=0)
    assert env.step(format_call("peek", {"digit": 0}, tool_format))[0] == str(env.code)[0]


def test_an_environment_of_one_format_takes_others_for_text_and_says_which_it_reads():
    env = SafeEnv(tool_format="mistral")
    env.reset(seed=0)
    obs, *_ = env.step(call("peek", digit=0))
    assert obs.startswith("Call a tool, in the form [TOOL_CALLS]name{...}. The tools are: peek, ")


def test_a_call_in_a_thought_is_not_run(env):
    env.step(f"<think>{call('peek', digit=1)}</think>{call('peek', digit=2)}")
    assert env.log == [2]
    thinking = SafeEnv(starts_thinking=True)
    thinking.reset(seed=0)
    thinking.step(call("peek", digit=1))
    assert thinking.log == []


def test_arguments_that_come_as_text_get_the_types_of_the_tool(env):
    env.step("<tool_call>\n<function=peek>\n<parameter=digit>\n2\n</parameter>\n</function>\n</tool_call>")
    assert env.log == [2]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"tool_format": "hermse"},
            "tool_format = 'hermse' is unknown. Allowed: auto, hermes.*Did you mean \"hermes\"",
        ),
        ({"call_timeout": 0}, "call_timeout = 0 must be more than 0"),
        ({"max_calls": 0}, "max_calls = 0 must be more than 0"),
        ({"max_result_chars": -1}, "max_result_chars = -1 must be more than 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        SafeEnv(**settings)


# -- async tools ----------------------------------------------------------------------------------------


class AsyncEnv(ToolEnv):
    """Async tools beside plain ones; `log` tells the order of what happened."""

    def start(self, rng, split, index):
        self.log = []
        self.here = 0
        self.lock = asyncio.Lock()
        return Start(prompt="Go.")

    @tool
    async def meet(self, others: int) -> str:
        """Wait until as many others are here."""
        self.here += 1
        for _ in range(1000):
            if self.here > others:
                self.log.append("met")
                return "met"
            await asyncio.sleep(0.005)
        return "alone"

    @tool
    async def slow(self, seconds: float) -> str:
        """Take a while."""
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.log.append("cancelled")
            raise
        self.log.append("slow")
        return "done"

    @tool
    async def stubborn(self) -> str:
        """Go on when cancelled, then end the episode."""
        while self.log != ["let go"]:
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue
        try:
            self.finish(1.0, success=True)
        except EnvError:
            self.log.append("refused")
        return "late"

    @tool
    async def block(self) -> None:
        """Block the loop."""
        time.sleep(9)

    @tool
    def plain(self) -> str:
        """Do something at once."""
        self.log.append("plain")
        return "plain"

    @tool
    async def end(self, reward: float, wait: float = 0.0) -> str:
        """End the episode."""
        await asyncio.sleep(wait)
        self.finish(reward, success=reward > 0, rewards={"speed": 0.5, "taste": None})
        return "ended"

    @tool
    async def leave(self) -> None:
        """Leave the interpreter."""
        sys.exit(3)

    @tool
    async def cancel(self) -> None:
        """Cancel itself."""
        raise asyncio.CancelledError

    @tool
    async def locked(self) -> str:
        """Use a lock that lives as long as the episode."""
        async with self.lock:
            await asyncio.sleep(0.01)
        return "unlocked"

    @tool
    async def refuse(self) -> None:
        """Refuse."""
        raise ToolError("not today")


@pytest.fixture
def async_env():
    env = AsyncEnv(call_timeout=20)
    env.reset(seed=0)
    yield env
    env.close()


@pytest.fixture
def hasty_env():
    env = AsyncEnv(call_timeout=1)
    env.reset(seed=0)
    yield env
    env.close()


def test_neighbouring_async_calls_run_at_the_same_time(async_env):
    *_, info = async_env.step(call("meet", others=2) * 3)
    assert contents(info) == ["met"] * 3


def test_plain_calls_keep_their_place_between_async_ones(async_env):
    *_, info = async_env.step(call("slow", seconds=0.05) + call("plain") + call("slow", seconds=0.0))
    assert async_env.log == ["slow", "plain", "slow"]
    assert contents(info) == ["done", "plain", "done"]


def test_an_async_call_that_is_late_is_cancelled_and_the_others_are_answered(hasty_env):
    since = time.monotonic()
    *_, info = hasty_env.step(call("slow", seconds=60) + call("slow", seconds=0) + call("plain"))
    assert contents(info) == ["Error: slow failed: TimeoutError: no answer within 1 s", "done", "plain"]
    assert info["feedback"] == "Error: slow failed: TimeoutError: no answer within 1 s"
    assert hasty_env.log == ["slow", "cancelled", "plain"]
    assert time.monotonic() - since < 20


def test_a_call_that_ignores_its_cancellation_cannot_end_the_episode_later(hasty_env):
    assert hasty_env.step(call("stubborn"))[2] is False
    hasty_env.log.append("let go")
    deadline = time.monotonic() + 10
    while len(hasty_env.log) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert hasty_env.log == ["let go", "refused"]
    assert hasty_env.step(call("plain"))[1:3] == (0.0, False)


def test_a_call_that_blocks_the_loop_is_given_up_and_the_next_has_a_loop_of_its_own(hasty_env):
    since = time.monotonic()
    obs, *_ = hasty_env.step(call("block"))
    assert obs == "Error: block failed: TimeoutError: no answer within 1 s"
    assert hasty_env.step(call("slow", seconds=0))[0] == "done"
    assert time.monotonic() - since < 8


@pytest.mark.parametrize(
    ("action", "answer"),
    [
        (call("leave"), "Error: leave failed: SystemExit: 3"),
        (call("cancel"), "Error: cancel failed: asyncio.exceptions.CancelledError: it was cancelled"),
        (call("refuse"), "Error: not today"),
        (call("slow"), "Error: wrong arguments for slow: seconds: field required"),
    ],
)
def test_an_async_call_that_fails_is_answered_and_the_loop_goes_on(async_env, action, answer):
    assert async_env.step(action)[0] == answer
    assert async_env.step(call("slow", seconds=0))[0] == "done"


def test_of_async_calls_that_end_the_episode_the_first_counts_whoever_is_faster(async_env):
    _, reward, terminated, _, info = async_env.step(
        call("end", reward=1.0, wait=0.1) + call("end", reward=2.0) + call("plain")
    )
    assert (reward, terminated, info["success"]) == (1.0, True, True)
    assert contents(info) == ["ended", "ended"]
    assert async_env.log == []


def test_what_an_async_tool_opened_can_be_used_in_the_next_turn(async_env):
    for _ in range(3):
        assert contents(async_env.step(call("locked") * 2)[4]) == ["unlocked"] * 2


def test_an_async_function_behind_a_plain_decorator_is_awaited():
    async def inner() -> int:
        return 7

    def outer() -> object:
        """Give a coroutine."""
        return inner()

    env = SafeEnv(tools=[outer])
    env.reset(seed=0)
    assert env.step(call("outer"))[0] == "7"
    env.close()


def test_a_loop_is_started_when_it_is_needed_and_leaves_with_its_environment():
    others = set(threading.enumerate())  # loops that earlier tests blocked, say

    def loops():
        return [one for one in threading.enumerate() if one.name == "opd-async" and one not in others]

    env = AsyncEnv()
    env.reset(seed=0)
    env.step(call("plain"))
    assert len(loops()) == 0
    for _ in range(3):
        env.step(call("slow", seconds=0))
    assert len(loops()) == 1
    env.close()
    assert len(loops()) == 0
    env.reset(seed=0)
    env.step(call("slow", seconds=0))
    [loop] = loops()
    del env
    gc.collect()
    loop.join(20)
    assert not loop.is_alive()


def test_the_parts_of_a_reward_are_told_when_an_episode_ends(async_env):
    *_, info = async_env.step(call("end", reward=1.0))
    assert info["rewards"] == {"speed": 0.5, "taste": None}


def test_finish_is_for_tools_alone(env):
    with pytest.raises(EnvError, match=r"SafeEnv\.finish was called outside a running tool"):
        env.finish(1.0, success=True)


# -- results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (b"\xff" * 100, "\N{REPLACEMENT CHARACTER}" * 20 + "\n[cut: 20 of 100 characters shown]"),
        (list(range(1000)), "[0, 1, 2, 3, 4, 5, 6\n[cut: 20 of 4890 characters shown]"),
        ("x" * 10_000_000, "x" * 20 + "\n[cut: 20 of 10000000 characters shown]"),
        (None, "(no output)"),
        ("\ud83d", "?"),
    ],
)
def test_any_result_is_shown_within_the_limit(result, shown):
    def give() -> object:
        """Give it."""
        return result

    env = SafeEnv(tools=[give], max_result_chars=20)
    env.reset(seed=0)
    assert env.step(call("give"))[0] == shown


def test_an_exception_of_a_megabyte_is_cut_too():
    def fail() -> None:
        """Fail."""
        raise ValueError("x" * 1_000_000)

    env = SafeEnv(tools=[fail], max_result_chars=30)
    env.reset(seed=0)
    assert env.step(call("fail"))[0].startswith("Error: fail failed: ValueError\n[cut: 30 of ")


def test_what_a_tool_remembers_is_forgotten_at_reset(env):
    env.step(call("peek", digit=0))
    env.reset(seed=1)
    assert env.log == []


class Boxes(ToolEnv):
    """Gives results that Python writes with their memory addresses."""

    def start(self, rng, split, index):
        return Start(prompt=f"Here is {object()}.", privileged={"solution": repr(object())})

    @tool
    def get(self, kind: str) -> object:
        """Get something.

        Args:
            kind: of what
        """
        made = {"plain": object(), "list": [object()], "method": self.start, "function": contents, "set": {object()}}
        made["generator"] = (one for one in ())
        if kind == "error":
            raise ToolError(f"no {object()} here")
        return f"in words: {object()}" if kind == "words" else made[kind]


@pytest.mark.parametrize("kind", ["plain", "list", "method", "function", "set", "generator", "words", "error"])
def test_no_text_of_an_environment_holds_a_memory_address(kind):
    env = Boxes()
    told, info = env.reset(seed=0)
    answer, *_, step = env.step(call("get", kind=kind))
    texts = [told, info["privileged"]["solution"], answer, step.get("feedback", ""), *contents(step)]
    assert "0x" not in " ".join(texts)
    assert "object" in told
    assert "no output" not in answer


def test_a_number_that_is_no_address_of_an_object_stays():
    text = "jump at 0x7fff5694dc58 to <main>, look at 0x10; <a at 0x7f>"
    assert without_addresses(text) == text
