"""Tools that run what the model writes: they keep files for an episode, say why a program ended, and stay short."""

import json
import re
from pathlib import Path

import pytest

from opd.envs import Start
from opd.envs.worlds.sandbox import PythonTool, ShellTool, report
from opd.errors import ConfigError
from opd.sandbox import Sandbox, SandboxLimits, bubblewrap

pytestmark = pytest.mark.slow  # each runs a program apart


class Workshop(PythonTool, ShellTool):
    def start(self, rng, split, index):
        self.session = self.sandbox.session({"number": str(rng.integers(100))})
        return Start(prompt="Do as you like.", privileged={"solution": "anything"})


def call(name, **arguments):
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def begun(**options):
    env = Workshop(**options)
    env.reset(seed=1)
    return env


def test_both_tools_work_in_one_folder_that_lasts_for_the_episode():
    env = begun()
    number = env.session.files["number"].decode()
    assert env.step(call("python", code="open('x', 'w').write(open('number').read() * 2)"))[0] == "(no output)"
    assert env.step(call("shell", command="cat x; rm number"))[0] == number * 2
    assert env.step(call("shell", command="ls"))[0] == "x"
    env.reset(seed=1)
    assert env.step(call("shell", command="ls; cat number"))[0] == f"number\n{number}"


def test_the_tools_are_described_to_the_model():
    schemas = {schema["function"]["name"]: schema["function"] for schema in begun().tool_schemas()}
    assert sorted(schemas) == ["python", "shell"]
    assert schemas["python"]["parameters"]["required"] == ["code"]
    assert schemas["shell"]["parameters"]["required"] == ["command"]


@pytest.mark.parametrize(
    ("command", "limits", "text"),
    [
        ("echo out; echo err >&2; exit 2", {}, "out\nerr\n[exit code 2]"),
        ("echo begun; sleep 60", {"seconds": 1}, "begun\n[stopped after 1 s]"),
        ("mkdir a; touch a/1 a/2 a/3", {"files": 3}, "[undone: more than 3 files or 64 MB in the folder]"),
        ("true", {}, "(no output)"),
    ],
)
def test_the_model_reads_why_a_program_ended(command, limits, text):
    assert begun(limits=limits).step(call("shell", command=command))[0] == text


def test_endless_output_is_short_and_keeps_its_notice():
    text = begun(limits={"output_kb": 100}, max_result_chars=300).step(call("shell", command="yes"))[0]
    assert len(text) <= 300
    assert text.endswith("[stopped: more than 100 kB of output]")


@pytest.mark.parametrize("most", [10, 80, 200])
def test_the_beginning_and_the_end_of_long_output_are_shown(most):
    outcome = Sandbox().run(["seq", "1000"])
    text = report(outcome, SandboxLimits(), most=most)
    assert len(text) <= max(most, 60)
    assert "of 3892 characters shown]" in text
    if most > 60:
        assert text.startswith("1\n2\n")
        assert text.endswith("999\n1000")


def test_a_program_that_fails_does_not_end_the_episode():
    step = begun().step(call("python", code="1 / 0"))
    assert "ZeroDivisionError" in step[0]
    assert step[0].endswith("[exit code 1]")
    assert step[2:4] == (False, False)


def test_where_there_is_no_sandbox_the_environment_is_refused(monkeypatch):
    bubblewrap.require_bubblewrap.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="apt-get install bubblewrap"):
        Workshop()


def test_the_weaker_mode_has_to_be_asked_for_by_name_and_warns():
    with pytest.warns(RuntimeWarning, match="is no sandbox"):
        env = begun(sandbox="limits")
    assert env.step(call("shell", command="cat number"))[0] == env.session.files["number"].decode()


@pytest.mark.slow
def test_the_examples_of_the_page_work():
    page = Path(__file__).parents[2].joinpath("docs", "sandbox.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 3
    names = {}
    for example in examples:
        exec(example, names)
    _, info = names["WorkshopEnv"]().reset(seed=0)
    assert info["privileged"] == {"solution": "They add up to 10."}
    for limit in SandboxLimits.__slots__:
        assert f"`{limit}`" in page
    assert f"(`processes`, {SandboxLimits().processes})" in page
    assert f"(`memory_mb`, {SandboxLimits().memory_mb})" in page
    assert f"(`folder_mb`, {SandboxLimits().folder_mb}; `files`, {SandboxLimits().files})" in page
