"""What is wrong with a server, an argument or a port is said by its setting, before a model loads."""

import importlib.util
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from opd.errors import ConfigError
from opd.launch.checks import engines
from opd.launch.checks.loading import config_from
from opd.launch.checks.servers import check_port, check_servers, check_teaching_servers
from opd.launch.cli.main import main
from opd.teachers.config import TeacherConfig

GOOD = {"method": "opsd", "model": "tiny:lookup", "env": "opd/Lookup-v0"}
UP = {
    "/health": (200, {}),
    "/weight_info": (200, {"weight_version": "default"}),
    "/v1/models": (200, {"data": [{"id": "a", "max_model_len": 512}]}),
}


@pytest.fixture
def serve(monkeypatch):
    """`serve(answers)`: the address of a stand-in that has these answers by path, and its log of keys."""
    monkeypatch.delenv("OPD_VLLM_KEY", raising=False)
    running = []

    def start(answers):
        keys = []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                keys.append(self.headers.get("Authorization"))
                status, body = answers.get(self.path, (404, {}))
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}", keys

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def config(url, **rollout):
    rollout = {"engine": "vllm_server", "max_tokens": 48, "max_length": 512, "vllm": {"servers": [url]}, **rollout}
    return config_from({**GOOD, "rollout": rollout}, check_machine=False).rollout


def test_a_server_that_is_up_and_takes_the_key_is_good(serve, monkeypatch):
    url, keys = serve(UP)
    check_servers(config(url))
    monkeypatch.setenv("OPD_VLLM_KEY", "secret")
    check_servers(config(f"{url}/"))
    assert keys == [None] * 3 + ["Bearer secret"] * 3


@pytest.mark.parametrize("models", [(404, {}), (200, b"<html>"), (200, {"data": []}), (200, [1])])
def test_a_server_that_does_not_tell_its_longest_sequence_is_good_too(serve, models):
    check_servers(config(serve(UP | {"/v1/models": models})[0]))


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "http://127.0.0.1:port", "http://[::1", "http://127.0.0.1:8000/v1", "http://a:99999", "ftp://a",
     "http://", "http://me@a:1", "http://a:1?x=1", "http://a:1\n"],
)  # fmt: skip
@pytest.mark.parametrize("section", ["rollout.vllm", "opd.teacher"])
def test_what_is_no_address_is_said_with_one_that_is(section, url):
    data = {**GOOD, "method": "opd", "opd": {"teacher": {"weights": "external", "model": "a", "servers": []}}}
    data["rollout"] = {"engine": "vllm_server", "vllm": {"servers": []}}
    {"rollout.vllm": data["rollout"]["vllm"], "opd.teacher": data["opd"]["teacher"]}[section]["servers"].append(url)
    with pytest.raises(ConfigError, match=rf"{section}.servers: .*is like http://127.0.0.1:8000, with nothing behind"):
        config_from(data, check_machine=False)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "https://host/", "http://[::1]:1"])
def test_what_is_an_address_is_taken_as_it_is(url):
    assert TeacherConfig(weights="external", model="a", servers=[url]).servers == [url]


@pytest.mark.parametrize("key", ["\u043a\u043b\u044e\u0447", "two\nlines"])
def test_a_key_that_no_request_can_carry_is_said_by_its_variable(serve, monkeypatch, key):
    monkeypatch.setenv("OPD_VLLM_KEY", key)
    with pytest.raises(ConfigError, match=r"OPD_VLLM_KEY \(rollout.vllm.api_key_env\) holds what no key can"):
        check_servers(config(serve(UP)[0]))


def test_nobody_at_the_address_is_an_error_with_the_command_that_starts_a_server():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ConfigError, match=rf"rollout.vllm.servers: {url} does not answer .*`opd serve FILE --port N`"):
        check_servers(config(url))


@pytest.mark.parametrize(("key", "said"), [(None, "there is none in the"), ("wrong", "does not take the key of the")])
def test_a_missing_or_wrong_key_names_the_variable(serve, monkeypatch, key, said):
    if key:
        monkeypatch.setenv("OPD_VLLM_KEY", key)
    url, _ = serve(UP | {"/weight_info": (401, b"a key is needed")})
    with pytest.raises(ConfigError, match=rf"{said} environment variable OPD_VLLM_KEY \(rollout.vllm.api_key_env\)"):
        check_servers(config(url))


@pytest.mark.parametrize(("path", "said"), [("/health", "is not up"), ("/weight_info", "is not .* that takes weights")])
def test_a_server_that_opd_serve_did_not_start_is_refused(serve, path, said):
    with pytest.raises(ConfigError, match=rf"{said} \({path}: status 404\). Start it with `opd serve"):
        check_servers(config(serve({**UP, path: (404, {})})[0]))


def test_a_teachers_server_needs_no_path_of_weights_and_room_for_one_id_more(serve):
    url, _ = serve({path: answer for path, answer in UP.items() if path != "/weight_info"})
    teacher = TeacherConfig(weights="external", model="large", servers=[f"{url}/"])
    check_teaching_servers(teacher, 511, "opd.teacher")
    with pytest.raises(
        ConfigError, match=r"at most 512 ids, but one of .* = 512 .* `opd serve FILE --model large --r.* 513"
    ):
        check_teaching_servers(teacher, 512, "opd.teacher")


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"/health": (503, {})}, r"is not up \(/health: status 503\). Start it with `opd serve FILE --model large"),
        ({"/v1/models": (401, {})}, r"and there is none in the .* OPD_VLLM_KEY \(opd.teacher.api_key_env\)"),
        ({"/v1/models": (404, {})}, r"is no vLLM server: /v1/models names no model \(status 404\)"),
        ({"/v1/models": (200, b"<html>welcome</html>")}, r"is no vLLM server: /v1/models names no model"),
        ({"/v1/models": (200, {"data": []})}, r"is no vLLM server: /v1/models names no model"),
    ],
)
def test_a_teachers_server_that_cannot_be_asked_is_refused(serve, answers, said):
    teacher = TeacherConfig(weights="external", model="large", servers=[serve(UP | answers)[0]])
    with pytest.raises(ConfigError, match=said):
        check_teaching_servers(teacher, 100, "opd.teacher")


def test_a_server_for_shorter_sequences_is_refused_with_both_lengths(serve):
    url, _ = serve(UP)
    with pytest.raises(ConfigError, match=r"at most 512 ids, but rollout.max_length = 1024. .*max_length 1024`"):
        check_servers(config(url, max_length=1024))


def test_a_dry_run_says_that_nobody_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "is_installed", lambda package: True)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    file = tmp_path / "run.yaml"
    file.write_text("method: opsd\nmodel: tiny:lookup\nenv: opd/Lookup-v0\n")
    command = ["train", str(file), "--dry-run", "--rollout.engine", "vllm_server", "--rollout.vllm.servers", f"[{url}]"]
    assert main(command) == 2
    assert f"error: rollout.vllm.servers: {url} does not answer" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM's own list of its arguments is needed")
def test_an_unknown_argument_of_vllm_is_named_with_the_nearest():
    rollout = {"engine": "vllm", "vllm": {"engine_args": {"block_sizes": 3, "swap_space": 1, "block_size": 3}}}
    with pytest.raises(ConfigError) as caught:
        config_from({**GOOD, "rollout": rollout})
    assert 'rollout.vllm.engine_args.block_sizes is no argument of vLLM\'s engine. Did you mean "block_size"?' in str(
        caught.value
    )
    assert "engine_args.block_size is" not in str(caught.value)


def test_without_vllm_its_arguments_are_not_judged(monkeypatch):
    monkeypatch.setattr(engines, "_engine_args", frozenset)
    rollout = {"engine": "vllm_server", "vllm": {"engine_args": {"anything": 3}}}
    parsed = config_from({**GOOD, "rollout": rollout}, check_machine=False).rollout
    assert engines.check_engine_args(parsed) == []


def test_a_busy_port_is_refused():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port {port} is in use on 127.0.0.1. Choose another"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)


def test_a_port_or_host_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="--port 70000 is beyond 65535"):
        check_port("127.0.0.1", 70000)
    with pytest.raises(ConfigError, match=r"--host 203.0.113.7 --port 80: nobody can listen there"):
        check_port("203.0.113.7", 80)
