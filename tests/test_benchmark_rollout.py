"""The benchmark of rollouts runs, and prints its one table."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_benchmark_of_rollouts_prints_one_table_of_all_loops():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "rollout.py"), "--quick"],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| ([a-zT][^|]*?) \| ([\d.]+) s \| ([\d.]+) \| ([\d.]+ s)? \| (\d+) \|$", done.stdout, re.M)
    assert [name for name, *_ in rows] == ["ours", "a barrier at each turn", "TRL's tool loop", "lower bound"]
    assert rows[0][2] == "1.00"
