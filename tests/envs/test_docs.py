"""The code on docs/environments.md is the code in the repository, and it runs."""

import re
from pathlib import Path

import pytest
import yaml

from opd.envs import format_call, parse_tool_calls, validate_id
from opd.episodes.config import EnvConfig
from opd.tool_calls import TOOL_FORMATS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "environments.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_on_the_page_is_the_file():
    source = (ROOT / "examples" / "custom_env.py").read_text(encoding="utf-8")
    [block] = [block for block in blocks("python") if "class GuessEnv" in block]
    assert source.split('"""\n\n', 1)[1] == block


def test_the_tool_environment_on_the_page_can_be_solved():
    [block] = [block for block in blocks("python") if "class SafeEnv" in block]
    names: dict = {}
    exec(block, names)
    env = names["SafeEnv"]()
    _, info = env.reset(seed=0)
    assert [schema["function"]["name"] for schema in info["tools"]] == ["peek", "open_safe"]
    digits = [env.step(f'{{"name": "peek", "arguments": {{"position": {i}}}}}')[0] for i in range(4)]
    assert env.step('{"name": "peek", "arguments": {"position": 4}}')[0] == "Error: position must be from 0 to 3"
    code = "".join(digits)
    assert env.step(f'<tool_call>{{"name": "open_safe", "arguments": {{"code": "{code}"}}}}</tool_call>')[1:3] == (
        1.0,
        True,
    )


def test_the_settings_on_the_page_are_settings():
    lines = [line for line in blocks("yaml")[0].splitlines() if "my_package" not in line]
    for line in lines:
        setting = yaml.safe_load(line)["env"]
        config = EnvConfig(**setting) if isinstance(setting, dict) else EnvConfig(id=setting)
        validate_id(config.id)


def test_the_table_settings_on_the_page_work(tmp_path, monkeypatch):
    from opd.envs import make

    config = EnvConfig(**yaml.safe_load(blocks("yaml")[1])["env"])
    (tmp_path / "data").mkdir()
    rows = "".join(f'{{"question": "{i}?", "answer": {i}, "proof": "{i} is {i}"}}\n' for i in range(50))
    (tmp_path / "data" / "problems.jsonl").write_text(rows)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "rewards.py").write_text(
        "def is_short(completions):\n    return [len(completions[0]) < 9]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    env = make(config.id, config.kwargs)
    obs, info = env.reset(seed=0)
    number = obs.rstrip("?")
    assert info["privileged"] == {"solution": f"{number} is {number}"}
    assert env.step(number)[1] == pytest.approx(1.1)


def test_the_async_environment_on_the_page_looks_at_every_shelf_at_once_and_can_be_solved():
    [block] = [block for block in blocks("python") if "class LibraryEnv" in block]
    names: dict = {}
    exec(block, names)
    env = names["LibraryEnv"]()
    env.reset(seed=0)
    shelves = ["oak", "elm", "ash"]
    *_, info = env.step("".join(format_call("look", {"shelf": shelf}) for shelf in shelves))
    found = shelves[[message["content"] for message in info["messages"]].index("true")]
    _, reward, terminated, _, info = env.step(format_call("answer", {"shelf": found}))
    assert (reward, terminated, info["rewards"]) == (1.0, True, {"right": 1.0, "thrift": 0.0})
    env.close()


def test_every_format_on_the_page_is_read_as_it_is_shown():
    rows = re.findall(r"^\| `(\w+)`[^|]*\| (.*?) \| [^|]*\|$", PAGE.replace("\\|", "¦"), re.MULTILINE)
    shown = {name: text.replace("¦", "|") for name, text in rows if name in TOOL_FORMATS}
    assert set(shown) == set(TOOL_FORMATS)
    del shown["auto"]
    for name, text in shown.items():
        forms = [form for form in re.findall(r"`([^`]+)`", text) if "peek" in form]
        assert forms
        for form in forms:
            marked = f"[TOOL_CALLS]{form}" if name == "mistral" else form
            for tool_format in (name, "auto"):
                [call] = parse_tool_calls(marked, tool_format)
                assert (call.name, {key: int(value) for key, value in call.arguments.items()}) == (
                    "peek",
                    {"position": 0},
                )


def test_the_plain_format_on_the_page_is_what_the_prompt_says(make_chat):
    schema = {"type": "function", "function": {"name": "get", "description": "Get.", "parameters": {"type": "object"}}}
    chat = make_chat("no_tools")
    prompt = chat.tokenizer.decode(chat.start([{"role": "user", "content": "Go."}], [schema]))
    [quoted] = re.findall(r'after the words "(.*?)"', PAGE)
    assert quoted.replace("`", "") in prompt
