"""The pool of threads for calls that may hang."""

import queue
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest

from opd.episodes.workers import TimeLimits, Workers
from opd.grading import grading


class Limited(Workers):
    """Workers whose calls have one limit, unless a call says its own."""

    def __init__(self, size, *, time_limit):
        super().__init__(size)
        self.limits = TimeLimits(call=time_limit, grading=time_limit)

    def start(self, key, call, **options):
        super().start(key, call, **{"limits": self.limits, **options})


@pytest.fixture
def pool():
    made = []

    def make(size, *, time_limit=10.0):
        made.append(Limited(size, time_limit=time_limit))
        return made[-1]

    yield make
    for workers in made:
        workers.close()


def alive():
    return {thread for thread in threading.enumerate() if thread.name == "opd-env"}


def test_results_and_exceptions_come_out_under_the_key_they_went_in_with(pool):
    workers = pool(3)
    for key in range(20):
        workers.start(key, lambda key=key: 1 // (key % 5) if key < 10 else key)
    answers = dict(workers.finished(wait="all"))
    assert sorted(answers) == list(range(20))
    assert answers[13] == 13
    assert answers[1] == 1
    assert isinstance(answers[5], ZeroDivisionError)


def test_calls_run_at_the_same_time(pool):
    barrier = threading.Barrier(4)
    workers = pool(4)
    for key in range(4):
        workers.start(key, lambda: barrier.wait(timeout=5))
    assert sorted(result for _, result in workers.finished(wait="all")) == [0, 1, 2, 3]


def test_waiting_for_none_returns_at_once_and_for_any_with_the_first(pool):
    workers, gate = pool(2), threading.Event()
    assert workers.finished(wait="any") == []
    workers.start(1, gate.wait)
    assert workers.finished(wait="none") == []
    workers.start(2, lambda: "quick")
    assert workers.finished(wait="any") == [(2, "quick")]
    gate.set()
    assert workers.finished(wait="any") == [(1, True)]


def test_a_call_that_hangs_is_given_up_and_its_thread_replaced(pool):
    workers, gate = pool(1, time_limit=0.1), threading.Event()
    workers.start(1, gate.wait)
    workers.start(2, lambda: "behind it")
    answers = dict(workers.finished(wait="all"))
    assert isinstance(answers[1], TimeoutError)
    assert str(answers[1]) == "no answer within 0.1 s (the limit)"
    assert answers[2] == "behind it"
    gate.set()


def test_a_late_answer_is_not_taken_for_a_new_call_under_the_same_key(pool):
    workers, gate = pool(1, time_limit=0.1), threading.Event()
    workers.start(7, lambda: gate.wait() and "old")
    [(key, answer)] = workers.finished(wait="all")
    assert (key, type(answer)) == (7, TimeoutError)
    gate.set()
    time.sleep(0.1)
    workers.start(7, lambda: "new")
    assert workers.finished(wait="all") == [(7, "new")]


def test_the_time_limit_counts_from_when_a_call_starts_not_from_when_it_was_queued(pool):
    workers = pool(1, time_limit=0.5)
    for key in range(8):
        workers.start(key, lambda: time.sleep(0.12))
    assert [answer for _, answer in workers.finished(wait="all")] == [None] * 8


def test_an_environment_that_exits_does_not_take_its_thread_along(pool):
    workers = pool(1)
    workers.start(1, lambda: sys.exit(3))
    workers.start(2, lambda: "still here")
    answers = dict(workers.finished(wait="all"))
    assert isinstance(answers[1], SystemExit)
    assert answers[2] == "still here"


class Slow(queue.Queue):
    """Whoever puts something in pauses, so that whoever waits for it goes on first."""

    def put(self, item):
        super().put(item)
        time.sleep(0.02)


def test_no_thread_is_lost_when_an_answer_is_read_at_once(pool, monkeypatch):
    # A thread that asked, after it had answered, whether its call was still wanted would find it gone.
    before = alive()
    monkeypatch.setattr("opd.episodes.workers.queue.SimpleQueue", Slow)
    workers = pool(2)
    for key in range(5):
        workers.start(key, lambda: None)
        assert workers.finished(wait="any") == [(key, None)]
    time.sleep(0.05)
    assert len(alive() - before) == 2


def test_forgotten_calls_never_answer(pool):
    workers, gate = pool(1), threading.Event()
    workers.start(1, gate.wait)
    workers.start(2, lambda: "old")
    workers.forget()
    gate.set()
    workers.start(2, lambda: "new")
    assert workers.finished(wait="all") == [(2, "new")]
    assert workers.finished(wait="all") == []


def test_a_forgotten_call_that_hangs_is_replaced_too(pool):
    workers, gate = pool(1, time_limit=0.1), threading.Event()
    workers.start(1, gate.wait)
    time.sleep(0.05)
    workers.forget()
    workers.start(2, lambda: "after")
    assert workers.finished(wait="all") == [(2, "after")]
    gate.set()


def test_closing_lets_every_thread_go(pool):
    before = alive()
    workers = pool(5)
    own = alive() - before
    assert len(own) == 5
    workers.close()
    for thread in own:
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_a_hung_call_does_not_keep_the_process_alive():
    program = (
        "import time\n"
        "from opd.episodes.workers import TimeLimits, Workers\n"
        "workers = Workers(2)\n"
        "workers.start(1, lambda: time.sleep(600), limits=TimeLimits(call=0.1, grading=1.0))\n"
        "print(type(workers.finished(wait='all')[0][1]).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "TimeoutError\n"), done.stderr


def test_a_call_that_is_given_up_is_told_so_once_and_no_other(pool):
    workers, gate, told = pool(2, time_limit=0.1), threading.Event(), []
    workers.start(1, gate.wait, give_up=lambda: told.append(1))
    workers.start(2, lambda: "quick", give_up=lambda: told.append(2))
    workers.finished(wait="all")
    time.sleep(0.2)
    workers.finished(wait="none")
    gate.set()
    assert told == [1]


def test_what_runs_is_told_by_its_key_and_what_waits_for_a_thread_is_not(pool):
    workers, gate, begun = pool(2), threading.Event(), threading.Barrier(3)

    def works(grades):
        with grading() if grades else nullcontext():
            begun.wait(timeout=5)
            gate.wait()

    workers.start(1, lambda: works(False))
    workers.start(2, lambda: works(True))
    workers.start(3, lambda: None)
    begun.wait(timeout=5)
    assert workers.running() == {1: "call", 2: "grading"}
    gate.set()
    workers.finished(wait="all")
    assert workers.running() == {}


def test_grading_stops_the_clock_of_the_call_and_starts_its_own(pool):
    workers = pool(3)

    def works(before, graded, after):
        time.sleep(before)
        with grading():
            with grading():  # a rubric of rubrics: the outer one counts
                time.sleep(0.1)
            time.sleep(graded)
        time.sleep(after)

    limits = TimeLimits(call=1.0, grading=2.0, name="rollout.step_timeout")
    for key, parts in enumerate([(0.1, 1.4, 0.1), (0.0, 20.0, 0.0), (0.8, 0.1, 0.9)]):
        workers.start(key, lambda parts=parts: works(*parts), limits=limits)
    answers = dict(workers.finished(wait="all"))
    assert answers[0] is None
    assert str(answers[1]) == "no answer within 2 s (rollout.grading_timeout)"
    assert str(answers[2]) == "no answer within 1 s (rollout.step_timeout)"


def test_grading_outside_of_any_worker_does_nothing():
    with grading(), grading():
        pass
