"""Calls code that may hang, within a time limit: coroutines on an event loop beside us, and plain functions.

What overruns its limit is given up, never waited for; a coroutine is cancelled first. Tools and rewards use this.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from contextvars import copy_context
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
_POLL = 0.2  # seconds between two looks at whether to stop
_GRACE = 1.0  # seconds that a cancelled coroutine has to clean up


class Background:
    """Owns an event loop on a thread of its own, for one owner. It starts when it is first needed and ends by `close`.

    The loop lives on between calls, so that what a coroutine opened (a session, a lock) can be used by the next.
    An owner that is collected without `close` takes its loop along.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def run(self, calls: Sequence[Callable[[], Awaitable[T]]], *, time_limit: float) -> list[T | BaseException]:
        """Run coroutine functions at the same time. Returns what each returned or raised, in the order of the calls.

        One that takes longer than `time_limit` seconds is cancelled and gives a TimeoutError. Where one blocks the
        loop itself (it sleeps or computes without awaiting) all that are not done give one, and the loop is given up.
        """
        loop = self._running_loop()
        answer = asyncio.run_coroutine_threadsafe(_gather(calls, time_limit), loop)
        try:
            return answer.result(time_limit + 2 * _GRACE)
        except TimeoutError:
            logger.warning("an async call blocked its event loop for more than %g s; the loop is given up", time_limit)
            self._stop()
            return [_overrun(time_limit) for _ in calls]

    def close(self) -> None:
        """Cancel what still runs, and end the loop. `run` may be called again."""
        thread = self._thread
        self._stop()
        if thread is not None:
            thread.join(3 * _GRACE)  # one that is blocked is a daemon

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        # In a forked process the thread is gone, and with it the loop.
        if self._loop is None or self._thread is None or not self._thread.is_alive():
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_serve, args=(self._loop,), name="opd-async", daemon=True)
            self._thread.start()
            weakref.finalize(self, _request_stop, self._loop)
        return self._loop

    def _stop(self) -> None:
        if self._loop is not None:
            _request_stop(self._loop)
        self._loop = self._thread = None


def call_within(seconds: float, function: Callable[[], T]) -> T:
    """Run a plain function on a daemon thread; return or raise what it does. Raises TimeoutError when it takes longer.

    A thread cannot be stopped: one that hangs stays behind until the process ends.
    """
    answer: Future[T] = Future()
    context = copy_context()

    def work() -> None:
        try:
            answer.set_result(context.run(function))
        except BaseException as error:  # sys.exit() too is an answer
            answer.set_exception(error)

    threading.Thread(target=work, name="opd-limited", daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        if answer.done():
            raise  # the function's own
        raise _overrun(seconds) from None


def _overrun(seconds: float) -> TimeoutError:
    return TimeoutError(f"no answer within {seconds:g} s")


def _request_stop(loop: asyncio.AbstractEventLoop) -> None:
    with suppress(RuntimeError):  # it is closed already
        loop.call_soon_threadsafe(loop.stop)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        if left := asyncio.all_tasks(loop):
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.wait(left, timeout=_GRACE))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


async def _gather(calls: Sequence[Callable[[], Awaitable[T]]], time_limit: float) -> list[T | BaseException]:
    tasks = [asyncio.create_task(_catch(call)) for call in calls]
    done, late = await asyncio.wait(tasks, timeout=time_limit)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late, timeout=_GRACE)
    return [_result(task) if task in done else _overrun(time_limit) for task in tasks]


async def _catch(call: Callable[[], Awaitable[T]]) -> T | BaseException:
    """Return a raised exception as a value: SystemExit would end the loop. A cancelled task stays cancelled."""
    try:
        return await call()
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return error


def _result(task: asyncio.Task[Any]) -> Any:
    return asyncio.CancelledError("it was cancelled") if task.cancelled() else task.result()


def map_until(
    stopped: Callable[[], bool], work: Callable[[Any], T], items: Sequence[Any], *, at_once: int
) -> list[T | None]:
    """Call `work` with each item, `at_once` at a time; None for those that are not done once `stopped`.

    Raises what `work` raises. Threads that are left so, or by an error, end with their call, and nobody waits for them.
    """
    left: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    futures: list[Future[T]] = [Future() for _ in items]
    for entry in enumerate(items):
        left.put(entry)

    def run() -> None:
        with suppress(queue.Empty):
            while not over.is_set():
                number, item = left.get_nowait()
                try:
                    futures[number].set_result(work(item))
                except BaseException as error:
                    futures[number].set_exception(error)

    over = threading.Event()
    for _ in range(min(at_once, len(items))):
        threading.Thread(target=run, name="opd-map", daemon=True).start()
    try:
        done: set[Future[T]] = set()
        while len(done) < len(futures) and not stopped():
            done = wait(futures, timeout=_POLL, return_when=FIRST_EXCEPTION).done
            for future in done:
                future.result()
        return [future.result() if future.done() else None for future in futures]
    finally:
        over.set()
