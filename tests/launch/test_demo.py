"""The demo: what it trains and reports on, what it keeps, what it shows; and, long, how its agents end."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from opd.launch.checks.loading import config_from
from opd.launch.cli import demo
from opd.launch.cli.demo_results import Outcome, draw, made_by, table
from opd.launch.run.score import Score
from opd.launch.tiny import definitions

GOOD, HALF = Score((True,) * 49 + (False,)), Score((True, False) * 25)


@pytest.mark.parametrize("run", ["opsd", "control"])
def test_a_run_is_not_reported_on_the_tasks_that_end_it(run, tmp_path):
    config = config_from(demo.settings(0, run, model="tiny:lookup", out=tmp_path / run))
    assert config.section.divergence.clip is None
    assert (config.section.privileged == "plan") == (run == "opsd")
    reported, checked = range(demo.TASKS), range(config.eval.first, config.eval.first + config.eval.tasks)
    assert not {*reported} & {*checked}
    assert (config.eval.stop_at, config.train.steps) == (0.99, 150)
    control = config_from(demo.settings(0, run, model="tiny:lookup", out=tmp_path / run, steps=70))
    assert (control.eval.stop_at, control.train.steps) == (None, 70)


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """A demo without models: `runs.call()` is its outcome, `runs.trained` the runs it trained, each with its steps."""
    trained, scores = [], {"opsd": GOOD, "control": HALF}

    def train(config, *, overwrite):
        name = Path(config.out).name
        if name in found.stops:
            raise KeyboardInterrupt
        trained.append((name, config.train.steps))
        return SimpleNamespace(interrupted=False, steps=70, out=Path(config.out))

    def reported(data, *, stage, model=None):
        name = Path(data["out"]).name
        if stage == 0:
            trained.append(("untrained", 0))
            plain = iter([found.before, GOOD])
            return SimpleNamespace(
                evaluate=lambda rewrite=None: (next(plain), []),
                method=SimpleNamespace(teacher_messages=None),
                close=lambda: None,
            )
        assert model == Path(data["out"]) / "export"
        return SimpleNamespace(evaluate=lambda: (scores[name], []), close=lambda: None)

    def call(model="tiny:lookup"):
        trained.clear()
        return demo._one_seed(Console(quiet=True), 0, Path(model), tmp_path / "seed-0")

    found = SimpleNamespace(call=call, trained=trained, stops=set(), before=HALF)
    monkeypatch.setattr(demo, "train", train)
    monkeypatch.setattr(demo, "_reported", reported)
    monkeypatch.setattr(demo, "_show_episode", lambda *_: "")
    monkeypatch.setattr(demo, "made_by", lambda model, settings: str(model))
    return found


def test_the_control_trains_for_as_many_steps_as_its_agent_took(runs):
    outcome = runs.call()
    assert runs.trained == [("untrained", 0), ("opsd", 150), ("control", 70)]
    assert outcome.scores == {"before": HALF, "teacher": GOOD, "opsd": GOOD, "control": HALF}


def test_what_is_finished_is_kept_and_not_run_again(runs, tmp_path):
    runs.stops = {"control"}
    with pytest.raises(KeyboardInterrupt):
        runs.call()
    assert runs.trained == [("untrained", 0), ("opsd", 150)]
    runs.stops = set()
    whole = runs.call()
    assert runs.trained == [("control", 70)]
    assert runs.call().scores == whole.scores
    assert runs.trained == []
    runs.call(model="tiny:lookup-expert")  # another model, or other code
    assert [name for name, _ in runs.trained] == ["untrained", "opsd", "control"]
    (tmp_path / "seed-0/outcome.json").write_text("{")
    runs.call()
    assert [name for name, _ in runs.trained] == ["untrained", "opsd", "control"]


def test_scores_are_of_their_code_their_model_and_their_settings(monkeypatch):
    code = ["a"]
    monkeypatch.setattr(definitions, "digest", lambda _: code[0])
    first = made_by(Path("x/lookup-1"), [{"seed": 0}])
    assert first == made_by(Path("y/lookup-1"), [{"seed": 0}])
    assert first != made_by(Path("x/lookup-2"), [{"seed": 0}])
    assert first != made_by(Path("x/lookup-1"), [{"seed": 1}])
    code[0] = "b"
    assert first != made_by(Path("x/lookup-1"), [{"seed": 0}])


def test_an_agent_that_is_good_before_training_has_nothing_to_show(runs):
    runs.before = GOOD
    with pytest.raises(demo.OpdError, match="solves 98% before training"):
        runs.call()
    assert runs.trained == [("untrained", 0)]


def test_the_table_and_the_picture_show_what_was_found(tmp_path):
    outcome = Outcome(3, tmp_path / "x.json", "", {"before": HALF, "teacher": GOOD, "opsd": GOOD, "control": HALF}, 70)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table([outcome], tasks=50))
    [row] = [line for line in console.export_text().splitlines() if "points" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:5] == ["3", "50.0% (37 to 63)", "98.0% (90 to 100)", "70", "98.0% (90 to 100)"]
    assert cells[6] == "50.0% (37 to 63)"
    for name in ("opsd", "control"):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "eval/success": 0.5 + step / 100, "eval/tasks": 200.0} for step in (0, 10, 20)]
        (tmp_path / name / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(tmp_path / "curves.png", tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def check(outcome):
    """An agent that ends above 95%, of a teacher that can teach, beside a control that ends where it began."""
    scores = outcome.scores
    assert scores["teacher"].rate >= 0.97
    assert 0.3 < scores["before"].rate < 0.65
    assert scores["opsd"].rate > 0.95
    assert abs(scores["control"].rate - scores["before"].rate) < 0.06


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_agent_ends_above_95_percent_and_its_control_where_it_began(tmp_path):
    for outcome in demo.demo(seeds=5, out=tmp_path):
        check(outcome)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_another_number_of_threads_ends_there_too(tmp_path, monkeypatch):
    def settings(*arguments, **options):
        data = real(*arguments, **options)
        return data | {"train": data["train"] | {"threads": 2}}

    real = demo.settings
    monkeypatch.setattr(demo, "settings", settings)
    for outcome in demo.demo(seeds=2, out=tmp_path):
        check(outcome)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_narrower_vectors_end_there_too_from_a_warm_start_of_their_own(tmp_path):
    narrow = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OPD_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "opd.launch.cli", "demo", "--seeds", "2", "--out", str(tmp_path / "demo")]
    subprocess.run(command, env=os.environ | narrow, check=True)
    for seed in range(2):
        path = tmp_path / f"demo/seed-{seed}/outcome.json"
        check(Outcome.kept(seed, path, json.loads(path.read_text())["made_by"]))
