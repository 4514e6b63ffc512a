"""The benchmarks of Lightning OPD and of vOPD run, print a row for each arm, and do nothing twice."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def models(tiny_model):
    return tiny_model(), tiny_model("lookup-expert", steps=30)


@pytest.fixture
def main(models, tmp_path, monkeypatch):
    """`main(name, *arguments)`: a benchmark on hardly trained models, a few steps long."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        common = ["--student", models[0], "--teacher", models[1], "--out", tmp_path / name, "--seeds", "0"]
        monkeypatch.setattr(sys, "argv", [name, *map(str, common), "--steps", "2", "--eval", "4", *arguments])
        module.main()

    return run


def rows(text):
    return [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines() if line[:1] == "|"]


@pytest.mark.long
def test_lightning_has_a_row_for_each_arm_and_its_seconds(main, monkeypatch, capsys):
    arguments = ("--sft-steps", "1", "--sft-tasks", "4", "--tasks", "6")
    main("lightning", *arguments)
    _, _, *found = rows(capsys.readouterr().out)
    arms = ["sampled token", "at most 1 nat", "top 20"]
    assert [row[0] for row in found] == ["after the SFT"] + [
        f"{who}, {a}" for a in arms for who in ("online", "Lightning")
    ]
    online, stored = found[1], found[2]
    assert float(online[1]) > 0 == float(stored[1])  # seconds of rollouts in the steps
    assert all(float(row[7]) > 0 for row in found)
    monkeypatch.setattr("opd.launch.train.train", lambda _: pytest.fail("a run that had finished was run again"))
    main("lightning", *arguments)
    assert [row[7] for row in rows(capsys.readouterr().out)[2:]] == [row[7] for row in found]


@pytest.mark.long
def test_vopd_tells_the_variance_of_each_loss_and_draws_it(main, tmp_path, capsys):
    main("vopd", "--every", "2")
    _, _, *found = rows(capsys.readouterr().out)
    assert [row[0] for row in found] == ["no baseline", "top 20 baseline", "full baseline (vOPD)", "full vocabulary"]
    assert found[0][3] == "100%"
    assert found[3][1:4] == ["0", "0", "0"]
    assert (tmp_path / "vopd" / "variance.png").stat().st_size > 10_000
