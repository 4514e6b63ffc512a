"""What environments in threads do to the process that they share with the run, for real.

Not covered: what no process survives (`os._exit`, a crash); `test_processes.py` has that. Each of these was seen to
end a run, to move its folder or to leave its mark before there was a `Standing`.
"""

import gc
import logging
import os
import sys
import threading
import time
import warnings

import pytest
import torch

from opd.addressing import load
from opd.standing import Standing

CHANGES = {
    "os.chdir": lambda: os.chdir("/"),
    "os.umask": lambda: os.umask(0o777),
    "sys.stdout": lambda: setattr(sys, "stdout", object()),
    "sys.stderr": lambda: setattr(sys, "stderr", None),
    "threading.excepthook": lambda: setattr(threading, "excepthook", None),
    "sys.setrecursionlimit": lambda: sys.setrecursionlimit(900),
    "logging.disable": lambda: logging.disable(logging.CRITICAL),
    "gc.disable": gc.disable,
    "warnings.simplefilter": lambda: warnings.simplefilter("error", BytesWarning),
    "torch.set_default_dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch.use_deterministic_algorithms": lambda: torch.use_deterministic_algorithms(True),
    "torch.set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("medium"),
}


def standing():
    """What the changes change, read without our code."""
    mask = os.umask(0o022)
    os.umask(mask)
    return [
        os.getcwd(), mask, sys.stdout, sys.stderr, threading.excepthook, sys.getrecursionlimit(),
        logging.root.manager.disable, gc.isenabled(), warnings.filters[0], torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
    ]  # fmt: skip


def test_what_environments_in_threads_change_of_the_process_is_put_back_and_told_once(play, scripted_env, caplog):
    before = standing()

    def change(env, action):
        for one in CHANGES.values():
            one()
        return "", 1.0, True, False, {}

    groups = play(lambda: scripted_env(change), tasks=3)
    assert standing() == before
    assert [t.failed for group in groups for t in group.trajectories] == [None] * 3
    told = [record.getMessage() for record in caplog.records if "all of the run shares" in record.getMessage()]
    assert len(told) == 1
    assert [name for name in CHANGES if name not in told[0]] == []
    assert "env.workers: processes" in told[0]


def test_an_environment_that_draws_and_counts_as_it_likes_moves_no_bit_of_the_others(play, scripted_env):
    def change(env, action):
        torch.manual_seed(7)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        return f"{env.turn}", 1.0, env.turn == 3, False, {}

    def quiet(env, action):
        return f"{env.turn}", 1.0, env.turn == 3, False, {}

    loud, plain = (
        [t.turns for group in play(lambda how=how: scripted_env(how), tasks=4) for t in group.trajectories]
        for how in (change, quiet)
    )
    assert loud == plain
    assert torch.is_grad_enabled()


def test_a_step_that_is_still_at_work_keeps_the_folder_that_it_chose(play, scripted_env, tmp_path):
    """The quick one ends while the slow one reads by a relative name."""
    (tmp_path / "table.txt").write_text("x")

    def enter(env, action):
        os.chdir(tmp_path)
        time.sleep(0.3 if env.seed % 2 else 0.0)
        with open("table.txt") as file:
            return file.read(), 1.0, True, False, {}

    groups = play(lambda: scripted_env(enter), tasks=4)
    assert [t.failed for group in groups for t in group.trajectories] == [None] * 4
    assert os.getcwd() != str(tmp_path)


def test_a_descriptor_of_the_console_that_was_closed_is_opened_before_a_file_gets_its_number(tmp_path):
    read, write = os.pipe()  # in place of the console's, which this test must not close
    saved = os.dup(0)
    os.dup2(read, 0)
    before = Standing()
    try:
        os.close(0)
        assert before.restore() == ["file descriptor 0"]
        assert os.path.samestat(os.fstat(0), os.fstat(read))
        assert before.restore() == []
    finally:
        before.close()
        os.dup2(saved, 0)
        for number in (read, write, saved):
            os.close(number)


def test_a_stream_that_was_closed_is_opened_again(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", open(os.dup(1), "w"))  # noqa: SIM115
        before = Standing()
        sys.stdout.close()
        assert before.restore() == ["sys.stdout (closed)"]
        before.close()
        assert sys.stdout.writable()
        assert sys.stdout.fileno() == 1


def test_a_module_that_leaves_the_folder_while_it_is_imported_does_not_take_the_run_along(
    tmp_path, monkeypatch, caplog
):
    (tmp_path / "leaves.py").write_text("import os\nos.chdir('/')\nvalue = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    here = os.getcwd()
    assert load("leaves:value", setting="method") == 3
    assert os.getcwd() == here
    assert "the module 'leaves' changed the current folder (os.chdir)" in caplog.text


@pytest.mark.parametrize("child", ["raises", "returns"])
def test_a_process_that_an_environment_forks_does_not_go_on_as_a_second_run(play, scripted_env, tmp_path, child):
    """It would wait for the next call for ever, and the environment for it."""

    def forks(env, action):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: there are threads
            pid = os.fork()
        if pid == 0 and child == "raises":
            raise ValueError("in the child")
        status = os.waitpid(pid, 0)[1] if pid else 0
        return str(os.waitstatus_to_exitcode(status)), 1.0, True, False, {"feedback": str(status)}

    [group] = play(lambda: scripted_env(forks), tasks=1)
    assert group.trajectories[0].failed is None
    assert os.waitstatus_to_exitcode(int(group.trajectories[0].turns[-1].feedback)) == 1
