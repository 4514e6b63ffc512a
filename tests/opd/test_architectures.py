"""The table of architectures in docs/models.md has the rows that `make models` would write.

Not covered: what the cells say, which takes minutes to find out.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("ci_architectures", ROOT / ".ci" / "architectures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_the_page_has_a_row_of_each_architecture(script):
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert len(script.ARCHITECTURES) >= 25
    assert script.rows_error(page) is None, "run `make models`"


def test_a_row_that_is_missing_or_renamed_is_told(script):
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if not line.startswith("| `mixtral`")]
    assert "mixtral" in script.rows_error("\n".join(rows))
    assert "columns" in script.rows_error(page.replace("| export equal |", "| export |"))


def test_an_error_is_told_in_a_cell_without_the_folder_that_was_made_for_it(script):
    assert script._why(ValueError("no | in '/tmp/x'. And more")) == "fails: ValueError: no \\| in ..."
