"""The page of accidents: it holds them all, and each goes as it should. `.ci/accidents.py` does them and writes it."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def accidents():
    spec = importlib.util.spec_from_file_location("ci_accidents", ROOT / ".ci" / "accidents.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_the_page_has_a_row_for_each_accident_and_none_went_wrong(accidents):
    rows = [line for line in accidents.PAGE.read_text().splitlines() if line.startswith("| ")][2:]
    names = [row.split(" | ")[0].removeprefix("| ").replace("\\|", "|") for row in rows]
    assert names == [one.name for one in accidents.ACCIDENTS]  # a fault stands behind the name, in bold


@pytest.mark.long
@pytest.mark.timeout(3 * 3600)
def test_each_accident_goes_as_it_should(accidents, tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_CACHE", str(tmp_path / "cache"))
    rows, wrong = accidents.play([], tmp_path)
    accidents.PAGE.write_text(accidents.HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    assert wrong == {}
