"""math-verify in processes of its own: right answers, hostile ones, and children that hang or die."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from opd.errors import ConfigError
from opd.rewards import MathVerify, mathematics


@pytest.fixture
def checkers(monkeypatch):
    """Children of this test alone, at most one."""
    monkeypatch.setattr(mathematics, "_CHILDREN", 1)
    made = mathematics._Checkers()
    monkeypatch.setattr(mathematics, "_CHECKERS", made)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (r"The answer is $\frac{1}{2}$.", "1/2", 1.0),
        (r"\boxed{\frac12}", "0.5", 1.0),
        ("0.5", r"$\frac{1}{2}$", 1.0),
        (r"\boxed{1+x^2}", "x^2+1", 1.0),
        (r"$\{2, 1\}$", r"$\{1, 2\}$", 1.0),
        ("so it is 72", "#### 72", 1.0),
        (r"<think>\boxed{72}</think> \boxed{71}", "72", 0.0),
        ("71", 72, 0.0),
        ("I do not know", "72", 0.0),
        ("", "72", 0.0),
        ("72", "", None),
    ],
)
def test_answers_are_compared_as_mathematics(completion, answer, reward):
    assert MathVerify()([completion], answer=[answer]) == [reward]


@pytest.mark.parametrize(
    "hostile",
    [
        r"\boxed{9^{9^{9^9}}}",
        r"\boxed{9!!!!!}",
        r"\boxed{2^{10^{9}}}",
        "$" + "(" * 3000 + "3" + ")" * 3000 + "$",
        r"\boxed{" * 10_000,
        "3" * 1_000_000,
        "\ud800\0\n{}",
    ],
)
def test_a_hostile_answer_is_wrong_within_its_time(hostile):
    since = time.monotonic()
    assert MathVerify(time_limit=2)([hostile], answer=["3"]) == [0.0]
    assert time.monotonic() - since < 30  # with the start of a child on a busy machine


def test_other_threads_are_answered_too():
    with ThreadPoolExecutor(4) as threads:
        rewards = list(threads.map(lambda n: MathVerify()([f"${n}/2$"], answer=[f"{n / 2}"]), range(8)))
    assert rewards == [[1.0]] * 8


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
def test_a_child_that_hangs_or_dies_is_replaced_and_its_answer_is_wrong(checkers, fault):
    assert checkers.ask("1/2", "0.5", seconds=5) == 1.0
    [child] = checkers._idle
    child._process.send_signal(fault)
    since = time.monotonic()
    assert checkers.ask("1/2", "0.5", seconds=1) == 0.0
    assert time.monotonic() - since < 15
    assert child._process.poll() is not None
    assert checkers.ask("1/2", "0.5", seconds=5) == 1.0


def test_the_system_ends_a_child_whose_processor_time_is_used_up(checkers):
    checkers.ask("1", "1", seconds=1)
    [child] = checkers._idle
    limits = Path(f"/proc/{child._process.pid}/limits").read_text()
    [line] = [line for line in limits.splitlines() if line.startswith("Max cpu time")]
    used = sum(os.times()[2:4]) + 60  # more than a child has used
    assert 0 < int(line.split()[3]) < used


def test_a_forked_process_has_children_of_its_own(checkers):
    checkers.ask("1", "1", seconds=5)
    [child] = checkers._idle
    checkers.forget()
    assert checkers._idle == []
    assert checkers.ask("1/2", "0.5", seconds=5) == 1.0
    assert checkers._idle != [child]
    child.kill()


def test_children_end_with_their_parent(tmp_path):
    script = (
        "from opd.rewards import MathVerify, mathematics\n"
        "MathVerify()(['1'], answer=['1'])\n"
        "print(mathematics._CHECKERS._idle[0]._process.pid)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not Path(f"/proc/{int(done.stdout)}").exists()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(mathematics, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package math-verify: pip install 'opd\[math\]'"):
        MathVerify()


def test_a_time_limit_below_a_second_is_refused():
    with pytest.raises(ConfigError, match=r"time_limit = 0.5 must be at least 1"):
        MathVerify(time_limit=0.5)


def test_no_more_children_are_made_than_allowed(checkers):
    before = threading.active_count()
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: checkers.ask("1", "1", seconds=5), range(3)))
    assert len(checkers._idle) == 1
    assert threading.active_count() <= before + 1
