"""What docs/environments.md shows is what stands in the repository, and runs."""

import re
from pathlib import Path

import pytest
import yaml

from opd.config import EnvConfig
from opd.envs import validate_id

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


@pytest.mark.parametrize("name", ["exact_match", "contains_answer", "number_match", "code_tests"])
def test_the_built_in_rewards_on_the_page_exist(name):
    from opd.rewards import BUILT_IN

    assert f"`{name}`" in PAGE
    assert set(BUILT_IN) == {"exact_match", "contains_answer", "number_match", "code_tests"}
