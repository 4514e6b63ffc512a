"""Tests of examples train, so that `make quick` leaves them out, and what they register is forgotten after each."""

import sys
from pathlib import Path

import pytest

from opd.maths import formulas
from opd.trainers.loop import registry

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    known = set(sys.modules)
    monkeypatch.setattr(formulas, "_TABLE", dict(formulas._TABLE))
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    yield
    for name in {"nudge"} - known:
        sys.modules.pop(name, None)
