"""Tests of examples train: `make quick` leaves them out."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        if "examples" in item.path.parts:
            item.add_marker(pytest.mark.slow)
