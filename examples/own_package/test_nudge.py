"""python -m pytest examples/own_package"""

from pathlib import Path

import opd
from opd.tracking import read_rows

FILE = Path(__file__).with_name("nudge.yaml")


def test_the_nudge_trains_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FILE.parent))
    small = {"train.tasks_per_step": 2, "eval.tasks": 2, "tracking.wandb": "disabled", "out": str(tmp_path / "run")}
    opd.train(opd.load_config(FILE, small | {"train.steps": 1}))
    opd.train(opd.load_config(tmp_path / "run", {"train.steps": 2}), resume=True)
    first, second = (row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row)
    assert 0 < first["train/loss"] != second["train/loss"]
    assert first["route/distill"] == 2
