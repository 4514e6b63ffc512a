"""Who holds a run's folder. Not covered: two machines whose disk passes no locks on (its rule is tested alone)."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opd.errors import ConfigError, LockError
from opd.launch.cli.demo import demo
from opd.launch.run import lock
from opd.launch.run.lock import NAME, RunLock, check_free
from opd.launch.run.out import choose
from opd.launch.settings.reader import RUN_MARK

HOLD = "import sys; from pathlib import Path; from opd.launch.run.lock import RunLock; RunLock(Path(sys.argv[1])); "


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds, and that process."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD + "print('held', flush=True); sys.stdin.read()", str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield folder, process
    process.kill()
    process.communicate()


def left_by(folder: Path, **owner):
    """A lock file of an owner that is gone, or lives elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = {"host": socket.gethostname(), "pid": 1, "started": "2026-01-02T03:04:05+00:00"} | owner
    (folder / NAME).write_text(json.dumps(owner))
    return folder / NAME


def is_free(folder: Path) -> bool:
    """Whether the lock can be taken, names this process then, and is gone once it is released."""
    own = RunLock(folder)
    named = json.loads(own.path.read_text())["pid"]
    own.release()
    return named == os.getpid() and not own.path.exists()


def test_a_folder_that_another_process_holds_is_refused_by_its_name(held):
    folder, process = held
    for attempt in (RunLock, check_free):
        with pytest.raises(LockError, match=rf"run is in use by process {process.pid} on {socket.gethostname()}, star"):
            attempt(folder)


def test_a_lock_ends_with_the_process_that_held_it_and_its_breaking_is_told(held, capfd):
    folder, process = held
    process.kill()
    process.wait()
    check_free(folder)
    (folder / "config.yaml").write_text(RUN_MARK)
    how = (
        rf"process {process.pid} on {socket.gethostname()}, started \S+ ended without a word: .*env\.workers: processes"
    )
    with pytest.raises(ConfigError, match=f"already holds a run.* Its {how}"):
        choose(str(folder), "any", resume=False, overwrite=False)
    own = RunLock(folder)
    assert re.search(f"{how}.*this one takes over", capfd.readouterr().err)
    assert json.loads((folder / NAME).read_text())["pid"] == os.getpid()
    own.release()


def test_a_lock_is_held_once_in_one_process_too(tmp_path):
    own = RunLock(tmp_path)
    with pytest.raises(LockError, match=f"in use by process {os.getpid()}"):
        RunLock(tmp_path)
    own.release()
    assert is_free(tmp_path)


def test_a_released_lock_leaves_nothing_behind(tmp_path, capfd):
    own = RunLock(tmp_path / "new")
    own.release()
    own.release()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    RunLock(tmp_path / "old").release()
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]
    assert capfd.readouterr().err == ""


def test_a_child_that_outlives_its_parent_does_not_keep_the_folder(tmp_path):
    code = HOLD + "import os, time; pid = os.fork(); time.sleep(0 if pid else 30)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert is_free(tmp_path)


def test_an_owner_on_another_machine_counts_as_alive_until_it_is_silent_for_long(tmp_path):
    path = left_by(tmp_path, host="elsewhere", pid=7)
    with pytest.raises(
        LockError, match=r"process 7 on elsewhere, started 2026-01-02T03:04:05.*If it has ended, delete"
    ):
        RunLock(tmp_path)
    old = time.time() - lock.SILENT - 5
    os.utime(path, (old, old))
    assert is_free(tmp_path)


def test_a_living_owner_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    own = RunLock(tmp_path)
    os.utime(own.path, (1, 1))
    until = time.monotonic() + 60
    while own.path.stat().st_mtime == 1:
        assert time.monotonic() < until
        time.sleep(0.01)
    own.release()


def test_on_a_disk_without_locks_the_process_number_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_flock", lambda descriptor: None)
    left_by(tmp_path, pid=os.getpid())
    with pytest.raises(LockError, match=f"process {os.getpid()}"):
        RunLock(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left_by(tmp_path, pid=ended.pid)
    assert is_free(tmp_path)


def test_a_file_that_nobody_finished_is_no_owner(tmp_path):
    (tmp_path / NAME).write_text('{"host": "a')
    assert is_free(tmp_path)
    (tmp_path / NAME).write_text('["a list"]')
    assert is_free(tmp_path)


def test_on_a_disk_without_locks_a_number_that_another_process_has_now_counts_for_no_more_than_the_files_age(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(lock, "_flock", lambda descriptor: None)
    path = left_by(tmp_path, pid=os.getpid())  # ours, as in a container that was started anew
    old = time.time() - lock.SILENT - 5
    os.utime(path, (old, old))
    assert is_free(tmp_path)


def test_who_was_taken_for_dead_and_is_not_sees_that_the_folder_is_anothers(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_flock", lambda descriptor: None)
    own = RunLock(tmp_path)
    old = time.time() - lock.SILENT - 5
    os.utime(own.path, (old, old))
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    other = RunLock(tmp_path)
    with pytest.raises(LockError, match="was taken over by process"):
        own.check()
    own.release()
    other.check()
    assert json.loads((tmp_path / NAME).read_text())["host"] == "elsewhere"
    other.release()


@pytest.mark.parametrize("what", ["folder", "pipe", "link to nothing"])
def test_what_is_no_file_is_no_lock_and_nobody_waits_for_it(tmp_path, what):
    path = tmp_path / NAME
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / "a/b")
    for attempt in (RunLock, check_free):
        with pytest.raises(LockError, match=r"run\.lock cannot be used as a lock: .* Delete it"):
            attempt(tmp_path)


def test_a_disk_that_takes_nothing_is_told_and_nothing_stays_there(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); "
    command = [sys.executable, "-c", limit + HOLD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    assert "LockError" in done.stderr.splitlines()[-1]
    assert "run.lock cannot be written: [Errno 27] File too large. Make room" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_owner_of_wrong_types_is_none(tmp_path):
    (tmp_path / NAME).write_text('{"host": 5, "pid": "x", "started": null}')
    assert is_free(tmp_path)


def test_a_lock_that_alone_was_deleted_is_made_anew(tmp_path):
    own = RunLock(tmp_path)
    own.path.unlink()
    own.check()
    with pytest.raises(LockError, match=f"in use by process {os.getpid()}"):
        RunLock(tmp_path)
    own.release()
    assert not own.path.exists()


def test_a_folder_that_is_moved_while_its_run_lives_is_told_as_that(tmp_path):
    own = RunLock(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "other")
    with pytest.raises(LockError, match=r"run is gone: it was moved or deleted while its run was alive"):
        own.check()
    own.release()


def test_a_folder_that_another_took_the_place_of_while_its_run_lives_is_told_as_gone(tmp_path):
    lock = RunLock(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    with pytest.raises(LockError, match="is gone: it was moved or deleted while its run was alive"):
        lock.check()
    lock.release()
    assert not any((tmp_path / "run").iterdir())


def test_a_lock_whose_descriptor_somebody_in_the_process_closed_is_an_error_that_says_so(tmp_path):
    lock = RunLock(tmp_path / "run")
    os.close(lock._descriptor)
    with pytest.raises(LockError, match=r"closed by something in this process.*env\.workers: processes"):
        lock.check()
    lock.release()


def test_a_second_demo_in_the_folder_of_the_first_touches_nothing(held):
    folder, process = held
    with pytest.raises(LockError, match=f"process {process.pid}"):
        demo(seeds=1, out=folder)
    assert [path.name for path in folder.iterdir()] == [NAME]


def test_who_lost_the_folder_to_another_is_told_before_it_writes(tmp_path):
    own = RunLock(tmp_path)
    own.check()
    own.path.unlink()
    left_by(tmp_path, host="elsewhere")
    with pytest.raises(LockError, match=r"was taken over by process 1 on elsewhere"):
        own.check()
    own.release()
    assert (tmp_path / NAME).exists()
