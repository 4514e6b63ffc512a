"""Files are whole or absent on a disk that fills up, and what it refuses is one error with the way on."""

import errno
import os

import pytest
from safetensors import SafetensorError

from opd import disk
from opd.disk import is_left_aside, told_of_the_disk, write_whole
from opd.errors import CheckpointError, DataError


def full(number=errno.ENOSPC):
    return OSError(number, os.strerror(number))


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "old \ud800")
    assert path.read_text() == "old ?"

    def no_room(_):
        raise full()

    monkeypatch.setattr(disk.os, "fsync", no_room)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old ?"


def test_a_file_has_the_rights_that_are_asked_for_and_takes_the_place_of_what_a_killed_run_left(tmp_path):
    (tmp_path / ".a.json.partial").write_text("half of it")
    assert is_left_aside(tmp_path / ".a.json.partial")
    assert not is_left_aside(tmp_path / "a.partial")
    write_whole(tmp_path / "a.json", "x", mode=0o600)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "error",
    [
        full(),
        full(errno.EROFS),
        full(errno.EDQUOT),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError(
            "[enforce fail at inline_container.cc:747] . open file failed with strerror: Read-only file system"
        ),
    ],
)
def test_whatever_says_that_the_disk_is_full_says_how_to_go_on(tmp_path, error):
    with (
        pytest.raises(CheckpointError, match=r"the disk of .* takes no more: .*--resume auto"),
        told_of_the_disk(tmp_path),
    ):
        raise error


@pytest.mark.parametrize(
    "error", [DataError("No space left on device"), OSError(errno.ENOENT, "gone"), ValueError("x")]
)
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)) as caught, told_of_the_disk(tmp_path):
        raise error
    assert caught.value is error
