"""Rewards code by unit tests: what the model wrote runs in the sandbox, against the tests of the task.

Tests that call the code run in its process, so code that goes for the harness itself can fool them; it has to
mean to, for leaving early or printing does not do. Tests by input and output cannot be fooled: the right output
never enters the sandbox.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from opd.errors import ConfigError, DataError
from opd.rewards.functions import Completion, text_of
from opd.sandbox import Sandbox, SandboxLimits

_FENCED = re.compile(r"^[ \t]*```[ \t]*(?:python\d?|py)?[ \t]*\n(.*?)^[ \t]*```", re.M | re.S | re.I)

# The word is read only once the code has run: code that ends early, or prints whatever, has not seen it.
_HARNESS = """\
import json, os, sys
with open("tests.json") as file:
    tests = json.load(file)
with open("solution.py") as file:
    code = compile(file.read(), "solution.py", "exec")
os.remove("tests.json")
names = {"__name__": "solution"}
exec(code, names)
word = sys.stdin.readline().strip()
for number, test in enumerate(tests):
    try:
        exec(compile(test, f"test {number}", "exec"), names)
    except BaseException as error:
        print(f"test {number}: {type(error).__name__}: {error}", file=sys.stderr)
    else:
        os.write(1, f"\\n{word} {number}\\n".encode())
"""


class CodeTests:
    """Scores 1.0 for code that passes all of its tests, else 0.0; None where there are no tests.

    The code is the last fenced block of a completion, or the whole of it where there is none. Each entry of the
    column `tests` is one program of asserts, a list of such programs (MBPP's `test_list`), or a list of
    `{"input": ..., "output": ...}`, what the code reads from stdin and must print (white space at the ends of lines
    aside). A program of asserts sees the names that the code defines.

    Args:
        partial: give the share of tests passed, in place of all or nothing.
        limits: of each run; see `SandboxLimits`.
        sandbox: "bwrap", or "limits", which protects nothing and warns.
        readable: see `Sandbox`; the folder of installed packages, say.
        workers: how many sandboxes a call runs at one time.

    Raises ConfigError where there is no bubblewrap, DataError for tests of another form.
    """

    __name__ = "code_tests"

    def __init__(
        self,
        *,
        partial: bool = False,
        limits: SandboxLimits | Mapping[str, Any] | None = None,
        sandbox: str = "bwrap",
        readable: Sequence[str] = (),
        workers: int = 4,
    ) -> None:
        if workers < 1:
            raise ConfigError(f"workers = {workers} must be 1 or more")
        self.partial = partial
        self.workers = workers
        self._sandbox = Sandbox(limits, mode=sandbox, readable=readable)

    def __call__(self, completions: Sequence[Completion], tests: Sequence[Any], **kwargs: Any) -> list[float | None]:
        """Score a batch, several at a time."""
        pairs = [(_code(completion), _list_tests(test)) for completion, test in zip(completions, tests, strict=True)]
        with ThreadPoolExecutor(max_workers=self.workers) as pool:
            return list(pool.map(lambda pair: self._score(*pair), pairs))

    def _score(self, code: str, tests: list[Any]) -> float | None:
        if not tests:
            return None
        passed = self._by_output(code, tests) if isinstance(tests[0], Mapping) else self._by_asserts(code, tests)
        return passed / len(tests) if self.partial else float(passed == len(tests))

    def _by_asserts(self, code: str, tests: list[str]) -> int:
        word = secrets.token_hex(16)
        files = {"solution.py": code, "tests.json": json.dumps(tests)}
        outcome = self._sandbox.run_python(_HARNESS, stdin=word + "\n", files=files)
        return len(set(re.findall(rf"^{word} (\d+)$", outcome.stdout, re.MULTILINE)))

    def _by_output(self, code: str, tests: list[Mapping[str, str]]) -> int:
        passed = 0
        for test in tests:
            outcome = self._sandbox.run_python(code, stdin=test["input"])
            right = outcome.exit_code == 0 and _lines(outcome.stdout) == _lines(test["output"])
            if not right and not self.partial:
                break  # one failure decides it
            passed += right
        return passed


def code_tests(completions: Sequence[Completion], tests: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """Score a batch by `CodeTests` with its defaults. Raises ConfigError where there is no bubblewrap."""
    return default_code_tests()(completions, tests)


@cache
def default_code_tests() -> CodeTests:
    """Make the `CodeTests` that `code_tests` calls. Raises ConfigError where there is no bubblewrap."""
    return CodeTests()


def _code(completion: Completion) -> str:
    text = text_of(completion)
    blocks = _FENCED.findall(text)
    return str(blocks[-1]) if blocks else text


def _list_tests(tests: Any) -> list[Any]:
    """Return the tests as a list. Raises DataError when they have none of the forms."""
    listed = [tests] * bool(tests.strip()) if isinstance(tests, str) else tests or []
    if isinstance(listed, list | tuple):
        if all(isinstance(test, str) for test in listed):
            return list(listed)
        if all(isinstance(test, Mapping) and _is_pair(test) for test in listed):
            return list(listed)
    raise DataError(
        "tests must be a program of asserts, a list of them, or a list of {input, output} with texts; "
        f"got {tests!r:.200}"
    )


def _is_pair(test: Mapping[str, Any]) -> bool:
    return all(isinstance(test.get(key), str) for key in ("input", "output"))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
