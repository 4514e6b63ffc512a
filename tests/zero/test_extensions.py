"""Every installation compiles in a folder of its own; what a killed compiler left there is said and deleted."""

import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import _get_build_directory

from opd.ranks.extensions import own_folder, prepare, settle

pytestmark = pytest.mark.slow

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
FileBaton(sys.argv[1]).try_acquire()
print(flush=True)
time.sleep(99)
"""


@pytest.fixture
def lock(tmp_path):
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    return folder / "lock"


def age(lock, seconds):
    for path in lock.parent.iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


@contextmanager
def held_elsewhere(lock):
    """Within it, a process holds the lock as torch's compilation does; then it is killed."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        yield
        holder.kill()


def test_what_a_killed_process_left_is_deleted_and_said(lock, tmp_path, capsys):
    with held_elsewhere(lock):
        pass
    age(lock, 1000)
    settle(tmp_path, first=True)
    assert not lock.exists()
    assert f"deleted {lock}, which a process left that was killed" in capsys.readouterr().err


def test_a_lock_of_a_living_process_is_left_alone_however_old(lock, tmp_path, capsys):
    with held_elsewhere(lock):
        age(lock, 1000)
        settle(tmp_path, first=True)  # torch waits for it
    assert lock.exists()
    assert capsys.readouterr().err == ""


def test_a_fresh_lock_that_nobody_here_holds_is_waited_for_and_said_once(lock, tmp_path, capsys):
    lock.touch()
    (lock.parent / "shm.o").touch()
    age(lock, 1000)
    os.utime(lock.parent / "shm.o")  # somebody still compiles
    threading.Timer(2.5, lock.unlink).start()
    since = time.monotonic()
    settle(tmp_path, first=True)
    assert time.monotonic() - since > 2
    said = capsys.readouterr().err
    assert said.count(f"waiting for {lock}") == 1
    assert "delete it" in said
    assert "deleted" not in said


def test_other_ranks_wait_for_the_first_to_delete_it(lock, tmp_path, capsys):
    lock.touch()
    age(lock, 1000)
    other = threading.Thread(target=settle, args=[tmp_path], kwargs={"first": False})
    other.start()
    other.join(1.5)
    assert other.is_alive()
    assert lock.exists()
    settle(tmp_path, first=True)
    other.join(10)
    assert not other.is_alive()


def test_locks_are_looked_for_where_torch_makes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = Path(_get_build_directory("fused_adam", verbose=False)) / "lock"
    lock.touch()
    age(lock, 1000)
    prepare(first=True)
    assert not lock.exists()
    assert "DeepSpeed compiles a part of itself" in capsys.readouterr().err


def test_another_version_of_torch_compiles_elsewhere_and_the_users_own_folder_counts(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    one = own_folder()
    assert one == own_folder()
    assert tmp_path in one.parents
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    assert own_folder() != one
    prepare(first=False)
    assert os.environ["TORCH_EXTENSIONS_DIR"] == str(own_folder())
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/ours")
    prepare(first=False)
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/ours"
