"""What holds for every method, and that the loop knows none of them."""

import re
from pathlib import Path

import pytest

from opd.launch.checks.loading import load_config
from opd.trainers.loop.registry import METHODS, methods

ROOT = Path(__file__).resolve().parents[2]
BLIND = [
    ROOT / "trainers/loop/loop.py",
    ROOT / "trainers/loop/metrics.py",
    ROOT / "opd/objective/objective.py",
    ROOT / "opd/teachers/teacher.py",
]
BLIND += sorted((ROOT / "opd/engines").glob("*.py")) + sorted((ROOT / "opd/backends").glob("*.py"))


@pytest.mark.parametrize("path", BLIND, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_method_is_named(path):
    # `opd` is also the package, so that name alone is looked for in quotes.
    words = [f'"{name}"' if name == "opd" else name for name in METHODS]
    text = path.read_text()
    assert [word for word in words if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)] == []


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_summary_an_example_and_a_line_of_documentation(name):
    assert methods()[name].summary
    assert (ROOT / f"examples/{name}.yaml").is_file()
    assert f"| `{name}` |" in (ROOT / "docs/methods.md").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_the_example_of_a_method_uses_it_and_has_no_mistake(name):
    assert load_config(ROOT / f"examples/{name}.yaml", check_machine=False).method == name
