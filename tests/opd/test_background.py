"""Coroutines and functions under a time limit: what is late is given up, and nothing stays behind.

Not covered: a function that hangs for ever in a thread, which stays until the process ends.
"""

import asyncio
import multiprocessing
import threading
import time

import pytest

from opd.background import Background, call_within, map_until


@pytest.fixture
def background():
    made = Background()
    yield made
    made.close()


async def double(x, wait=0.0):
    await asyncio.sleep(wait)
    return 2 * x


def later(x, wait):
    return lambda: double(x, wait)


def test_results_come_in_the_order_of_the_calls(background):
    assert background.run([later(1, 0.05), later(2, 0.0), later(3, 0.02)], time_limit=5) == [2, 4, 6]


def test_what_a_call_raises_is_its_result_and_not_that_of_others(background):
    async def fail():
        raise KeyError("no")

    failed, fine = background.run([fail, later(1, 0)], time_limit=5)
    assert (type(failed), fine) == (KeyError, 2)


def test_a_late_call_is_cancelled_and_has_a_moment_to_clean_up(background):
    cleaned = []

    async def late():
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            cleaned.append(True)

    [result] = background.run([late], time_limit=0.1)
    assert (type(result), str(result)) == (TimeoutError, "no answer within 0.1 s")
    assert cleaned == [True]


def test_a_call_that_raises_a_timeout_of_its_own_is_not_taken_for_late(background):
    async def impatient():
        raise TimeoutError("the server did not answer")

    [result] = background.run([impatient], time_limit=5)
    assert str(result) == "the server did not answer"


def test_closing_cancels_what_still_runs_and_ends_the_thread():
    background = Background()
    ended = threading.Event()

    async def linger():
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    async def leave_behind():
        background.kept = asyncio.create_task(linger())
        await asyncio.sleep(0)

    background.run([leave_behind], time_limit=5)
    thread = background._thread
    background.close()
    assert ended.wait(5)
    assert not thread.is_alive()
    assert background.run([later(1, 0)], time_limit=5) == [2]
    background.close()


def _in_a_fork(background, answers):
    answers.put(background.run([later(1, 0)], time_limit=5))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_has_a_loop_of_its_own(background):
    background.run([later(1, 0)], time_limit=5)
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    child = fork.Process(target=_in_a_fork, args=(background, answers))
    child.start()
    assert answers.get(timeout=30) == [2]
    child.join(30)
    assert child.exitcode == 0


def test_a_function_in_time_gives_its_result_or_its_exception():
    assert call_within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        call_within(5, lambda: 1 / 0)
    with pytest.raises(TimeoutError, match="its own"):
        call_within(5, lambda: (_ for _ in ()).throw(TimeoutError("its own")))


def test_a_function_that_is_late_is_given_up():
    release = threading.Event()
    since = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0.1 s"):
        call_within(0.1, release.wait)
    assert time.monotonic() - since < 5
    release.set()


def test_calls_in_threads_come_back_in_order_and_are_left_once_the_run_is_to_end():
    assert map_until(lambda: False, str, [3, 1, 2], at_once=2) == ["3", "1", "2"]
    assert map_until(lambda: False, str, [], at_once=2) == []
    begun, since = [], time.monotonic()

    def work(number):
        begun.append(number)
        if number:
            time.sleep(30)
        return number

    assert map_until(lambda: len(begun) > 2, work, [0, 1, 2, 3, 4, 5], at_once=2) == [0, None, None, None, None, None]
    assert time.monotonic() - since < 20
    assert sorted(begun) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        map_until(lambda: False, lambda number: 1 / number, [1, 0], at_once=1)
