"""Real DeepSpeed on real processes over gloo. A launch costs 10 to 20 seconds, so each makes many checks."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

WORKER = Path(__file__).parent / "worker.py"
SECONDS = 1500
# Standalone: on a port of its own, whoever else runs these tests on this machine.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


@pytest.fixture(scope="session")
def tiny_folder(tiny_model):
    """A model that has hardly been warm-started: what it says does not matter here."""
    return str(tiny_model())


@pytest.fixture(scope="session")
def untied_folder(tiny_folder, tmp_path_factory):
    """The same with a head of its own, which ZeRO-3 cuts by itself."""
    folder = tmp_path_factory.mktemp("untied")
    tied = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tied.config.tie_word_embeddings = False
    untied = type(tied)(tied.config)
    untied.load_state_dict(tied.state_dict())
    untied.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def other_folder(tiny_folder, tmp_path_factory):
    """Another model of the same tokenizer, with random weights."""
    folder = tmp_path_factory.mktemp("other")
    config = AutoConfig.from_pretrained(tiny_folder, hidden_size=64)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def replay():
    """The worker's own `replay`, in this process."""
    spec = importlib.util.spec_from_file_location("zero_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.replay


@pytest.fixture(scope="session")
def zero_settings(tiny_folder):
    """`zero_settings(out, stage=3, **sections)`: a run's settings as plain data; stage None is the local backend.

    `persistent` leaves ZeRO-3's threshold alone: then it keeps all of so small a model gathered between passes.
    `zero` is added to its settings.
    """

    def make(out, stage=None, *, persistent=False, zero=None, **sections):
        data = {
            "method": "opsd",
            "out": str(out),
            "model": {"name": tiny_folder},
            "env": {"id": "opd/Lookup-v0", "max_turns": 3},
            "rollout": {"max_tokens": 10, "max_length": 256},
            "train": {"steps": 5, "tasks_per_step": 6, "lr": 1e-3, "tokens_per_microbatch": 512, "threads": 1},
            "tracking": {"wandb": "disabled", "console": False, "plot": False},
            "opsd": {"privileged": "plan", "divergence": {"clip": None}},
        }
        for section, values in sections.items():
            own = data.get(section)
            data[section] = own | values if isinstance(own, dict) and isinstance(values, dict) else values
        if stage is not None:
            own = {"stage": stage} | ({} if persistent else {"stage3_param_persistence_threshold": 0}) | (zero or {})
            data |= {"backend": "deepspeed", "deepspeed": {"zero_optimization": own}}
        return {key: value for key, value in data.items() if value is not None}

    return make


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(WORKER.parent)}


def end(process):
    """End a launcher and the ranks, which have process groups of their own and which it ends when it is asked to."""
    process.terminate()
    try:
        process.wait(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """`launch(cases, launcher, ranks)`: the worker does the cases on so many ranks."""

    def run(cases, launcher=TORCHRUN, ranks=2):
        folder = tmp_path_factory.mktemp("launch")
        (folder / "cases.json").write_text(json.dumps(cases))
        command = [*launcher, str(ranks), str(WORKER), str(folder / "cases.json")]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                command, env=environment(), stdout=log, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
            )
            try:
                code = process.wait(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(process)
        assert code == 0, f"exit code {code}:\n{(folder / 'log').read_text()[-6000:]}"

    return run
