"""Whether an answer is mathematically equal to the right one, by the library math-verify, in processes of its own.

The library parses LaTeX and asks sympy, both of which hostile or unlucky text can keep busy for hours or fill the
memory with. Its own time limit is a signal, which works in the main thread alone (environments are stepped in
others) and not while Python computes with a huge integer. So it runs in a child, which the system stops when its
processor time is used up, and which we kill when time is up by the clock.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from opd.errors import ConfigError, EnvError
from opd.rewards.functions import Completion, answer_of

_START = 120.0  # seconds to import sympy on a busy machine
_CHILDREN = max(1, min(4, os.cpu_count() or 1))


class MathVerify:
    r"""1 where the completion's answer equals the `answer` column as mathematics, else 0; None: `answer` is none.

    `1/2`, `0.5`, `$\frac{1}{2}$` and `\boxed{\frac12}` are equal. Formulas in a completion need dollar signs or
    `\boxed`, as the library has it; in the `answer` column they may stand bare (`x^2+1`). A completion that cannot
    be compared in time is wrong.

    Args:
        time_limit: seconds for one answer.

    Raises ConfigError when the package math-verify is not installed.
    """

    __name__ = "math_verify"

    def __init__(self, time_limit: float = 10.0) -> None:
        if find_spec("math_verify") is None:
            raise ConfigError("reward math_verify needs the package math-verify: pip install 'opd[math]'")
        if not time_limit >= 1:
            raise ConfigError(f"math_verify: time_limit = {time_limit!r} must be at least 1 (seconds)")
        self.time_limit = time_limit

    def __call__(self, completions: Sequence[Completion], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
        return [
            _CHECKERS.ask(str(right), answer_of(completion), seconds=self.time_limit)
            for completion, right in zip(completions, answer, strict=True)
        ]


class _Checker:
    """One child. It is asked by one thread at a time, and is of no use after an exception."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "opd.rewards.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._rest = b""
        try:
            self._read(_START)
        except (TimeoutError, EOFError) as error:
            self.kill()
            raise EnvError(
                f"reward math_verify: its process does not start ({error}); try `python -P -m opd.rewards.math_worker`"
            ) from error

    def ask(self, right: str, given: str, seconds: float) -> float | None:
        """Raises TimeoutError when there is no answer in time, EOFError when the child died."""
        assert self._process.stdin is not None
        request = json.dumps({"right": right, "given": given, "seconds": seconds})
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise EOFError("the process has ended") from error
        answer: float | None = self._read(seconds + 1.0)
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not written any more
                    pipe.close()

    def _read(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no answer within {seconds:g} s")
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise EOFError("the process has ended")
            self._rest += chunk
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)


class _Checkers:
    """A few children for all threads of this process: each imports sympy, which takes a second and 80 MB."""

    def __init__(self) -> None:
        self._idle: list[_Checker] = []
        self._slots = threading.BoundedSemaphore(_CHILDREN)
        self._inherited: list[_Checker] = []

    def ask(self, right: str, given: str, *, seconds: float) -> float | None:
        with self._slots:
            try:
                checker = self._idle.pop()
            except IndexError:
                checker = _Checker()
            try:
                answer = checker.ask(right, given, seconds)
            except (TimeoutError, EOFError):  # it hangs, or the system has stopped it
                checker.kill()
                return 0.0
            except BaseException:
                checker.kill()
                raise
            self._idle.append(checker)
            return answer

    def close(self) -> None:
        while self._idle:
            self._idle.pop().kill()

    def forget(self) -> None:
        """In a forked process: the children are the parent's, neither to be asked nor ended."""
        self._inherited += self._idle
        self._idle, self._slots = [], threading.BoundedSemaphore(_CHILDREN)


_CHECKERS = _Checkers()
atexit.register(_CHECKERS.close)
os.register_at_fork(after_in_child=_CHECKERS.forget)
