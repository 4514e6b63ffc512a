"""Summaries from a server: a small real HTTP server that is late, busy, huge, malformed, or refuses."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from opd.errors import EngineError
from opd.trainers.skill_sd import server
from opd.trainers.skill_sd.server import ChatServer, checked_url

GOOD = {"choices": [{"message": {"role": "assistant", "content": "Look twice."}}]}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)


@contextmanager
def serving(*answers):
    """A server that gives these answers, one after the other: (status, body), or a function of the handler."""
    left, asked = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            answer = left.pop(0)
            try:
                if callable(answer):
                    return answer(self)
                status, text = answer
                raw = text if isinstance(text, bytes) else json.dumps(text).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)
            except OSError:
                pass  # the client hung up, as it should

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", asked
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def client(url, **changes):
    return ChatServer(**({"url": url, "model": "m", "timeout": 0.5, "retries": 2, "max_tokens": 32} | changes))


def test_a_question_goes_out_as_one_user_message_and_its_answer_comes_back():
    with serving((200, GOOD)) as (url, asked):
        assert client(url, key="secret").ask("What did you learn?") == "Look twice."
    [(path, key, body)] = asked
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["messages"] == [{"role": "user", "content": "What did you learn?"}]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 32, 0.0)


def hangs_up(handler):
    handler.connection.close()


def sleeps(handler):
    time.sleep(1.0)
    handler.send_response(200)
    handler.end_headers()


def drips(handler):
    """A byte now and then: no single read is ever late."""
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def floods(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b"x" * (1 << 16))


BROKEN = {
    "busy": (429, {}),
    "an error of its own": (503, b"oops"),
    "no JSON": (200, b"<html>"),
    "no choices": (200, {"choices": []}),
    "another shape": (200, [1, 2]),
    "a deep hole": (200, b"[" * 100_000),
    "no text": (200, {"choices": [{"message": {"content": None}}]}),
    "white space": (200, {"choices": [{"message": {"content": " \n"}}]}),
    "hangs up": hangs_up,
    "late": sleeps,
    "late bit by bit": drips,
    "without an end": floods,
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_may_pass_is_asked_again(fault):
    with serving(BROKEN[fault], (200, GOOD)) as (url, asked):
        assert client(url).ask("?") == "Look twice."
    assert len(asked) == 2


def test_after_its_retries_there_is_no_answer_and_no_error():
    with serving(*[(500, {})] * 3) as (url, asked):
        assert client(url).ask("?") is None
    assert len(asked) == 3


def test_a_server_that_is_not_there_gives_no_answer_in_time():
    with serving() as (url, _):
        pass
    since = time.monotonic()
    assert client(url).ask("?") is None
    assert time.monotonic() - since < 5


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_will_not_pass_is_an_error_that_says_what_the_server_said(status):
    refused = pytest.raises(EngineError, match=rf"refuses to summarise with status {status}: .*no such model")
    with serving((status, {"error": "no such model"})) as (url, asked), refused:
        client(url).ask("?")
    assert len(asked) == 1


ADDRESSES = ["http://127.0.0.1:8000/v1", "https://api.example.com/v1", "http://[::1]:80/v1", "http://localhost"]


@pytest.mark.parametrize("url", ADDRESSES)
def test_an_address_that_can_be_asked_is_left_as_it_is(url):
    assert checked_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        *("", "/v1", "127.0.0.1:8000/v1", "localhost:8000", "ftp://a/v1", "http://", "http:///v1", "http://a b/v1"),
        *("http://127.0.0.1:port/v1", "http://127.0.0.1:99999/v1", "http://[::1/v1", "http://x/v1?key=3", "http://a/ "),
        *("http://a\n/v1", f"http://{'a' * 64}.de/v1", "http://" + "a" * 70_000),
    ],
)
def test_what_cannot_be_asked_is_no_address(url):
    with pytest.raises(ValueError, match=r"; it must be like http://127\.0\.0\.1:8000/v1$"):
        checked_url(url)
