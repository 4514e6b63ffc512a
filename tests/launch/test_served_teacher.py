"""A teacher behind a real vLLM server teaches as the same one does that is held here."""

import os
import socket
import subprocess
import sys
import time

import httpx
import pytest

from opd.errors import ConfigError, EngineError
from opd.launch.checks.loading import config_from
from opd.launch.train import train
from opd.tracking import read_rows

KEY = "a key"
FORMS = {"sampled": {}, "top_k": {"form": "exact", "divergence": {"top_k": 5, "support": "teacher"}}}


def served(teacher, url, **own):
    return {"teacher": {"weights": "external", "model": str(teacher), "servers": [url], **own}}


@pytest.fixture
def settings(models, tmp_path):
    def make(name, section, method="opd", **sections):
        return {
            "method": method,
            "out": str(tmp_path / name),
            "model": str(models[0]),
            "env": {"id": "opd/Lookup-v0", "max_turns": 3},
            "rollout": {"max_tokens": 10, "max_length": 256},
            "train": {"steps": 3, "tasks_per_step": 4, "lr": 1e-3, "threads": 1, "tokens_per_microbatch": 600},
            "tracking": {"wandb": "disabled", "console": False, "plot": False},
            method: section,
            **sections,
        }

    return make


@pytest.fixture(scope="module")
def models(tiny_model):
    """A student and its teacher, hardly warmed up."""
    return tiny_model(), tiny_model("lookup-expert", steps=30)


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    """The address of `opd serve` with the teacher."""
    pytest.importorskip("vllm", reason="vLLM is not installed: make test installs its CPU build where there is no GPU")
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "run.yaml").write_text(
        f"{{method: grpo, model: {models[1]}, env: opd/Lookup-v0, rollout: {{engine: vllm_server, max_length: 512, "
        "max_tokens: 8, vllm: {kv_cache_gib: 0.25}}}"
    )
    command = [sys.executable, "-m", "opd.launch.cli", "serve", str(folder / "run.yaml"), "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | {"OPD_VLLM_KEY": KEY}, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(2400):
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health", timeout=2).status_code == httpx.codes.OK:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


@pytest.mark.parametrize("form", ["sampled", pytest.param("top_k", marks=pytest.mark.long)])
def test_a_served_teacher_teaches_as_the_same_one_does_here(settings, models, server, monkeypatch, form):
    monkeypatch.setenv("OPD_VLLM_KEY", KEY)
    here = {"teacher": {"weights": "external", "model": str(models[1])}}
    rows = {
        name: read_rows(train(settings(name, section | FORMS[form])).out / "metrics.jsonl")
        for name, section in {"here": here, "there": served(models[1], server)}.items()
    }
    for key in ("train/loss", "train/grad_norm", "distill/nats"):
        expected = [row[key] for row in rows["here"]]
        assert [row[key] for row in rows["there"]] == pytest.approx(expected, rel=2e-3, abs=1e-5), key
        assert all(expected)


@pytest.mark.long
def test_a_teacher_that_sees_more_is_asked_in_its_own_context(settings, models, server, monkeypatch):
    """Skill-SD with a fixed text: the teacher's view holds more than the sample."""
    monkeypatch.setenv("OPD_VLLM_KEY", KEY)
    own = {"fixed": "plan", "distill": 0.5}
    here = {"teacher": {"weights": "external", "model": str(models[1])}} | own
    rows = {
        name: read_rows(train(settings(name, section, "skill_sd")).out / "metrics.jsonl")
        for name, section in {"here": here, "there": served(models[1], server) | own}.items()
    }
    for key in ("train/loss", "distill/nats"):
        expected = [row[key] for row in rows["here"]]
        assert [row[key] for row in rows["there"]] == pytest.approx(expected, rel=2e-3, abs=1e-5), key


def test_a_server_with_another_key_is_told_before_anything_loads(settings, models, server, monkeypatch):
    monkeypatch.setenv("OPD_VLLM_KEY", "wrong")
    with pytest.raises(ConfigError, match=r"does not take the key of .* OPD_VLLM_KEY"):
        train(settings("x", served(models[1], server)))


def test_a_server_that_is_not_there_is_told_before_anything_loads(settings, models):
    with pytest.raises(ConfigError, match=r"teacher.servers: http://127.0.0.1:9 does not answer .*`opd serve FILE"):
        train(settings("x", served(models[1], "http://127.0.0.1:9")))


@pytest.mark.parametrize(
    ("own", "sections", "name"),
    [
        ({"form": "exact", "divergence": {"top_k": None}}, {}, "whole vocabulary"),
        ({"form": "exact", "divergence": {"top_k": 5, "support": "student"}}, {}, "support = student"),
        ({"baseline": "full"}, {}, "a baseline"),
        ({}, {"weighting": {"entropy": 1.0}}, "weighting.entropy"),
        ({}, {"rollout": {"max_tokens": 10, "max_length": 256, "temperature": 0.7}}, "rollout.temperature"),
    ],
)
def test_what_a_served_teacher_cannot_say_is_refused_by_name(settings, models, own, sections, name):
    with pytest.raises(ConfigError, match=f"opd.teacher.servers: .* It cannot do: .*{name}"):
        config_from(settings("x", served(models[1], "http://127.0.0.1:9") | own, **sections))


def test_a_method_that_loads_its_teacher_to_score_ahead_takes_no_servers(settings, models):
    with pytest.raises(ConfigError, match=r"lightning_opd.teacher.servers has no effect"):
        config_from(settings("x", served(models[1], "http://127.0.0.1:9"), "lightning_opd"))


def test_servers_belong_to_an_external_teacher(settings, models):
    section = {"teacher": {"weights": "live", "servers": ["http://127.0.0.1:9"]}}
    with pytest.raises(ConfigError, match=r"teacher.servers is used by weights = external alone"):
        config_from(settings("x", section, "skill_sd"))


@pytest.mark.long
def test_a_teacher_that_is_lost_ends_the_run_with_its_last_step_saved(settings, models, server, monkeypatch):
    """In the second step the server no longer knows the key: an answer that no retry mends."""
    monkeypatch.setenv("OPD_VLLM_KEY", KEY)
    from opd.teachers.served import ServedTeacher

    asked, calls = ServedTeacher.asked, []

    def later(self, samples):
        calls.append(len(samples))
        if len(calls) == 2:
            for one in self.scorer._servers:
                one._client.headers["Authorization"] = "Bearer wrong"
        return asked(self, samples)

    monkeypatch.setattr(ServedTeacher, "asked", later)
    with pytest.raises(EngineError, match=r"scoring failed 1 times.*401.* Step 1 is saved"):
        train(settings("lost", served(models[1], server)))
