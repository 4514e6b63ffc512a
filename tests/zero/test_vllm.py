"""The whole shape: OPSD on a tool environment, ZeRO-3 on two ranks, and vLLM in each of them, or as its
server, or as one server for both."""

import json
import os
import socket
import subprocess
import sys
import time

import httpx
import pytest
import yaml

from opd.tracking import read_rows

pytest.importorskip("vllm", reason="the real vLLM is not installed")
ENGINES = ("vllm", "vllm_server", "one_server")


@pytest.fixture(scope="module")
def served(tmp_path_factory, zero_settings):
    """The port of a server that stands by itself, which both ranks share."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "run.yaml").write_text(yaml.safe_dump(zero_settings(folder / "out", rollout={"engine": "vllm_server"})))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "opd.launch.cli", "serve", str(folder / "run.yaml"), "--port", str(port)]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        wait_until_up(server, port, folder / "log")
        yield port
    finally:
        server.terminate()
        server.wait(timeout=180)


def wait_until_up(server, port, log):
    until = time.monotonic() + 900
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").is_success:
                return
        except httpx.HTTPError:
            pass
        assert server.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, zero_settings, launch, served):
    """Three steps with each engine; every step but the first samples after an update."""
    root = tmp_path_factory.mktemp("whole")

    def case(name):
        engine = "vllm" if name == "vllm" else "vllm_server"
        rollout = {"engine": engine, "deterministic": False, "concurrency": 8}
        if name == "one_server":
            rollout["vllm"] = {"servers": [f"http://127.0.0.1:{served}"]}
        train = {"steps": 3, "tasks_per_step": 4, "lr": 1e-2}
        return {"do": "fresh", "config": zero_settings(root / name, 3, rollout=rollout, train=train)}

    launch([case(engine) for engine in ENGINES])
    return root


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
def test_after_every_update_vllm_samples_from_the_slices_that_train(runs, engine):
    gaps = json.loads((runs / engine / "gaps.json").read_text())
    assert len(gaps) == 3
    assert max(gaps) < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
def test_every_rank_played_its_share_and_what_it_played_was_trained(runs, engine):
    rows = read_rows(runs / engine / "metrics.jsonl")
    assert [row["rollout/episodes"] for row in rows] == [4.0] * 3
    assert [row["rollout/failed"] for row in rows] == [0.0] * 3
    assert all(row["tokens/trained"] == row["tokens/sampled"] > 0 for row in rows)
    assert len({row["train/loss"] for row in rows}) == 3
