"""The examples on docs/rewards.md run, and the page leaves out no built-in reward."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from opd.rewards import BUILT_IN, Rubric
from opd.tool_calls import valid_tool_calls

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
YAML = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def my_rewards(monkeypatch):
    """Make the functions on the page importable as the module that its settings name."""
    module = ModuleType("my_rewards")
    exec(PYTHON[0], module.__dict__)
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    return module


def test_the_functions_on_the_page_score(my_rewards):
    rubric = Rubric([my_rewards.is_short, my_rewards.judged])
    scores = rubric.score_batch(["q", "q"], ["Paris", "x" * 300], {"answer": ["Paris", ""]})
    assert [score.parts for score in scores] == [{"is_short": 1.0, "judged": 1.0}, {"is_short": 0.0, "judged": None}]
    rubric.close()


@pytest.mark.parametrize("document", [part for block in YAML for part in block.split("---\n")])
def test_the_settings_on_the_page_are_rubrics(my_rewards, document):
    rubric = Rubric(yaml.safe_load(document)["rewards"])
    rubric.require(["answer"])
    score = rubric.score("1+1?", "<think>2</think><answer>2</answer>", {"answer": "2"})
    assert list(score.parts) == rubric.names


def test_the_table_on_the_page_lists_every_built_in_reward():
    listed = re.findall(r"^\| `([\w.:]+)` \|", PAGE, re.MULTILINE)
    assert [name for name in listed if ":" not in name] == list(BUILT_IN)
    assert [name for name in listed if ":" in name] == [f"{valid_tool_calls.__module__}:{valid_tool_calls.__name__}"]


def test_the_environment_on_the_page_works():
    names: dict = {}
    exec(PYTHON[1], names)
    env = names["CapitalsEnv"]()
    env.reset(seed=0)
    _, reward, terminated, _, info = env.step("The city of Paris.")
    assert (reward, terminated, info["success"]) == (2.0, True, True)
    assert info["rewards"] == {"normalized_match": 1.0, "brief": 1.0}
