"""Launchers as users start them, two nodes on the loopback address, and ranks that die."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from opd.tracking import read_rows

ROOT = Path(__file__).resolve().parents[2]
RUN = [sys.executable, "-m", "torch.distributed.run"]
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2"]


def started(command, log, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with log.open("w") as file:
        return subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, cwd=folder, env=environment,
            start_new_session=True,
        )  # fmt: skip


def stopped(processes):
    """End launchers and their ranks, which have process groups of their own and which they end when asked to."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(condition, seconds, logs, processes=()):
    until = time.monotonic() + seconds
    while not condition():
        texts = "\n".join(log.read_text()[-3000:] for log in logs)
        assert all(process.poll() is None for process in processes), f"a launcher ended:\n{texts}"
        assert time.monotonic() < until, f"not within {seconds} s:\n{texts}"
        time.sleep(0.2)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_two_nodes_lose_a_rank_name_it_end_and_go_on_under_deepspeeds_launcher(tmp_path, zero_settings):
    out = tmp_path / "run"
    settings = zero_settings(out, 3, train={"steps": 1000, "save_every": 1, "tasks_per_step": 2})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    logs = [tmp_path / f"node-{n}.log" for n in range(2)]
    agents = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", free_port()]
    nodes = [
        started([*RUN, *agents, "--node_rank", n, "-m", "opd.launch.train", "run.yaml"], logs[n], tmp_path)
        for n in range(2)
    ]
    try:
        wait_for(lambda: len(read_rows(out / "metrics.jsonl")) >= 2, 1200, logs, nodes)
        victim = _rank(1, tmp_path / "run.yaml")
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: all(node.poll() is not None for node in nodes), 180, logs)
    finally:
        stopped(nodes)
    said = logs[0].read_text()
    assert re.search(rf"error: rank 1 \(process {victim} on \S+\) is gone", said), said[-3000:]
    assert all(node.returncode != 0 for node in nodes)

    done = read_rows(out / "metrics.jsonl")[-1]["step"]
    settings["train"]["steps"] = done + 1
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    log = tmp_path / "resumed.log"
    again = started(
        [*DEEPSPEED, "--master_port", free_port(), ROOT / "launch" / "train.py", tmp_path / "run.yaml", "--resume"],
        log,
        tmp_path,
    )
    try:
        wait_for(lambda: again.poll() is not None, 1200, [log])
    finally:
        stopped([again])
    assert again.returncode == 0, log.read_text()[-4000:]
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == list(range(1, done + 2))
    assert (out / "export" / "model.safetensors").is_file()


def _rank(rank, path):
    """The process of a rank, by its environment."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            variables = (entry / "environ").read_bytes().split(b"\0")
            folder = (entry / "cwd").resolve()
        except OSError:
            continue
        if b"opd.launch.train" in command and f"RANK={rank}".encode() in variables and folder == path.parent:
            return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")


def run_of_two_ranks(folder):
    """`opd train run.yaml` on two ranks, once it has ended: the launcher's process, and what all of them said."""
    log = folder / "log"
    process = started([*RUN, "--standalone", "--nproc_per_node", 2, "-m", "opd.launch.train", "run.yaml"], log, folder)
    try:
        wait_for(lambda: process.poll() is not None, 600, [log])
    finally:
        stopped([process])
    return process, log.read_text()


WRONG = {
    "local": (
        {"backend": "local"},
        "error: backend = local is one process, but a launcher started 2: all would train the same. "
        "Set backend: deepspeed, or start one.",
    ),
    "json": (
        {"deepspeed": {"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}}},
        "error: run.yaml: deepspeed.optimizer.params.lr is missing, and the default is not train.lr. "
        'Set "lr": "auto", or a number.',
    ),
}


@pytest.mark.parametrize("wrong", [pytest.param("local", marks=pytest.mark.long), "json"])
def test_a_mistake_that_all_processes_share_is_said_once_and_before_a_model_loads(tmp_path, zero_settings, wrong):
    changed, message = WRONG[wrong]
    settings = zero_settings(tmp_path / "run", None if wrong == "local" else 3) | changed
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    process, said = run_of_two_ranks(tmp_path)
    assert process.returncode != 0
    assert [line for line in said.splitlines() if line.startswith("error:")] == [message]
    assert not (tmp_path / "run").exists()


BROKEN = """
from opd.envs.worlds.lookup import LookupEnv

class Broken(LookupEnv):
    def reset(self, *, seed=None, options=None):
        raise ValueError("the shop's database is gone")
"""


def test_ranks_that_learn_nothing_end_together_and_say_so_once(tmp_path, zero_settings):
    (tmp_path / "broken_env.py").write_text(BROKEN)
    settings = zero_settings(
        tmp_path / "run", 2, env={"id": "broken_env:Broken", "probe": False}, train={"tasks_per_step": 4}
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    _, said = run_of_two_ranks(tmp_path)
    [error] = [line for line in said.splitlines() if line.startswith("error:")]
    assert "train/0 at reset: ValueError: the shop's database is gone" in error
    assert error.endswith(f"Step 2 is saved: opd train {tmp_path / 'run'} --resume"), error
    assert "exitcode  : 1 " in said, said[-3000:]
    assert (tmp_path / "run/checkpoints/step-2/manifest.json").is_file()


LAUNCHERS = {
    "torchrun": [*RUN, "--standalone", "--nproc_per_node", 2, "-m", "opd.launch.train", "run.yaml"],
    "deepspeed": [*DEEPSPEED, "--module", "opd.launch.train", "run.yaml"],
}


@pytest.mark.parametrize(
    ("launcher", "to", "code"),
    [
        pytest.param("torchrun", "rank 1", 1, marks=pytest.mark.long),  # torchrun's own; it names the ranks' 143
        pytest.param("torchrun", "launcher", 1, marks=pytest.mark.long),
        pytest.param("torchrun", "both", 1, marks=pytest.mark.long),
        pytest.param("deepspeed", "rank 1", 143, marks=pytest.mark.long),
        pytest.param("deepspeed", "launcher", 1, marks=pytest.mark.long),  # the process of the node; rank 0 comes first
        pytest.param("deepspeed", "both", 143, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_any_of_the_processes_stops_all_ranks_at_one_step(tmp_path, zero_settings, launcher, to, code):
    settings = zero_settings(tmp_path / "run", 2, train={"steps": 1000, "tasks_per_step": 4})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    log, out = tmp_path / "log", tmp_path / "run"
    command = LAUNCHERS[launcher]
    if launcher == "deepspeed":
        command = [*command[:5], "--master_port", free_port(), *command[5:]]
    process = started(command, log, tmp_path)
    try:
        wait_for(lambda: len(read_rows(out / "metrics.jsonl")) >= 2, 600, [log], [process])
        ranks = [_rank(n, tmp_path / "run.yaml") for n in range(2)]
        node = process.pid if launcher == "torchrun" else _parent(ranks[0])
        since = time.monotonic()
        for pid in {"rank 1": ranks[1:], "launcher": [node], "both": ranks}[to]:
            os.kill(pid, signal.SIGTERM)
        wait_for(lambda: process.poll() is not None, 120, [log])
        took = time.monotonic() - since
    finally:
        stopped([process])
    said = log.read_text()
    told = json.loads((out / "stopped.json").read_text())
    last = read_rows(out / "metrics.jsonl")[-1]["step"]
    assert (told["by"], told["exit_code"], told["step"]) == ("SIGTERM", 143, last), said[-3000:]
    assert told["checkpoint"] == f"checkpoints/step-{last}"
    assert (out / told["checkpoint"] / "manifest.json").is_file()
    assert json.loads((out / told["checkpoint"] / "run.json").read_text())["ranks"] == 2
    assert "is gone; this rank ends too" not in said
    assert process.returncode == code, said[-3000:]
    assert took < 60
    assert not (out / "run.lock").exists()


def _parent(pid):
    """The process that started a rank."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
