"""The benchmark of divergences measures what it says: with the kernel, or without it."""

import importlib.util
import sys
from pathlib import Path

import pytest

from opd.maths import divergence_tiles

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "divergence.py"


@pytest.mark.parametrize("options", [[], ["--plain"]])
def test_plain_switches_the_kernel_off_and_nothing_else_does(monkeypatch, options):
    spec = importlib.util.spec_from_file_location("benchmark_divergence", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    seen = []
    monkeypatch.setattr(module, "report", lambda _: seen.append(divergence_tiles.KERNEL))
    monkeypatch.setattr(divergence_tiles, "KERNEL", True)
    monkeypatch.setattr(sys, "argv", ["divergence.py", *options])
    module.main()
    assert seen == [not options]
