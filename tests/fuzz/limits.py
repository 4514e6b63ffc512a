"""A limit of time that no code under test can swallow."""

import contextlib
import signal


def told(found):
    """What is wrong with each case, a line for each, as a failed test shows it."""
    return "".join(f"\n{number}: {wrong}" for number, wrong in found.items())


class Hang(BaseException):
    """No code catches it, as it might catch an exception."""


@contextlib.contextmanager
def time_limit(seconds):
    """Raise Hang after so many seconds, on the main thread."""

    def late(*_):
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
