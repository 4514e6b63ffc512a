"""What counts as a secret, and how it is taken out of texts: by name, by form, and by what the process knows.

Not covered: forms of keys beyond those that are listed here.
"""

import json
import logging
import sys
import time

import pytest

from opd import secrets
from opd.engines.vllm_process import OwnServer
from opd.episodes.answers import BadAnswer, step
from opd.episodes.faults import explain
from opd.errors import ConfigError
from opd.secrets import know, know_settings, redact, redacted, tells_of_secret, without_secrets
from opd.trainers.parts.episodes import to_row
from opd.types import End, Task, Trajectory, Turn
from opd.variables import resolve


@pytest.fixture(autouse=True)
def nothing_known():
    secrets.forget()
    yield
    secrets.forget()


SECRET = ["api_key", "apiKey", "API-KEY", "key", "keys_secret", "token", "X-Auth-Token", "password", "db_password"]
SECRET += [
    "Authorization",
    "credentials",
    "client_secret",
    "api_keys",
    "access_tokens",
    "HF_TOKEN",
    "openai_key",
    "auth",
]
OTHER = ["max_tokens", "tokens_per_microbatch", "tokenizer", "api_key_env", "key_file", "keyboard", "author", "monkey"]
OTHER += ["secret_name", "token_count", "tokens", "keys", "", "name", "step"]


@pytest.mark.parametrize("name", SECRET)
def test_a_name_tells_of_a_secret(name):
    assert tells_of_secret(name)


@pytest.mark.parametrize("name", OTHER)
def test_a_name_tells_of_no_secret(name):
    assert not tells_of_secret(name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("with sk-abcDEF1234567890abcdef, and on", "with ***, and on"),
        ("q=%20sk-abcDEF1234567890abcdef", "q=%20***"),
        ("hf_AbCdEfGhIjKlMnOpQrStUv", "***"),
        ("ghp_0123456789abcdefghijABCDEFGHIJ012345", "***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("xoxb-123456789012-abcdef", "***"),
        ("get https://me:pa-55@host:80/x?api_key=abcd1234&page=2", "get https://me:***@host:80/x?api_key=***&page=2"),
        ('{"Authorization": "Bearer abc.def-123"}', '{"Authorization": "Bearer ***"}'),
        ("authorization: Basic dXNlcjpwYXNz", "authorization: Basic ***"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE/+=\n-----END RSA PRIVATE KEY-----\nrest", "***\nrest"),
    ],
)
def test_what_has_the_form_of_a_key_is_hidden(text, shown):
    assert redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "the bearer certificates",
        "Basic understanding",
        "sk-toggleable__content-arrow",
        "a:b@c",
        "https://host/a?page=2",
    ],
)
def test_a_text_that_only_resembles_a_key_stays(text):
    assert redact(text) == text


def test_a_known_secret_is_hidden_however_it_is_spelled():
    secret = 'p/a"ss\\wört %1'
    know(secret)
    spelled = [secret, json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret)]
    spelled += ["https://h/p%2Fa%22ss%5Cw%C3%B6rt%20%251/x", "k=p%2Fa%22ss%5Cw%C3%B6rt+%251"]
    spelled += ["https://h/p/a%22ss%5cw%c3%b6rt%20%251", 'k=p/a"ss\\wört+%251']  # clients differ in what they encode
    for text in spelled:
        assert "ss" not in redact(text)
    assert redact(f"a {secret} b") == "a *** b"


def test_the_longer_of_two_secrets_goes_first():
    know("abcdef")
    know("abcdefghi")
    assert redact("abcdefghi abcdef") == "*** ***"


def test_a_short_secret_is_hidden_where_it_is_set_alone():
    settings = {"env": {"kwargs": {"password": "abc", "note": "abcdef"}}}
    assert know_settings(settings) == ["env.kwargs.password"]
    assert without_secrets(settings) == {"env": {"kwargs": {"password": "***", "note": "abcdef"}}}
    assert redact("abcdef") == "abcdef"


def test_secrets_are_found_in_settings_by_name_and_by_form_at_any_depth():
    settings = {
        "a": {"credentials": {"user": "somebody", "pin": 123456}},
        "b": [{"headers": {"Authorization": "Bearer abcdef123456"}}],
        "c": {"url": "postgres://me:hunter22@host/db", "plain": "sk-abcdefghij"},
        "d": {"sort_key": "answer", "pad_token": "<pad>", "max_tokens": 123456, "api_key_env": "OPENAI_API_KEY"},
        "e": {"token": "${env:TOKEN}", "headers": {"Authorization": "Bearer ${env:TOKEN}"}, "key": None, "secret": ""},
        "f": {"api_keys": ["one-of-them", "two-of-them"]},
    }
    assert know_settings(settings) == [
        *("a.credentials.user", "a.credentials.pin", "b.headers.Authorization", "c.url", "c.plain", "f.api_keys"),
    ]
    assert without_secrets(settings) == settings | {
        "a": {"credentials": {"user": "***", "pin": "***"}},
        "b": [{"headers": {"Authorization": "***"}}],
        "c": {"url": "postgres://me:***@host/db", "plain": "***"},
        "f": {"api_keys": ["***", "***"]},
    }
    assert redact("somebody 123456 hunter22 sk-abcdefghij two-of-them answer") == "*** *** *** *** *** answer"


def test_a_key_that_a_setting_names_by_its_variable_is_known(monkeypatch):
    monkeypatch.setenv("WHERE_IT_STANDS", "what-it-holds")
    assert know_settings({"opd": {"teacher": {"api_key_env": "WHERE_IT_STANDS"}}}) == []
    assert redact("what-it-holds") == "***"


def test_variables_are_known_by_their_names(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "held-by-the-process")
    monkeypatch.setenv("SORT_KEY", "ascending")
    monkeypatch.setenv("SOME_PLACE", "not-a-secret")
    secrets.know_environment()
    assert redact("held-by-the-process ascending not-a-secret") == "*** ascending not-a-secret"


def test_a_path_behind_a_variable_is_shown_and_a_key_is_not(monkeypatch, tmp_path):
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("PLACE_KEY", "value-of-the-key")
    made = resolve({"a": ["${env:PLACE}/x", "${env:PLACE_KEY}"]}, "env.kwargs")
    assert made == {"a": [f"{tmp_path}/x", "value-of-the-key"]}
    assert redact(f"{tmp_path} value-of-the-key") == f"{tmp_path} ***"
    with pytest.raises(ConfigError, match=r"^env.kwargs.a.1: the environment variable NO_PLACE is not set"):
        resolve({"a": ["x", "${env:NO_PLACE}"]}, "env.kwargs")


def test_errors_logs_and_the_console_show_no_secret(capsys, caplog):
    know("a-secret-of-ours")
    assert str(ConfigError("seen: a-secret-of-ours")) == "seen: ***"
    try:
        raise ValueError("with a-secret-of-ours")
    except ValueError:
        logging.getLogger("somebody").exception("%s and %d", "a-secret-of-ours", 3)
    assert caplog.messages == ["*** and 3"]
    assert "ValueError: with ***" in caplog.text
    secrets.redact_console()
    secrets.redact_console()
    print("out: a-secret-of-ours")
    print("err: a-secret-of-ours", file=sys.stderr)
    assert capsys.readouterr() == ("out: ***\n", "err: ***\n")


def test_a_secret_at_the_place_where_a_reason_is_cut_leaves_nothing():
    know("a-secret-of-ours")
    for length in range(470, 500):
        assert "a-sec" not in explain(RuntimeError("x" * length + "a-secret-of-ours"))[1]


def test_an_answer_that_breaks_the_contract_is_shown_without_secrets():
    know("a-secret-of-ours-that-is-quite-long")

    class Env:
        def step(self, action):
            return {"key": "a-secret-of-ours-that-is-quite-long"}

        def close(self):
            pass

    with pytest.raises(BadAnswer, match=r"it returned \{'key': '\*\*\*'\}"):
        step(Env(), "")


def test_a_stored_episode_keeps_its_ids_and_hides_secrets_in_its_texts():
    know("a-secret-of-ours")
    messages = [{"role": "user", "content": "a-secret-of-ours"}]
    turn = Turn(
        prompt_ids=[1, 2],
        completion_ids=[3],
        logprobs=[-1.0],
        stop_reason="stop",
        messages=messages,
        text="a-secret-of-ours",
    )
    episode = Trajectory(task=Task(index=0, seed=0), member=0, turns=[turn], end=End.FINISHED)
    row = to_row(episode)
    assert [message["content"] for message in row["messages"]] == ["***", "***"]
    assert row["turns"][0]["prompt_ids"] == [1, 2]
    assert episode.messages[0]["content"] == "a-secret-of-ours"  # what a model reads is as it was


def test_what_is_no_plain_data_stays_as_it_is():
    know("a-secret-of-ours")
    thing = object()
    assert redacted({"a-secret-of-ours": [thing, 1, None, ("a-secret-of-ours",)]}) == {"***": [thing, 1, None, ["***"]]}


@pytest.mark.parametrize(
    "piece", ["sk-", "://", "eyJaaaaaaaaaaa.", "Bearer ", "-----BEGIN PRIVATE KEY-----", "?key=", "a:b"]
)
def test_a_long_text_is_redacted_in_time(piece):
    since = time.perf_counter()
    redact(piece * (200_000 // len(piece)))
    assert time.perf_counter() - since < 6


def test_a_servers_log_holds_no_secret(tmp_path):
    know("key-of-the-server")
    server = OwnServer("model", {}, key="key-of-the-server", log=tmp_path / "vllm-0.log")
    program = "import os, sys; print('out', os.environ['VLLM_API_KEY']); print(sys.argv[1], file=sys.stderr)"
    server._command = [sys.executable, "-c", program, "key-of-the-server"]
    server.start()
    server._process.wait(30)
    said = server.last_words()
    server.stop()
    assert "out ***" in said
    assert "key-of" not in (tmp_path / "vllm-0.log").read_text()
