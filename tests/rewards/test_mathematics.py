"""math-verify in a process of its own: right answers, hostile ones.

How such a process is killed, replaced and locked is tested in `tests/opd/test_graders.py`.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from opd.errors import ConfigError
from opd.rewards import MathVerify, mathematics


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
        "9**9**9",
        "$" + "(" * 3000 + "3" + ")" * 3000 + "$",
        r"\boxed{" * 10_000,
        "3" * 1_000_000,
        "\ud800\0\n{}",
    ],
)
def test_a_hostile_answer_is_wrong_within_its_time(hostile):
    since = time.monotonic()
    assert MathVerify(time_limit=2)([hostile], answer=["3"]) == [0.0]
    assert time.monotonic() - since < 30  # with the start of its process on a busy machine


def test_other_threads_are_answered_too():
    with ThreadPoolExecutor(4) as threads:
        rewards = list(threads.map(lambda n: MathVerify()([f"${n}/2$"], answer=[f"{n / 2}"]), range(8)))
    assert rewards == [[1.0]] * 8


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(mathematics, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package math-verify: pip install 'opd\[math\]'"):
        MathVerify()


def test_a_time_limit_below_a_second_is_refused():
    with pytest.raises(ConfigError, match=r"math_verify: time_limit = 0.5 must be at least 1"):
        MathVerify(time_limit=0.5)
