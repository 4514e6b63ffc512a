"""The sandbox as its users see it: outcomes, sessions, what is refused and with which words. See also
`test_sandbox_breakout.py`."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from opd.errors import ConfigError, SandboxError
from opd.sandbox import Entry, Sandbox, SandboxLimits, bubblewrap
from opd.sandbox.syscalls import seccomp_filter

pytestmark = pytest.mark.slow  # each runs a program apart

WEAK = pytest.mark.filterwarnings("ignore:sandbox. .limits. is no sandbox:RuntimeWarning")


@pytest.fixture(params=["bwrap", pytest.param("limits", marks=WEAK)])
def mode(request):
    return request.param


def test_an_outcome_holds_output_exit_code_and_files(mode):
    sandbox = Sandbox(mode=mode)
    outcome = sandbox.run(
        ["sh", "-c", "read line; echo $line; cat a/b.txt; echo wrong >&2; mkdir c; echo new > c/d; exit 3"],
        stdin="héllo\nmore",
        files={"a/b.txt": "from a file\n", "bytes": b"\xff"},
    )
    assert (outcome.stdout, outcome.stderr, outcome.exit_code) == ("héllo\nfrom a file\n", "wrong\n", 3)
    assert (outcome.killed_why, outcome.timed_out, outcome.truncated) == (None, False, False)
    assert outcome.files == {"a/b.txt": b"from a file\n", "bytes": b"\xff", "c/d": b"new\n"}
    assert 0 < outcome.seconds < 10


def test_python_code_is_run_by_our_version_of_python_and_finds_the_files(mode):
    code = "import sys, helper; print(sys.version_info[:2], helper.x, sys.argv[1:], __name__)"
    outcome = Sandbox(mode=mode).run_python(code, files={"helper.py": "x = 5"})
    assert outcome.stdout == f"{sys.version_info[:2]} 5 [] __main__\n"
    assert list(outcome.files) == ["helper.py"]


def test_an_error_in_the_code_names_its_line(mode):
    outcome = Sandbox(mode=mode).run_python("x = 1\nx / 0")
    assert outcome.exit_code == 1
    assert "line 2" in outcome.stderr
    assert "ZeroDivisionError" in outcome.stderr


def test_a_signal_becomes_an_exit_code_as_in_a_shell(mode):
    assert Sandbox(mode=mode).run(["sh", "-c", "kill -SEGV $$"]).exit_code == 128 + signal.SIGSEGV


def test_a_program_that_is_not_there_is_an_outcome(mode):
    outcome = Sandbox(mode=mode).run(["nosuch"])
    assert (outcome.exit_code, outcome.stderr) == (127, "nosuch: No such file or directory\n")


def test_the_environment_is_the_same_whatever_ours_is(mode, monkeypatch):
    sandbox = Sandbox(mode=mode)
    before = sandbox.run(["env"]).stdout
    monkeypatch.setenv("OPD_TEST", "x")
    after = sandbox.run(["env"]).stdout
    assert "OPD_TEST" not in after
    if mode == "bwrap":  # the paths of the other mode are temporary
        assert after == before


def test_time_and_output_are_bounded(mode):
    sandbox = Sandbox({"seconds": 1, "output_kb": 8}, mode=mode)
    slow = sandbox.run(["sleep", "60"])
    assert (slow.killed_why, slow.timed_out, slow.exit_code) == ("seconds", True, 128 + signal.SIGKILL)
    loud = sandbox.run(["sh", "-c", "while :; do echo yes; done"])
    assert (loud.killed_why, loud.truncated, len(loud.stdout)) == ("output", True, 8 << 10)


def test_output_of_exactly_the_limit_is_not_cut(mode):
    outcome = Sandbox({"output_kb": 1}, mode=mode).run(["sh", "-c", "printf '%01024d' 0"])
    assert (outcome.truncated, outcome.killed_why, outcome.stdout) == (False, None, "0" * 1024)


def test_memory_and_cpu_time_of_a_process_are_bounded(mode):
    sandbox = Sandbox({"memory_mb": 200, "cpu_seconds": 1, "seconds": 100}, mode=mode)
    assert "MemoryError" in sandbox.run_python("x = bytearray(1 << 30)").stderr
    assert sandbox.run_python("while True: pass").killed_why == "cpu_seconds"


def test_output_that_is_no_text_is_shown_as_such(mode):
    assert Sandbox(mode=mode).run(["printf", r"a\377b"]).stdout == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize("text", ["\ud83d", "nul\0nul", "x" * 300_000, "'\"$(echo)"])
def test_any_text_may_be_code_command_or_input(text):
    sandbox = Sandbox()
    assert sandbox.run_python(f"# {text}").exit_code in (0, 1)
    assert sandbox.run_shell(f"# {text}").exit_code in (0, 126)  # bash takes what holds a NUL for no script
    assert sandbox.run(["wc", "-c"], stdin=text).exit_code == 0


def test_a_session_keeps_files_modes_links_and_times_but_no_process():
    session = Sandbox().session({"given": "text"})
    session.run_shell("mkdir -p a/b; echo '#!/bin/sh\necho run' > a/run; chmod 750 a/run; ln -s run a/link; sleep 60 &")
    session.run_shell("touch -d 2001-02-03 given; chmod 700 a/b")
    outcome = session.run_shell("a/link; stat -c '%a %n' a/run a/b; stat -c %y given; pgrep sleep")
    assert outcome.stdout.splitlines() == ["run", "750 a/run", "700 a/b", "2001-02-03 00:00:00.000000000 +0000"]
    assert session.folder["a/link"] == Entry(kind="link", data=b"run", mode=0o777)
    assert session.files["given"] == b"text"


def test_what_a_killed_program_had_written_is_kept():
    session = Sandbox({"seconds": 1}).session()
    session.run_shell("echo half > file; sleep 60")
    assert session.files == {"file": b"half\n"}


def test_a_run_that_leaves_too_much_is_undone():
    session = Sandbox({"files": 20}).session({"kept": "text"})
    outcome = session.run_shell("rm kept; for n in $(seq 21); do mkdir $n; done")
    assert outcome.killed_why == "folder"
    assert session.files == {"kept": b"text"}


def test_two_sessions_know_nothing_of_each_other():
    sandbox = Sandbox()
    one, other = sandbox.session(), sandbox.session()
    one.run_shell("echo one > /tmp/x; echo one > x")
    assert other.run_shell("ls . /tmp").stdout == ".:\n\n/tmp:\nprogram\n"


def test_many_sandboxes_run_at_the_same_time():
    sandbox = Sandbox()
    outcomes = {}

    def run(number):
        outcomes[number] = sandbox.run(["sh", "-c", "sleep 0.3; cat"], stdin=str(number)).stdout

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {number: str(number) for number in range(8)}
    assert time.monotonic() - begun < 8 * 0.3 + 2


def test_nothing_is_left_open_after_many_runs():
    sandbox = Sandbox({"seconds": 1})
    sandbox.run(["true"])
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        sandbox.run(["true"])
        sandbox.run(["nosuch"])
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_further_folders_may_be_read_and_imported_from(tmp_path):
    (tmp_path / "library.py").write_text("x = 7")
    tmp_path.chmod(0o755)
    sandbox = Sandbox(readable=[str(tmp_path)])
    assert sandbox.run_python("import library; print(library.x)").stdout == "7\n"
    assert "Read-only" in sandbox.run_python(f"open({str(tmp_path / 'new')!r}, 'w')").stderr


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("relative", "must be the absolute path of something that exists"),
        ("/no/such", "must be the absolute path of something that exists"),
        ("/", "would hide one of the sandbox's own folders"),
        ("/proc/self", "would hide one of the sandbox's own folders"),
        ("/tmp", "would hide one of the sandbox's own folders"),
    ],
)
def test_paths_that_cannot_be_shown_are_refused(path, message):
    with pytest.raises(ConfigError, match=message):
        Sandbox(readable=[path])


@pytest.mark.parametrize("path", ["", "/etc/x", "../x", "a/../b", "a//b", "./a", "a\0b", "\ud83d", "/".join("d" * 50)])
def test_files_outside_the_folder_cannot_be_given(path):
    with pytest.raises(ConfigError, match=r"must be a relative path without '\.\.'"):
        Sandbox().run(["true"], files={path: "text"})


def test_more_files_than_the_limits_allow_cannot_be_given():
    with pytest.raises(ConfigError, match=r"limits\.folder_mb = 1"):
        Sandbox({"folder_mb": 1}).run(["true"], files={"a": b"x" * (1 << 20), "b": "y"})
    with pytest.raises(ConfigError, match=r"limits\.files = 1"):
        Sandbox({"files": 1}).session({"a": "", "b": ""})


@pytest.mark.parametrize("argv", [[], ["a\0b"], ["echo", "x" * 200_000]])
def test_arguments_that_no_program_can_be_given_are_refused(argv):
    with pytest.raises(ConfigError, match="must name a program"):
        Sandbox().run(argv)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"seconds": 0}, "limits.seconds = 0 must be a number above 0"),
        ({"seconds": float("nan")}, "limits.seconds = nan must be a number above 0"),
        ({"memory_mb": 1.5}, "limits.memory_mb = 1.5 must be a whole number above 0"),
        ({"files": "many"}, "limits.files = 'many' must be a whole number above 0"),
        ({"processes": True}, "limits.processes = True must be a whole number above 0"),
        ({"memory": 3}, "there is no 'memory'. Allowed: seconds, .*Did you mean \"memory_mb\""),
    ],
)
def test_limits_that_are_none_are_refused_by_name(limits, message):
    with pytest.raises(ConfigError, match=message):
        Sandbox(limits)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match=r"'none' is unknown\. Allowed: bwrap, limits"):
        Sandbox(mode="none")


def test_the_weaker_mode_says_what_it_does_not_stop():
    with pytest.warns(RuntimeWarning, match="is no sandbox. A program runs as you: it can read and write your files"):
        Sandbox(mode="limits")


@WEAK
def test_the_weaker_mode_leaves_no_folder_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert Sandbox(mode="limits").run_shell("mkdir -p a/b; touch a/b/c; pwd").stdout.startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@WEAK
def test_the_weaker_mode_ends_the_programs_own_children():
    outcome = Sandbox({"seconds": 1}, mode="limits").run(["sh", "-c", "sleep 61.5 & sleep 61.5"])
    assert outcome.timed_out
    assert subprocess.run(["pgrep", "-f", "sleep 61.5"], capture_output=True, check=False).stdout == b""


# Where it cannot be made


@pytest.fixture
def fresh():
    """The answer whether a sandbox works here is found anew, before and after."""
    bubblewrap.require_bubblewrap.cache_clear()
    yield
    bubblewrap.require_bubblewrap.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_where_bubblewrap_is_missing_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        ConfigError, match=r"^bubblewrap (.*) is not installed(.|\n)*apt-get install bubblewrap"
    ) as caught:
        Sandbox()
    assert "container" not in str(caught.value)  # which is the mend for another trouble


@pytest.mark.usefixtures("fresh")
def test_where_bubblewrap_fails_the_error_says_what_it_said(tmp_path, monkeypatch):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match=r"No permissions to create new namespace\n.*seccomp=unconfined"):
        Sandbox()


def test_where_namespaces_are_switched_off_the_error_names_the_switch():
    """In a user namespace of its own, whose switch can be set."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and util-linux's unshare")
    program = "from opd.sandbox import Sandbox\nSandbox()"
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", script, sys.executable, program],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    assert "ConfigError" in done.stderr
    assert "sysctl -w user.max_user_namespaces=15000" in done.stderr


@pytest.mark.usefixtures("fresh")
def test_the_host_is_asked_only_once_whether_it_works(monkeypatch):
    Sandbox()
    monkeypatch.setattr(bubblewrap, "Bubblewrapped", None)
    Sandbox()


def test_a_sandbox_that_breaks_later_is_an_error_of_its_own(monkeypatch, tmp_path):
    sandbox = Sandbox()
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: out of luck' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SandboxError, match="could not make a sandbox: bwrap: out of luck"):
        sandbox.run(["true"])


def test_older_bubblewraps_that_cannot_bound_a_folder_are_watched(monkeypatch):
    monkeypatch.setattr(bubblewrap, "_bounds_folders", lambda bwrap: False)
    code = "with open('a', 'wb') as a, open('b', 'wb') as b:\n    while True: a.write(bytes(99)), b.write(bytes(99))"
    outcome = Sandbox({"folder_mb": 1}).run_python(code)
    assert outcome.killed_why == "folder" or outcome.exit_code == 128 + signal.SIGXFSZ or "too large" in outcome.stderr


def test_the_filter_is_made_for_both_kinds_of_processor_and_no_other():
    assert len(seccomp_filter("x86_64")) % 8 == 0
    assert seccomp_filter("x86_64") != seccomp_filter("aarch64")
    with pytest.raises(ConfigError, match="not those of riscv64"):
        seccomp_filter("riscv64")


def test_limits_never_exceed_those_of_the_trainer():
    code = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from opd.sandbox import Sandbox
print(Sandbox().run_python("import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))").stdout)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.strip() == "(64, 64)"


def test_every_limit_has_a_default_that_python_runs_under():
    assert Sandbox(SandboxLimits()).run_python("import json, re, decimal, asyncio; print('fine')").stdout == "fine\n"
