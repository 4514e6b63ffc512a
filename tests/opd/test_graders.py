"""Graders in locked processes: what text can do there, and what becomes of calls that hang, die or are refused.

Each attempt at harm is made in three ways of running: in bubblewrap, with the kernel's filter alone, and with the
audit hook alone, which is what is left on a system without both. Not covered: other systems than Linux, and kernels
without seccomp.
"""

import gc
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from opd.errors import ConfigError, EnvError
from opd.sandbox import Grader, Ungraded, grader_processes

pytestmark = pytest.mark.slow

PROBE = """
import time

class Probe:
    def __init__(self, start=0):
        self.count = start

    def run(self, code):
        return eval(code)

    def swallow(self, code):
        # as graders do: whatever the text does, it gets some score
        names = {}
        try:
            exec(code, names)
        except BaseException as error:
            return names.get("out", repr(error))
        return names.get("out", "done")

    def same(self, given, as_text):
        return given == eval(as_text)

    def add(self, number):
        self.count += number
        return self.count

def hook_alone():
    import opd.sandbox.grader_child as child
    child._can_be_filtered = lambda: False
    return Probe()

def broken():
    raise FileNotFoundError("no such data")

def stubborn():
    time.sleep(1000)
"""


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """The module `probe_grader`, and processes of this test alone."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "probe_grader.py").write_text(PROBE)
    monkeypatch.syspath_prepend(folder)
    held = grader_processes.Holders()
    monkeypatch.setattr(grader_processes, "_HOLDERS", held)
    import probe_grader

    yield probe_grader
    gc.collect()  # sessions that nobody closed
    held.close()
    del sys.modules["probe_grader"]


@pytest.fixture(params=["bubblewrap", "filter", "hook"])
def grader(request, probe, monkeypatch):
    """A grader that runs what it is told, in one of the three ways."""
    if request.param != "bubblewrap":
        monkeypatch.setattr(grader_processes, "_bubblewrap_works", lambda: False)
    else:
        assert grader_processes._bubblewrap_works(), (
            "bubblewrap is not tested where it is missing: apt-get install bubblewrap"
        )
    make = probe.hook_alone if request.param == "hook" else probe.Probe
    return Grader(make, name="probe", time_limit=5)


def test_a_number_comes_back_and_none(grader):
    assert grader.score("run", text="", code="1 + 1") == 2.0
    assert grader.score("run", text="", code="None") is None


HARM = {
    "a shell": "import os; os.system('touch {marker}')",
    "a program": "import subprocess; subprocess.run(['touch', '{marker}'])",
    "another program": "import os; os.execvp('touch', ['touch', '{marker}'])",
    "a spawned program": "import os; os.posix_spawn('/usr/bin/touch', ['touch', '{marker}'], {{}})",
    "a file": "open('{marker}', 'w')",
    "a file by its descriptor": "import os; os.open('{marker}', os.O_CREAT | os.O_WRONLY)",
    "a folder": "import os; os.mkdir('{marker}')",
    "a link": "import os; os.symlink('/', '{marker}')",
    "a copy": "import shutil; shutil.copy('/etc/hostname', '{marker}')",
    "a moved file": "import os; os.rename('{kept}', '{marker}')",
    "a removed file": "import os; os.remove('{kept}')",
    "a shorter file": "import os; os.truncate('{kept}', 0)",
    "a fork": "import os; pid = os.fork(); pid or open('{marker}', 'w')",
    "a socket": "import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
    "a local socket": "import socket; socket.socket(socket.AF_UNIX)",
    "a signal": "import os; os.kill({trainer}, 9)",
    "the C library": "import ctypes; ctypes.CDLL(None).system(b'touch {marker}')",
}


@pytest.mark.parametrize("code", HARM.values(), ids=HARM)
def test_text_that_would_do_harm_does_none_and_scores_nothing(grader, code, tmp_path, caplog):
    marker, kept = tmp_path / "marker", tmp_path / "kept"
    kept.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        told = code.format(marker=marker, kept=kept, port=server.getsockname()[1], trainer=os.getpid())
        assert grader.score("swallow", text="the answer", code=told) == 0.0
        with pytest.raises(TimeoutError):
            server.accept()
    assert not os.path.lexists(marker)
    assert kept.read_text() == "kept"
    assert "probe: the answer 'the answer' scores 0: it tried what text may not do" in caplog.text


BENEATH = {  # past Python's audit events: the kernel is what refuses
    "a fork and a program": (
        "import _posixsubprocess as p, os; r, w = os.pipe()\n"
        "p.fork_exec([b'/usr/bin/touch', b'{marker}'], [b'/usr/bin/touch'], True, (), None, None, -1, -1, -1, -1, -1,"
        " -1, r, w, False, False, -1, None, None, None, -1, None, True)"
    ),
    "a database file": "import sqlite3; c = sqlite3.connect('{marker}'); c.execute('create table t (x)')",
    "a thread that opens a file": (
        "import threading, _io\nt = threading.Thread(target=lambda: _io.open_code('{marker}')); t.start(); t.join()"
    ),
}


@pytest.mark.parametrize("wrapped", [True, False], ids=["bubblewrap", "filter"])
@pytest.mark.parametrize("code", BENEATH.values(), ids=BENEATH)
def test_the_kernel_refuses_what_no_hook_sees(probe, monkeypatch, tmp_path, code, wrapped):
    if not wrapped:
        monkeypatch.setattr(grader_processes, "_bubblewrap_works", lambda: False)
    marker = tmp_path / "marker"
    with suppress(Ungraded):
        Grader(probe.Probe, name="probe", time_limit=5).session().call("swallow", code=code.format(marker=marker))
    time.sleep(0.2)
    assert not marker.exists()


def test_threads_and_reading_are_let_be(grader):
    code = "open('/etc/passwd').read()"
    if "hook" not in str(grader._factory):  # without the filter, no thread: the kernel counts them as processes
        code += "; import threading; t = threading.Thread(target=len, args=['']); t.start(); t.join()"
    with grader.session() as session:
        assert session.call("swallow", code=code) == "done"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("9**9**9", r"no answer within 1 s \(time_limit\)|has used up its processor time"),
        ("__import__('time').sleep(1000)", r"no answer within 1 s \(time_limit\)"),
        ("__import__('os')._exit(3)", "the process that grades it ended"),
        ("__import__('os').abort()", "the process that grades it was ended by SIG"),
        ("[0] * 10**10", "the grader raised MemoryError"),
        ("'a' * 10**10", "the grader raised MemoryError"),
        ("__import__('sys').exit()", "the grader raised SystemExit"),
        ("(lambda f: f(f))(lambda f: f(f))", "the grader raised RecursionError"),
        ("(" * 5000 + ")" * 5000, "the grader raised"),
        ("int('9' * 5000)", "the grader raised ValueError: Exceeds the limit"),
        ("float('nan')", "its score is nan"),
        ("float('inf')", "its score is inf"),
        ("10**400", "its score is out of range"),
        ("'5'", "its score is '5'"),
        ("object()", "the grader raised TypeError"),
        ("[[]] * 10**6", "its score is"),
    ],
)
def test_an_answer_that_cannot_be_graded_scores_nothing_and_the_log_says_why(probe, caplog, code, reason):
    grader = Grader(probe.Probe, name="probe", time_limit=1)
    since = time.monotonic()
    assert grader.score("run", text=code, code=code) == 0.0
    assert time.monotonic() - since < 30
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(f"probe: the answer {code[:200]!r:.200} scores 0: ")
    assert re.search(reason, record.getMessage()), record.getMessage()
    assert grader.score("run", text="", code="7") == 7.0


def test_an_answer_of_ten_million_characters_arrives(probe):
    assert Grader(probe.Probe, name="probe").score("run", text="", code="1" + " " * 10_000_000) == 1.0


def test_one_that_is_too_long_to_send_scores_nothing(probe, caplog):
    assert Grader(probe.Probe, name="probe").score("run", text="", code=" " * 70_000_000) == 0.0
    assert "it is too long (70,000," in caplog.text


def test_text_spoils_nothing_for_the_next_session(probe):
    grader = Grader(probe.Probe, name="probe")
    poison = "import probe_grader; probe_grader.Probe.run = lambda self, code: 1.0"
    with grader.session() as session:
        assert session.call("swallow", code=poison) == "done"
        assert session.call("run", code="0") == 1.0
    assert grader.score("run", text="", code="0") == 0.0


def test_a_session_remembers_and_another_does_not(probe):
    grader = Grader(partial(probe.Probe, 10), name="probe")
    with grader.session() as one, grader.session() as other:
        assert [one.call("add", number=1), one.call("add", number=1), other.call("add", number=5)] == [11, 12, 15]


def test_arguments_arrive_as_they_are(probe):
    given = {1: (2, 3), "text": "\ud800\0", "set": {4}}
    with Grader(probe.Probe, name="probe").session() as session:
        assert session.call("same", given=given, as_text=repr(given)) is True


def test_a_session_that_is_late_is_ended_at_once(probe):
    grader = Grader(probe.Probe, name="probe", time_limit=1)
    session = grader.session()
    with pytest.raises(Ungraded, match="no answer within 1 s"):
        session.call("run", code="__import__('time').sleep(1000)")
    [holder] = grader_processes._HOLDERS._held.values()
    assert holder.sessions == 0


def test_a_session_that_nobody_closes_ends_and_takes_no_lock(probe):
    grader = Grader(probe.Probe, name="probe")
    session = grader.session()
    [holder] = grader_processes._HOLDERS._held.values()
    with holder._lock, grader_processes._HOLDERS._lock:  # held by whoever allocates while garbage is collected
        del session
        gc.collect()
    assert holder.sessions == 0
    [left] = holder._abandoned
    assert grader.score("run", text="", code="1") == 1.0
    assert not holder._abandoned
    assert holder.end(left) == 0  # it was waited for


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_died_or_hangs_is_replaced(probe, monkeypatch, fault):
    monkeypatch.setattr(grader_processes, "_PATIENCE", 1.0)
    monkeypatch.setattr(grader_processes, "_bubblewrap_works", lambda: False)  # the process is then ours to stop
    grader = Grader(probe.Probe, name="probe")
    assert grader.score("run", text="", code="1") == 1.0
    [holder] = grader_processes._HOLDERS._held.values()
    first = holder._process
    first.send_signal(fault)
    if fault == signal.SIGKILL:
        first.wait()
    assert grader.score("run", text="", code="2") == 2.0
    assert first.poll() is not None
    assert holder._process is not first


def test_many_hanging_answers_hold_nobody_up_for_long(probe):
    slow, quick = (Grader(probe.Probe, name="probe", time_limit=seconds) for seconds in (2, 20))
    with ThreadPoolExecutor(30) as threads:
        hanging = [threads.submit(slow.score, "run", text="", code="9**9**9") for _ in range(20)]
        right = [threads.submit(quick.score, "run", text="", code="1") for _ in range(10)]
        since = time.monotonic()
        assert [one.result() for one in right] == [1.0] * 10
        assert [one.result() for one in hanging] == [0.0] * 20
    assert time.monotonic() - since < 60


def test_a_grader_that_cannot_be_made_is_an_error_with_its_reason_and_no_score(probe):
    with pytest.raises(EnvError, match=r"probe: the process .* does not start: FileNotFoundError: no such data\. What"):
        Grader(probe.broken, name="probe").score("run", text="", code="1")


def test_a_grader_that_takes_for_ever_to_make_is_an_error(probe, monkeypatch):
    monkeypatch.setattr(grader_processes, "_START", 2.0)
    with pytest.raises(EnvError, match="does not start: no answer within 2 s"):
        Grader(probe.stubborn, name="probe").score("run", text="", code="1")


def test_an_interpreter_that_cannot_be_started_is_an_error(probe, monkeypatch):
    monkeypatch.setattr(grader_processes, "_bubblewrap_works", lambda: False)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(EnvError, match=r"does not start: .*/nowhere/python"):
        Grader(probe.Probe, name="probe").score("run", text="", code="1")


def test_what_cannot_be_sent_and_no_time_are_refused(probe):
    with pytest.raises(ConfigError, match="probe cannot be sent to a process of its own"):
        Grader(lambda: None, name="probe")
    with pytest.raises(ConfigError, match=r"probe: time_limit = 0.5 must be at least 1 \(seconds\)"):
        Grader(probe.Probe, name="probe", time_limit=0.5)


def test_where_bubblewrap_is_missing_it_is_said_once(probe, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    grader_processes._bubblewrap_works.cache_clear()
    grader_processes._warn_once.cache_clear()
    try:
        for start in (1, 2):
            assert Grader(partial(probe.Probe, start), name="probe").score("add", text="", number=1) == start + 1
    finally:
        grader_processes._bubblewrap_works.cache_clear()
    assert caplog.text.count("bubblewrap (bwrap) does not work here") == 1
    assert "see docs/sandbox.md" in caplog.text


def test_graders_of_one_kind_share_a_process_and_few_are_kept(probe, monkeypatch):
    monkeypatch.setattr(grader_processes, "_MOST_HELD", 2)
    held = grader_processes._HOLDERS
    for start in (0, 1, 0, 2, 3):
        assert Grader(partial(probe.Probe, start), name="probe").score("add", text="", number=0) == start
    assert len(held._held) == 2
    open_sessions = [Grader(partial(probe.Probe, start), name="probe").session() for start in range(4)]
    assert len(held._held) == 4  # none is ended that is in use
    assert [session.call("add", number=0) for session in open_sessions] == [0, 1, 2, 3]
    for session in open_sessions:
        session.close()


def test_a_forked_process_has_graders_of_its_own(probe):
    grader = Grader(probe.Probe, name="probe")
    assert grader.score("run", text="", code="1") == 1.0
    before = grader_processes._HOLDERS
    grader_processes._forget()
    try:
        assert grader_processes._HOLDERS is not before
        assert grader.score("run", text="", code="2") == 2.0
        grader_processes._HOLDERS.close()
    finally:
        grader_processes._INHERITED.remove(before)
        grader_processes._HOLDERS = before
    assert grader.score("run", text="", code="3") == 3.0


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)"])
def test_its_processes_end_with_the_trainer_however_that_ends(tmp_path, end):
    (tmp_path / "probe_grader.py").write_text(PROBE)
    script = (
        "import os, probe_grader\n"
        "from opd.sandbox import Grader, grader_processes\n"
        "session = Grader(probe_grader.Probe, name='probe').session()\n"
        "session.call('add', number=1)\n"
        "[holder] = grader_processes._HOLDERS._held.values()\n"
        "print(holder._process.pid, flush=True)\n" + end
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.stderr == ""
    until = time.monotonic() + 30
    while Path(f"/proc/{int(done.stdout)}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{int(done.stdout)}").exists()
