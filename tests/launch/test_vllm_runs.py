"""Whole runs whose rollouts come from vLLM: they learn as with the embedded engine, and outlive their own servers.

In one run with a server, that server is killed in the middle of a rollout and in the middle of an update. A shorter
form of the runs in docs/vllm.md, which say how far each engine gets.
"""

import os
import signal
import subprocess
from collections import Counter

import pytest
from transformers import AutoModelForCausalLM

from opd.engines.vllm_http import Server
from opd.engines.vllm_process import OwnServer
from opd.engines.vllm_server import VllmServerEngine
from opd.launch.tiny.build import build_tiny
from opd.launch.train import train
from opd.tracking import read_rows

pytest.importorskip("vllm", reason="vLLM is not installed: make test installs its CPU build where there is no GPU")
pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

STEPS, TASKS = 30, 32


@pytest.fixture(scope="module")
def agent():
    """The demo's agent, which solves about half of its tasks; from the cache, if another test has built it."""
    return build_tiny("lookup", quiet=True)


@pytest.fixture
def settings(agent, tmp_path):
    def make(engine):
        return {
            "method": "opsd",
            "out": str(tmp_path / engine),
            "model": str(agent),
            "env": "opd/Lookup-v0",
            "rollout": {
                "engine": engine,
                "deterministic": False,
                "max_tokens": 48,
                "max_length": 512,
                # A machine that is busy with other tests takes minutes to start a server.
                "vllm": {"kv_cache_gib": 0.25} | ({"restart_timeout": 1500} if engine == "vllm_server" else {}),
            },
            "train": {"steps": STEPS, "tasks_per_step": TASKS, "lr": 2e-3, "threads": 1},
            "eval": {"tasks": 100},
            "tracking": {"wandb": "disabled", "console": False, "plot": False, "rollouts_per_step": TASKS},
            "opsd": {"privileged": "plan", "divergence": {"clip": None}},
        }

    return make


def assert_learned(result):
    """On the way to what the embedded engine reaches (docs/vllm.md), by tokens of the trainer's own network."""
    assert result.before.rate < 0.7
    assert result.after.rate > max(0.7, result.before.rate + 0.1)
    rows = read_rows(result.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert max(row["sampler/gap"] for row in rows) < 1e-4
    assert {row["tokens/trained"] / row["tokens/sampled"] for row in rows} == {1.0}
    assert {row["rollout/episodes"] for row in rows} == {TASKS}
    return rows


def test_a_run_learns_from_rollouts_of_vllm_in_its_own_process(settings):
    rows = assert_learned(train(settings("vllm")))
    assert min(row["engine/prefix_hits"] for row in rows) > 0


def test_a_resumed_run_with_adapters_samples_from_them_merged_once(settings):
    short = settings("vllm") | {"eval": {"tasks": 0}}
    short["model"] = {"name": short["model"], "lora": {"r": 4}}
    short["train"] |= {"steps": 2, "tasks_per_step": 8, "lr": 1e-2}
    train(short)
    short["train"]["steps"] = 4
    result = train(short, resume=True)
    rows = read_rows(result.out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert max(row["sampler/gap"] for row in rows) < 1e-5
    first, last = (AutoModelForCausalLM.from_pretrained(f) for f in (short["model"]["name"], result.out / "export"))
    moved = [(p - q).abs().max() for p, q in zip(first.parameters(), last.parameters(), strict=True)]
    assert max(moved) > 1e-3  # else a second merge would not show


@pytest.fixture
def killed(monkeypatch):
    """Kills the run's server in the middle of the rollouts of its third step, and of a later update."""
    started, killed = [], []

    def kill(when):
        killed.append(when)
        children = ["pgrep", "-P", str(started[0]._process.pid)]
        [server] = subprocess.run(children, capture_output=True, text=True, check=True).stdout.split()
        os.kill(int(server), signal.SIGKILL)

    start, submit, send = OwnServer.start, VllmServerEngine.submit, Server.send_chunk

    def watched_start(self):
        started.append(self)
        return start(self)

    def watched_submit(self, request):
        submit(self, request)
        if self.policy_version == 2 and len(self._flights) > TASKS // 2 and "rollout" not in killed:
            kill("rollout")

    def watched_send(self, text):
        updates.append(1)
        if len(updates) >= 5 and "update" not in killed:
            kill("update")
        send(self, text)

    updates = []
    monkeypatch.setattr(OwnServer, "start", watched_start)
    monkeypatch.setattr(VllmServerEngine, "submit", watched_submit)
    monkeypatch.setattr(Server, "send_chunk", watched_send)
    return killed


def test_a_run_learns_from_its_own_server_and_loses_nothing_when_that_is_killed(settings, killed):
    result = train(settings("vllm_server"))
    assert killed == ["rollout", "update"]
    rows = assert_learned(result)
    assert sum(row.get("engine/fault_lost", 0) for row in rows) >= 1
    episodes = read_rows(result.out / "rollouts.jsonl")
    played = Counter((episode["step"], episode["task"]) for episode in episodes)
    assert len(played) == STEPS * TASKS
    assert set(played.values()) == {1}
    assert len({task for _, task in played}) == STEPS * TASKS  # no task was played at two steps
    assert all(episode["policy_version"] == episode["step"] - 1 for episode in episodes)
