"""Unit-tested code as a reward: what passes, what does not, and code that tries to be rewarded without working."""

import threading
import time

import pytest

from opd.errors import ConfigError, DataError
from opd.rewards import CodeTests, Rubric, code_tests
from opd.sandbox import bubblewrap

pytestmark = pytest.mark.slow  # each runs a program apart

ADD = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return a - b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(5, 0) == 5", "assert add(-1, 1) == 0"]
ECHO = [{"input": "3\n", "output": "6\n"}, {"input": "10\n", "output": "20"}]


def score(code, tests, **options):
    [value] = CodeTests(**options)(completions=[code], tests=[tests], prompts=["unused"])
    return value


def test_code_that_passes_is_worth_one_and_code_that_fails_nothing():
    assert code_tests(completions=[ADD, WRONG], tests=[TESTS, TESTS]) == [1.0, 0.0]


def test_the_share_of_passed_tests_is_given_only_when_asked_for():
    assert score(WRONG, TESTS) == 0.0
    assert score(WRONG, TESTS, partial=True) == pytest.approx(1 / 3)
    assert score("print(2 * 3)", ECHO, partial=True) == 0.5


def test_a_program_of_asserts_is_one_test():
    assert score(ADD, "for n in range(5):\n    assert add(n, n) == 2 * n\n") == 1.0
    assert score(ADD, "assert add(1, 1) == 3") == 0.0


def test_code_is_run_on_inputs_and_its_output_compared():
    assert score("print(2 * int(input()))", ECHO) == 1.0
    assert score("print(2 * int(input()), ' ')\nprint()", ECHO) == 1.0  # white space at the ends
    assert score("print(3 + int(input()))", ECHO) == 0.0
    assert score("print(2 * int(input())); exit(1)", ECHO) == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        f"Here it is:\n```python\n{ADD}```\nDone.",
        f"First try:\n```py\n{WRONG}```\nBetter:\n```\n{ADD}```",
        [{"role": "assistant", "content": f"```Python\n{ADD}```"}],
    ],
)
def test_the_code_is_the_last_fenced_block(completion):
    assert score(completion, TESTS) == 1.0


@pytest.mark.parametrize("tests", [[], "", None, "  "])
def test_without_tests_there_is_no_score(tests):
    assert score(ADD, tests) is None


@pytest.mark.parametrize("tests", [3, [3], [{"input": "x"}], [{"input": 1, "output": 2}], ["assert 1", {"input": ""}]])
def test_tests_of_another_form_are_refused(tests):
    with pytest.raises(DataError, match="tests must be a program of asserts"):
        score(ADD, tests)


@pytest.mark.parametrize(
    "cheat",
    [
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "print('0'); print('passed'); print('all tests passed')",
        "import atexit; atexit.register(print, '0 1 2')",
        "open('tests.json', 'w').write('[]')",
        "import sys; sys.stdout = None; sys.exit()",
        "def add(a, b):\n    raise SystemExit",
        "def add(a, b):\n    import os; os._exit(0)",
        "def add(a, b):\n    while True: pass",
        "while True: pass",
        "def add(",
        "",
        "\ud83d\0",
    ],
)
def test_code_that_does_not_work_gets_nothing_whatever_it_does(cheat):
    assert score(cheat, TESTS, limits={"seconds": 2}) == 0.0


def test_what_ends_the_tests_early_keeps_the_share_before_it():
    code = f"{ADD}right = add\ndef add(a, b):\n    assert a != 5\n    while a < 0: pass\n    return right(a, b)\n"
    assert score(code, TESTS, partial=True, limits={"seconds": 2}) == pytest.approx(1 / 3)


def test_the_expected_output_is_not_in_the_sandbox():
    code = """
import glob
for path in glob.glob('**/*', recursive=True) + glob.glob('/tmp/*') + glob.glob('/proc/*/cmdline'):
    assert '31415' not in open(path).read().replace("'314" + "15'", '')
print(int(input()) + 1)
"""
    assert score(code, [{"input": "31414", "output": "31415"}]) == 1.0


def test_a_batch_runs_several_at_a_time_and_no_more_than_that(monkeypatch):
    running, most = 0, 0
    lock = threading.Lock()
    real = CodeTests._score

    def counted(self, code, tests):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        value = real(self, code, tests)
        with lock:
            running -= 1
        return value

    monkeypatch.setattr(CodeTests, "_score", counted)
    codes = [ADD, WRONG] * 5
    assert CodeTests(workers=3)(completions=codes, tests=[TESTS] * 10) == [1.0, 0.0] * 5
    assert most == 3


def test_it_is_a_reward_by_name_and_as_an_object():
    columns = {"tests": TESTS}
    assert Rubric("code_tests").score("Add.", f"```python\n{ADD}```", columns).parts == {"code_tests": 1.0}
    assert Rubric({CodeTests(partial=True): 2.0}).score("Add.", WRONG, columns).total == pytest.approx(2 / 3)


def test_where_there_is_no_sandbox_the_reward_is_refused_before_it_is_used(monkeypatch):
    bubblewrap.require_bubblewrap.cache_clear()
    from opd.rewards.code import default_code_tests

    default_code_tests.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="apt-get install bubblewrap"):
        Rubric("code_tests")
    with pytest.raises(ConfigError, match="apt-get install bubblewrap"):
        CodeTests()


def test_a_worker_at_least_is_needed():
    with pytest.raises(ConfigError, match="workers = 0 must be 1 or more"):
        CodeTests(workers=0)
