"""Every example and every method trains for two steps, and what the run leaves in its folder can be read again.

A method that is registered and a file that is laid into examples/ are covered by that; a method without an example
fails by its name. The runs are small (conftest.py says how), their models know nothing: not covered is whether an
example learns what it says. GPUs have test_gpu.py.
"""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.launch.checks.loading import load_config
from opd.launch.cli import main
from opd.launch.train import train
from opd.models.loading import load
from opd.tracking import read_rows
from opd.trainers.loop.registry import METHODS

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted({*METHODS, *(path.stem for path in (ROOT / "examples").glob("*.yaml"))})
LONG = {
    "frozen_lake": "SmolLM2 has 135 million parameters: minutes and 3 GB for two steps",
    "opsd_smollm2": "SmolLM2 has 135 million parameters: minutes and 3 GB for two steps",
    "opsd_zero3_vllm": "vLLM starts in two processes, which tests/zero/test_vllm.py sees too",
}
"""Examples that `make long` alone trains, and why."""


@pytest.fixture(scope="module", autouse=True)
def _coin_env():
    """The environment of the methods that need episodes of both kinds, also in the processes that a test starts."""
    folder = str(ROOT / "tests/zero")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")])))
        yield


@pytest.fixture(scope="module")
def teacher(tiny_model):
    """Another model of the student's tokenizer."""
    return tiny_model(seed=1)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def in_two_processes(path, changes, folder):
    """Train as the example says it: `deepspeed --num_gpus 2 --module opd.launch.train FILE --key value ...`."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port()]
    options = [word for key, value in changes.items() for word in (f"--{key}", as_word(value))]
    command += ["--module", "opd.launch.train", str(path), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with (folder / "log").open("w") as log:
        launcher = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment, start_new_session=True
        )
        try:
            code = launcher.wait(timeout=1500)
        finally:
            launcher.terminate()  # which ends the ranks too
            launcher.wait(timeout=120)
    said = (folder / "log").read_text()
    assert code == 0, said[-6000:]
    assert "held-out tasks" in said


def as_word(value):
    return value if isinstance(value, str) else json.dumps(value)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in NAMES])
def test_two_steps_of_an_example_leave_a_whole_run(name, small_example, tiny, teacher, tmp_path):
    out = tmp_path / "run"
    assert (ROOT / f"examples/{name}.yaml").is_file(), f"method {name} has no example: write examples/{name}.yaml"
    path, changes = small_example(name, out, student=tiny, teacher=teacher)
    for package in needed(load_config(path, changes, check_machine=False)):
        pytest.importorskip(package, reason=f"{package} is not installed")
    config = load_config(path, changes)
    if config.backend == "deepspeed":
        changes = changes | {"tracking.console": True}  # whose log is read
        config = load_config(path, changes)
        in_two_processes(path, changes, tmp_path)
    else:
        assert train(config).steps == sum(config.stage_steps)
    whole_rows(out, steps=sum(config.stage_steps))
    left = load_config(out)
    assert left.dump() == config.at(out).on_the_day(str(left.chat.date)).dump()
    a_trained_model(out / "export", start=config.model)
    what_commands_read(out)


def needed(config):
    """The packages that the example needs beyond the project's own."""
    wanted = {"deepspeed": config.backend == "deepspeed", "vllm": "vllm" in config.rollout.engine}
    return [package for package, used in wanted.items() if used]


def whole_rows(out, *, steps):
    """metrics.jsonl has a finite row for each step, rollouts.jsonl the episodes of those that played.

    evals.jsonl begins before the first step and ends after the last.
    """
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert math.isfinite(row["train/loss"])
        assert math.isfinite(row["train/grad_norm"])
        assert row["train/skipped"] == 0
        assert row["tokens/trained"] > 0
    assert any(row["train/grad_norm"] > 0 for row in rows)
    evaluated = [row["step"] for row in read_rows(out / "evals.jsonl")]
    assert (evaluated[0], evaluated[-1]) == (0, steps)
    episodes = read_rows(out / "rollouts.jsonl")
    assert {e["step"] for e in episodes} == {row["step"] for row in rows if row.get("rollout/episodes")}
    assert all(e["messages"] and e["tokens"] > 0 and math.isfinite(e["reward"]) for e in episodes)


def a_trained_model(export, *, start):
    """The export loads by itself, and is not what training started from."""
    trained = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    before = load(start)
    assert tokenizer.get_vocab() == before.tokenizer.get_vocab()
    weights = before.model.model.state_dict()
    moved = [float((weight - weights[name]).abs().max()) for name, weight in trained.state_dict().items()]
    assert all(map(math.isfinite, moved))
    assert max(moved) > 0
    assert all(torch.isfinite(weight).all() for weight in trained.state_dict().values())


def what_commands_read(out):
    """The commands that read what some methods leave in data/ find it whole."""
    if (out / "data/store").is_dir():
        assert main(["store", "inspect", str(out)]) == 0
        assert main(["store", "verify", str(out)]) == 0
    if (out / "data/skills.jsonl").is_file():
        assert main(["skills", "list", str(out)]) == 0


@pytest.mark.parametrize("name", LONG)
def test_what_is_left_to_make_long_is_an_example(name):
    assert name in NAMES
