"""What a run puts on its disk, as the plan tells it and as real runs wrote it."""

import json
import shutil
from types import SimpleNamespace

import pytest

from opd.errors import CheckpointError
from opd.launch.checks.loading import config_from
from opd.launch.cli.main import main
from opd.launch.plan.memory import known_size
from opd.launch.plan.plan import plan
from opd.launch.plan.storage import Storage, count_sizes, sizes_of, storage
from opd.launch.train import train

GOOD = {"method": "opsd", "model": "smollm2", "env": "opd/Lookup-v0"}
P = 134_515_008


def with_room(monkeypatch, free):
    monkeypatch.setattr("opd.disk.shutil.disk_usage", lambda _: SimpleNamespace(free=free))


@pytest.mark.parametrize(
    ("changed", "dtype", "sizes"),
    [  # weights, optimiser, teacher of a checkpoint, and an export
        ({}, "float32", [4 * P, 8 * P, 4 * P, 4 * P]),
        ({"opsd": {"teacher": {"weights": "live"}}}, "float32", [4 * P, 8 * P, 4 * P]),
        ({}, "bfloat16", [2 * P, 12 * P, 2 * P, 2 * P]),
        ({"opsd": {"teacher": {"weights": "ema", "rate": 0.1}}}, "bfloat16", [2 * P, 12 * P, 4 * P, 2 * P]),
        ({"backend": "deepspeed", "deepspeed": "zero3"}, "bfloat16", [2 * P, 12 * P, 2 * P, 2 * P]),
        ({"backend": "deepspeed", "deepspeed": {}}, "float32", [4 * P, 8 * P, 4 * P, 4 * P]),
    ],
)
def test_a_checkpoint_and_an_export_are_counted_by_hand(changed, dtype, sizes):
    counted = count_sizes(config_from(GOOD | changed, check_machine=False), trained=P, whole=P, dtype=dtype)
    assert [*(part.bytes for part in counted.parts), counted.export] == sizes


def test_adapters_are_saved_in_float32_and_exported_with_the_whole_model():
    config = config_from(GOOD | {"model": {"name": "smollm2", "lora": {}}}, check_machine=False)
    counted = count_sizes(config, trained=1000, whole=P, dtype="bfloat16")
    assert [*(part.bytes for part in counted.parts), counted.export] == [4000, 8000, 4000, 2 * P]


def told(free=10**12, seconds=1.0, **changed):
    config = config_from(GOOD | changed, check_machine=False)
    sizes = count_sizes(config, trained=10**9, whole=10**9, dtype="float32")
    return Storage(sizes=sizes, free=free, seconds=seconds, measured="by a test"), config


def test_the_plan_tells_size_number_room_and_the_time_of_a_save():
    found, config = told(train={"keep_last": 3, "keep_best": True})
    assert found.rows(config) == [
        (
            "checkpoints",
            "16 GB each (weights 4 GB, optimiser 8 GB, teacher 4 GB), at most 5 at once, and 1 export of 4 GB; "
            "1 TB free",
        ),
        ("a save", "about 1 s (by a test), of train.stop_grace = 30 s"),
    ]
    assert found.notes(config) == []


@pytest.mark.parametrize(("seconds", "grace", "warns"), [(24, 30, False), (26, 30, True), (26, 600, False)])
def test_a_save_that_takes_longer_than_a_scheduler_waits_is_warned_of_with_the_mend(seconds, grace, warns):
    found, config = told(seconds=seconds, train={"stop_grace": grace})
    notes = found.notes(config)
    assert len(notes) == warns
    if warns:
        assert notes[0].startswith("a save takes about 26 s and begins up to 5 s after a signal")
        assert "train.stop_grace = 30 s would kill it in its save. Ask for an earlier signal (SLURM: " in notes[0]
        assert "--signal=TERM@60; Kubernetes: terminationGracePeriodSeconds) and set train.stop_grace" in notes[0]


def test_room_for_fewer_checkpoints_than_are_kept_is_noted():
    found, config = told(free=40 * 10**9)
    assert found.notes(config) == [
        "all that the run keeps takes 52 GB, and the disk has 40 GB free: make room, or lower train.keep_last = 2"
    ]


def test_the_time_of_a_save_is_that_of_the_run_s_last_one_or_measured_there(tmp_path):
    config = config_from(GOOD, check_machine=False)
    out = tmp_path / "not" / "yet"
    found = storage(config, out, gpu=False)
    assert found.measured == "measured by writing there for a moment"
    assert 0 < found.seconds < 1000
    assert list(tmp_path.iterdir()) == []
    out.mkdir(parents=True)
    rows = [{"step": 1, "time/save": 7.5}, {"step": 2, "time/save": 8.5}, {"step": 3}]
    (out / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = storage(config, out, gpu=False)
    assert (found.seconds, found.measured) == (8.5, "as the run's last one took")
    unknown = storage(config_from(GOOD | {"model": "tiny:lookup"}, check_machine=False), tmp_path, gpu=False)
    assert (unknown.sizes, unknown.seconds) == (None, None)
    assert unknown.rows(config)[0][1].startswith("size not known before the model is loaded; ")


def test_a_run_whose_first_checkpoint_or_export_has_no_room_is_refused_before_a_model_is_loaded(
    tmp_path, monkeypatch, capsys
):
    with_room(monkeypatch, 19 * P)  # a checkpoint of 16, an export of 4
    monkeypatch.setattr("opd.launch.run.training.build", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "run.yaml").write_text(json.dumps(GOOD))
    command = ["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]
    message = (
        f"error: out = '{tmp_path / 'run'}': its disk has 2.56 GB free, but the first checkpoint of the run takes 2.15 "
        "GB and the export at its end 538 MB. Make room, or choose another folder (--out DIR)\n"
    )
    assert main([*command, "--dry-run"]) == 2
    assert capsys.readouterr().err == message
    with pytest.raises(CheckpointError, match=r"its disk has 2\.56 GB free, but the first checkpoint"):
        train(GOOD | {"out": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()
    with_room(monkeypatch, 21 * P)
    assert main([*command, "--dry-run"]) == 0


@pytest.mark.slow
def test_what_a_run_saves_is_as_large_as_the_plan_tells(settings, tmp_path, monkeypatch):
    data = settings("run", train={"steps": 1, "tasks_per_step": 2})
    config = config_from(data)
    counted = sizes_of(config, known_size(config.model.name), gpu=False)
    monkeypatch.setattr("opd.launch.run.training.check_room_before_loading", lambda *_: None)
    loaded = []
    monkeypatch.setattr("opd.launch.run.training.check_room_at_first", lambda *found: loaded.append(found[2]))
    train(data)
    assert loaded == [counted]
    saved = tmp_path / "run/checkpoints/step-1"
    assert sum(path.stat().st_size for path in saved.iterdir()) == pytest.approx(counted.checkpoint, rel=0.02)
    export = (tmp_path / "run/export/model.safetensors").stat().st_size
    assert export == pytest.approx(counted.export, rel=0.02)
    made = plan(config, tmp_path / "run", gpu=False, disk=True)
    assert "checkpoints" in dict(made.rows())
    shutil.rmtree(tmp_path / "run")
    monkeypatch.undo()
    with_room(monkeypatch, counted.checkpoint)
    with pytest.raises(CheckpointError, match=r"the first checkpoint of the run takes .* and the export at its end"):
        train(data)
