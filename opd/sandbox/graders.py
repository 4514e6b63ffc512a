"""Running third-party code that reads a model's text in processes that can be killed and can hurt nothing.

Graders evaluate answers as Python, as formulas or as SQL, and match patterns that take years on some texts. Python
cannot stop a thread, and many such computations let no other thread run. So a grader is held by a process of its own
(`opd.sandbox.grader_processes`), made by what is pickled here; a session with it is a fork of that process, locked
before it reads any text, and killed when it is late or done with. Whatever goes wrong there is `Ungraded`; a process
that cannot start is an EnvError.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import signal
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from opd.errors import ConfigError
from opd.grading import grading, note_ungraded
from opd.sandbox.forks import MOST_BYTES
from opd.sandbox.grader_processes import Holder, exchange, holders

logger = logging.getLogger(__name__)


class Ungraded(Exception):
    """Raised where a call has no result: it was late, refused, or raised, or its process died. Its text says which."""


class Grader:
    """Calls an object that reads a model's text, in processes of its own.

    Args:
        make: makes the object in that process; it must be picklable. Graders with the same one share a process.
        name: the name of the object in messages.
        time_limit: seconds for one call.

    Raises ConfigError when `make` cannot be pickled, or the limit is below one second.
    """

    def __init__(self, make: Callable[[], Any], *, name: str, time_limit: float = 10.0) -> None:
        if not time_limit >= 1:
            raise ConfigError(f"{name}: time_limit = {time_limit!r} must be at least 1 (seconds)")
        try:
            self._factory = pickle.dumps(make)
        except Exception as error:  # what pickle says depends on what it meets
            raise ConfigError(
                f"{name} cannot be sent to a process of its own ({error}); it must be importable by its name"
            ) from error
        self.name = name
        self.time_limit = time_limit

    def score(self, method: str, *, text: str, **arguments: Any) -> float | None:
        """Call a method of the object; return its score, a finite number or None.

        Where there is no such result the answer is wrong: 0.0, and a warning quotes `text`. Raises EnvError when the
        process cannot start.
        """
        try:
            with grading(), self.session() as session:
                value = session.call(method, **arguments)
            if value is None or (isinstance(value, int | float) and math.isfinite(value)):
                return None if value is None else float(value)
            reason = f"its score is {value!r:.80}"
        except Ungraded as error:
            logger.warning("%s: the answer %.200r scores 0: %s", self.name, text[:200], error)
            return 0.0
        except OverflowError:  # an integer that no float holds
            reason = "its score is out of range"
        note_ungraded(f"{self.name}: {reason}")
        logger.warning("%s: the answer %.200r scores 0: %s", self.name, text[:200], reason)
        return 0.0

    def start(self) -> None:
        """Start the process that holds the object, so that the first call need not wait for it. Raises EnvError."""
        holder = holders().get(self._factory, self.name)
        try:
            holder.start()
        finally:
            holder.release()

    def session(self) -> GraderSession:
        """Open a process with the object as it was made. Raises EnvError when it cannot start."""
        return GraderSession(holders().get(self._factory, self.name), self.time_limit, name=self.name)


class GraderSession:
    """Calls one object, which remembers earlier calls. For one thread at a time; `close` ends it."""

    def __init__(self, holder: Holder, time_limit: float, *, name: str) -> None:
        self.time_limit = time_limit
        self.name = name
        self._holder = holder
        try:
            self._pid, self._connection = holder.fork()
        except BaseException:
            holder.release()
            raise
        self._abandoned = weakref.finalize(self, holder.abandon, self._pid, self._connection)  # if nobody calls close

    def call(self, method: str, **arguments: Any) -> Any:
        """Call the method; return its result, as JSON has it. Raises Ungraded; the session is of no use after that.

        The failure is noted (`opd.grading.note_ungraded`), so that it is counted.
        """
        try:
            return self._call(method, arguments)
        except Ungraded as error:
            note_ungraded(f"{self.name}: {error}")
            raise

    def _call(self, method: str, arguments: dict[str, Any]) -> Any:
        # Into the child by pickle: data sets hold tuples and numpy's texts. What comes back is JSON, and nothing else.
        request = pickle.dumps((method, self.time_limit, arguments))
        if len(request) > MOST_BYTES:
            self.close()
            raise Ungraded(f"it is too long ({len(request):,} bytes; at most {MOST_BYTES:,} are sent)")
        with holders().slots:
            try:
                reply = exchange(self._connection, request, time.monotonic() + self.time_limit)
            except TimeoutError:
                self.close()
                raise Ungraded(f"no answer within {self.time_limit:g} s (time_limit)") from None
            except (OSError, ValueError):  # not ours to trust: it may have written anything
                raise Ungraded(f"the process that grades it {_describe_end(self._end())}") from None
        if "value" in reply:
            return reply["value"]
        self.close()
        if "refused" in reply:
            raise Ungraded(f"it tried what text may not do ({reply['refused']})")
        raise Ungraded(f"the grader raised {reply.get('raised')}")

    def close(self) -> None:
        """End its process."""
        self._end()

    def _end(self) -> int:
        """End the process; return its status as `os.waitpid` gives it, 0 where it was ended before."""
        if self._abandoned.detach() is None:
            return 0
        self._connection.close()
        try:
            return self._holder.end(self._pid)
        finally:
            self._holder.release()

    def __enter__(self) -> GraderSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _describe_end(status: int) -> str:
    """Say how a process ended, in words that follow its name; `status` is that of `os.waitpid`."""
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        return "has used up its processor time (time_limit)"
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else "ended"
    return f"was ended by signal {-code}"
