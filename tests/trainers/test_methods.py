"""What holds for every method, and that the loop knows none of them."""

import importlib
import re
from pathlib import Path

import pytest

from opd.launch.checks.loading import load_config
from opd.trainers.loop.registry import METHODS, methods

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("trainers/loop", "opd/objective", "opd/engines", "opd/backends")
BLIND = {ROOT / "opd/teachers/teacher.py", *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))}
BLIND -= {ROOT / "trainers/loop/weighting.py", ROOT / "opd/objective/config.py"}  # they name a weighting's source


@pytest.mark.parametrize("path", sorted(BLIND), ids=lambda path: str(path.relative_to(ROOT)))
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
    assert f"`{name}`" in (ROOT / "README.md").read_text().partition("## Methods")[2].partition("## Install")[0]


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_says_fits_into_one_file_of_less_than_150_lines(name):
    """Of a folder it is the file that registers; the others are what its stages are made of."""
    path = ROOT / f"trainers/{name}.py"
    path = path if path.is_file() else ROOT / f"trainers/{name}/method.py"
    assert len(path.read_text().splitlines()) < 150


def test_the_record_of_numbers_has_every_method_on_one_process_and_with_zero(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    runs = importlib.import_module("short_runs")
    assert {case["method"] for case in runs.CASES.values()} == set(METHODS)
    assert {runs.CASES[name]["method"] for name in runs.ZERO} == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_the_example_of_a_method_uses_it_and_has_no_mistake(name):
    assert load_config(ROOT / f"examples/{name}.yaml", check_machine=False).method == name
