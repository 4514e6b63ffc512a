"""Kinds of failures: exceptions as clients raise them."""

import http.client
import socket
import subprocess
import urllib.error

import httpx
import pytest

from opd.episodes.answers import BadAnswer
from opd.episodes.faults import MOST_CHARACTERS, Failure, explain
from opd.errors import EnvError
from opd.types import Fault


def raised_from(cause):
    try:
        raise EnvError("the tool server is down") from cause
    except EnvError as error:
        return error


def ring():
    error, other = ValueError("a"), ValueError("b")
    error.__cause__, other.__cause__ = other, error
    return error


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (TimeoutError("late"), Fault.TIMEOUT),
        (TimeoutError(), Fault.TIMEOUT),
        (subprocess.TimeoutExpired("ls", 3), Fault.TIMEOUT),
        (httpx.ReadTimeout("late"), Fault.TIMEOUT),
        (httpx.ConnectTimeout("late"), Fault.TIMEOUT),
        (raised_from(TimeoutError()), Fault.TIMEOUT),
        (ConnectionResetError(), Fault.CONNECTION),
        (BrokenPipeError(), Fault.CONNECTION),
        (EOFError(), Fault.CONNECTION),
        (socket.gaierror(-2, "no such name"), Fault.CONNECTION),
        (urllib.error.URLError("refused"), Fault.CONNECTION),
        (http.client.RemoteDisconnected(), Fault.CONNECTION),
        (httpx.ConnectError("refused"), Fault.CONNECTION),
        (httpx.RemoteProtocolError("cut"), Fault.CONNECTION),
        (raised_from(httpx.ReadError("cut")), Fault.CONNECTION),
        (BadAnswer("bytes"), Fault.INVALID),
        (ValueError("no luck"), Fault.RAISED),
        (FileNotFoundError("table.csv"), Fault.RAISED),
        (EnvError("no episode is running"), Fault.RAISED),
        (SystemExit(3), Fault.RAISED),
        (ring(), Fault.RAISED),
        (Failure(Fault.DIED, "gone"), Fault.DIED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value.value,
)
def test_an_exception_is_of_the_infrastructure_or_of_the_environment(error, fault):
    assert explain(error)[0] is fault


def test_kinds_of_the_infrastructure_are_those_that_no_environment_is_to_blame_for():
    assert {fault for fault in Fault if fault.of_infrastructure} == {Fault.TIMEOUT, Fault.CONNECTION, Fault.DIED}


def test_a_reason_is_short_and_can_be_written_down():
    _, reason = explain(ValueError("\ud83d" + "x" * 10_000_000))
    assert reason.startswith("ValueError: ?xxx")
    assert len(reason) == MOST_CHARACTERS
