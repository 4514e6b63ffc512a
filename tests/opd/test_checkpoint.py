"""Checkpoints are whole or absent, whatever happens to the disk, to their files, or to the process that writes them."""

import errno
import json
import os
from hashlib import sha256

import pytest
import torch
from safetensors import SafetensorError

from opd import checkpoint
from opd.checkpoint import Checkpoint, FormatError, latest, rotate, save, sweep
from opd.errors import CheckpointError


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


def saved(root, step, *parts):
    save(root / f"step-{step}", parts=parts, records={"run": {"step": step}, "method": {}})
    return root / f"step-{step}"


def names(root):
    return sorted(os.listdir(root))


def rewrite(folder, manifest):
    (folder / "manifest.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))


def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def torch_on_a_full_disk(folder):
    torch.save(torch.zeros(9), folder / "half.pt")
    raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 448 vs 342")


def safetensors_on_a_full_disk(folder):
    (folder / "half.safetensors").write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def mistaken(_):
    raise TypeError("cannot pickle '_thread.lock' object")


@pytest.mark.parametrize("part", [full, torch_on_a_full_disk, safetensors_on_a_full_disk, mistaken])
def test_whatever_goes_wrong_in_a_save_is_one_error_and_leaves_the_good_ones_alone(root, part):
    saved(root, 1)
    with pytest.raises(CheckpointError, match=r"could not write .*step-2: .* are free there.*--resume") as caught:
        saved(root, 2, part)
    assert caught.value.__cause__ is not None
    assert names(root) == ["step-1"]
    assert latest(root).folder.name == "step-1"


def test_a_disk_too_small_for_another_checkpoint_is_found_before_one_is_begun(root, monkeypatch):
    saved(root, 1, lambda folder: (folder / "weights").write_bytes(bytes(5_000_000)))
    usage = checkpoint.shutil.disk_usage(root)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=4_999_999))
    with pytest.raises(CheckpointError, match=r"step-1 took 5 MB, and the disk of .* has 5 MB free"):
        saved(root, 2, lambda folder: pytest.fail("it was begun"))
    assert names(root) == ["step-1"]


def test_a_checkpoint_of_another_format_is_refused_and_not_passed_over(root):
    saved(root, 1)
    folder = saved(root, 2)
    manifest = json.loads((folder / "manifest.json").read_text())
    rewrite(folder, manifest | {"format": 2})
    with pytest.raises(FormatError, match=r"step-2 is of format 2, and this version of opd reads format 1"):
        latest(root)


@pytest.mark.parametrize(
    "manifest",
    [
        "[" * 100_000,
        b"\xff\xfe".decode("latin-1"),
        '{"format": 1}',
        '{"files": {"run.json": {"bytes": 2, "sha256": "x"}}}',
        '{"format": 1, "files": {"run.json": 3}}',
        '{"format": 1, "files": {"run.json": [["bytes", 2]]}}',
        '{"format": 1, "files": ["run.json"]}',
        '{"format": 1, "files": {"\\u0000": {}}}',
        '{"format": 1, "files": {".": {}}}',
    ],
)
def test_a_manifest_of_any_other_shape_is_damage_and_the_older_one_is_taken(root, caplog, manifest):
    saved(root, 1)
    rewrite(saved(root, 2), manifest)
    assert latest(root).folder.name == "step-1"
    assert "step-2" in caplog.text
    assert "Going on from the older step-1" in caplog.text


def test_a_manifest_names_no_file_outside_of_its_folder(root, tmp_path):
    (tmp_path / "other").write_text("x")
    saved(root, 1)
    known = {"bytes": 1, "sha256": sha256(b"x").hexdigest()}
    for name in ("../../other", str(tmp_path / "other")):
        rewrite(saved(root, 2), {"format": 1, "files": {name: known}})
        assert latest(root).folder.name == "step-1"


def test_a_record_that_its_reader_does_not_know_is_damage_too(root):
    saved(root, 1)
    saved(root, 2)

    def check(found):
        if found.record("run")["step"] == 2:
            raise CheckpointError("of another shape")

    assert latest(root, check=check).folder.name == "step-1"
    with pytest.raises(CheckpointError, match=r"its absent\.json cannot be read"):
        Checkpoint(root / "step-1").record("absent")


def test_leftovers_of_a_killed_run_are_swept_and_do_not_stop_the_next_rotation(root):
    for step in (1, 2, 3):
        saved(root, step)
    for left in (".step-1.deleted", ".step-9.partial"):
        (root / left / "deep").mkdir(parents=True)
    rotate(root, 2)
    assert names(root) == [".step-9.partial", "step-2", "step-3"]
    sweep(root)
    assert names(root) == ["step-2", "step-3"]


def test_too_many_open_files_are_told_from_a_full_disk(tmp_path):
    def opens(folder):
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(CheckpointError, match=r"Too many open files: .*env\.workers: processes"):
        save(tmp_path / "step-1", parts=[opens], records={})
