"""The tools of a real MCP server, a process that speaks over stdio; what it may do wrong, and that it ends."""

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd.envs import make
from opd.errors import ConfigError, EnvError

pytestmark = pytest.mark.slow

SERVER = Path(__file__).parent / "shop_server.py"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"What do {n} apples cost?", "answer": str(3 * n), "way": f"3 times {n}"} for n in range(2, 40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def pids(tmp_path):
    """Name the file in which every server writes its process id."""
    return tmp_path / "pids"


@pytest.fixture
def shop(rows, pids):
    made = []

    def factory(**kwargs):
        command = f"{sys.executable} {SERVER} {pids}"
        settings = {"data": rows, "rewards": ["contains_answer"], "privileged_columns": {"solution": "way"}}
        made.append(make(f"mcp:{command}", {**settings, "call_timeout": 40.0, **kwargs}))
        return made[-1]

    yield factory
    for env in made:
        env.close()


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def running(pids):
    """Return the servers that are still there, after a moment for those that are ending."""
    alive = []
    for _ in range(50):
        alive = [pid for pid in map(int, pids.read_text().split()) if is_alive(pid)]
        if not alive:
            break
        time.sleep(0.1)
    return alive


def is_alive(pid):
    try:
        return not Path(f"/proc/{pid}/stat").read_text().split(") ")[1].startswith("Z")
    except FileNotFoundError:
        return False


def test_a_real_model_plays_it_and_the_server_ends_with_it(one_episode, shop, pids):
    trajectory = one_episode(shop)
    assert trajectory.terminated  # text without a call is the answer
    assert trajectory.reward in (0.0, 1.0)
    assert "price" in [tool["function"]["name"] for tool in trajectory.tools]
    assert trajectory.privileged["solution"].startswith("3 times")
    assert len(pids.read_text().split()) == 1
    assert not running(pids)


def test_tools_are_called_and_the_answer_is_scored(spoken_episode, shop):
    texts = [call("price", item="apple") + call("price", item="plum"), call("note", text="3"), "3 6 9 12 15 18"]
    trajectory = spoken_episode(lambda: shop(rewards=["opd.rewards:number_match"]), texts)
    assert trajectory.turns[1].messages[0]["content"] == "3"
    assert trajectory.turns[1].messages[1]["content"].startswith("Error: ")
    assert "plum" in trajectory.turns[0].feedback
    assert trajectory.turns[2].messages[0]["content"] == "1 written"
    assert trajectory.terminated


def test_a_right_answer_is_a_success_and_a_fresh_server_remembers_nothing(shop):
    env = shop()
    for _ in range(2):
        obs, _ = env.reset(seed=0, options={"split": "train", "index": 0})
        count = int(obs.split(" ")[2])
        assert env.step(call("note", text="a"))[0] == "1 written"
        assert env.step(f"They cost {3 * count}.")[1:4] == (1.0, True, False)


def test_a_shared_server_is_started_once_and_remembers(shop, pids):
    env = shop(fresh=False, tools=["note"])
    for expected in ("1 written", "2 written"):
        _, info = env.reset(seed=0)
        assert [tool["function"]["name"] for tool in info["tools"]] == ["note"]
        assert env.step(call("note", text="a"))[0] == expected
    assert len(pids.read_text().split()) == 1


def test_the_server_inherits_no_secrets_and_a_long_answer_is_cut(shop, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "hush")
    env = shop(config={"env": {"SHOP": "open"}}, max_result_chars=2000)
    env.reset(seed=0)
    names = env.step(call("variables"))[0].split()
    assert "SHOP" in names
    assert "MY_API_KEY" not in names
    assert env.step(call("long"))[0].endswith("[cut: 2000 of 1000000 characters shown]")


@pytest.mark.parametrize("fault", ["hang", "flood"])
def test_a_server_that_is_late_is_stopped_and_every_later_call_fails_at_once(shop, pids, fault):
    env = shop(fresh=False)
    env.reset(seed=0)
    env.call_timeout = env._session._timeout = 3.0  # not before: starting a server may take as long
    started = time.monotonic()
    assert "did not answer within 3 s and was stopped" in env.step(call(fault))[0]
    assert time.monotonic() - started < 25
    assert running(pids) == []
    started = time.monotonic()
    assert "was stopped" in env.step(call("price", item="apple"))[0]
    assert time.monotonic() - started < 1
    env.call_timeout = 40.0
    env.reset(seed=1)  # gets another one
    assert env.step(call("price", item="apple"))[0] == "3"


def test_a_server_that_dies_becomes_an_error_text(shop, pids):
    env = shop()
    env.reset(seed=0)
    for _ in range(2):
        obs, _, terminated, truncated, info = env.step(call("die"))
        assert obs.startswith("Error: the server of the tools")
        assert not terminated
        assert not truncated
        assert info["feedback"] == obs
    env.close()
    assert running(pids) == []


def test_an_environment_that_nobody_closes_takes_its_server_along(shop, pids, rows):
    env = make(f"mcp:{sys.executable} {SERVER} {pids}", {"data": rows, "rewards": "exact_match", "call_timeout": 40.0})
    env.reset(seed=0)
    assert len(running(pids)) == 1
    del env
    gc.collect()
    assert running(pids) == []


def test_a_run_that_ends_without_closing_leaves_no_server(pids, rows):
    program = (
        "import sys, opd.envs\n"
        f"kwargs = {{'data': {rows!r}, 'rewards': 'exact_match', 'call_timeout': 40.0}}\n"
        f"env = opd.envs.make('mcp:{sys.executable} {SERVER} {pids}', kwargs)\n"
        "env.reset(seed=0)\n"
        'env.step(\'<tool_call>{"name": "price", "arguments": {"item": "pear"}}</tool_call>\')\n'
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert running(pids) == []


@pytest.mark.parametrize("program", ["import time; time.sleep(60)", "print('hello')", "raise SystemExit(2)"])
def test_what_is_no_server_fails_the_episode(rows, program):
    env = make(f'mcp:{sys.executable} -c "{program}"', {"data": rows, "rewards": "exact_match", "call_timeout": 2.0})
    with pytest.raises(EnvError, match="the MCP server did not start"):
        env.reset(seed=0)


@pytest.mark.parametrize(
    ("name", "kwargs", "problem"),
    [
        ("no-such-command --port 3", {}, "there is no command 'no-such-command'"),
        ("python 'open", {}, "cannot be read"),
        ("http://127.0.0.1:9/mcp", {"config": {"cwd": "/"}}, "not for a URL"),
        (f"{os.path.basename(sys.executable)} x.py", {"config": {"envs": {}}}, "has no setting 'envs'"),
        (f"{os.path.basename(sys.executable)} x.py", {"prompt_column": "promt"}, 'Did you mean "prompt"'),
    ],
)
def test_a_mistake_is_named(name, kwargs, problem, rows):
    with pytest.raises(ConfigError, match=problem):
        make(f"mcp:{name}", {"data": rows, "rewards": "exact_match", **kwargs})


def test_a_tool_that_the_server_does_not_have_is_named(shop):
    with pytest.raises(EnvError, match=r"the server has no tool 'prize'; it has: price, note"):
        shop(tools=["prize"]).reset(seed=0)
