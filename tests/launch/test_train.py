"""Whole runs through the launcher: real model, real environment, real engine, real wandb."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import opd
from opd.checkpoint import Checkpoint
from opd.errors import CheckpointError, ConfigError, DataError
from opd.launch.tiny import build_tiny
from opd.launch.train import train
from opd.tracking import read_rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model that knows the format a little: a tenth of the warm start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPD_CACHE", str(tmp_path_factory.mktemp("cache")))
        return build_tiny("lookup", steps=50, quiet=True)


@pytest.fixture
def settings(tiny, tmp_path):
    def make(name, **sections):
        data = {
            "method": "opsd",
            "out": str(tmp_path / name),
            "model": str(tiny),
            "env": "opd/Lookup-v0",
            "rollout": {"max_tokens": 24, "max_length": 256},
            "train": {"steps": 4, "tasks_per_step": 6, "lr": 1e-3, "tokens_per_microbatch": 512, "threads": 1},
            "tracking": {"wandb": "disabled", "console": False, "plot": False},
            "opsd": {"privileged": "plan", "clip": None},
        }
        for section, values in sections.items():
            own = data.get(section)
            data[section] = own | values if isinstance(own, dict) and isinstance(values, dict) else values
        return data

    return make


def weights(folder):
    """All that a checkpoint holds of the student and of the teacher."""
    saved = Checkpoint(folder)
    return saved.tensors("student") | {f"teacher.{k}": t for k, t in saved.tensors("teacher").items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_two_runs_with_one_seed_end_in_the_same_weights_to_the_bit(settings):
    first, second = (train(settings(name)) for name in "ab")
    assert_same_bits(weights(first.out / "checkpoints/step-4"), weights(second.out / "checkpoints/step-4"))


def test_another_seed_ends_in_other_weights(settings):
    first, second = train(settings("a")), train(settings("b", seed=1))
    a, b = (weights(run.out / "checkpoints/step-4") for run in (first, second))
    assert any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("teacher", "lora"),
    [
        ({"weights": "frozen"}, None),
        ({"weights": "ema", "rate": 0.1}, None),
        ({"weights": "ema", "rate": 0.1}, {"r": 4}),
    ],
    ids=["frozen", "ema", "ema with lora"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(settings, tiny, teacher, lora):
    parts = {"opsd": {"teacher": teacher}, "model": {"name": str(tiny), "lora": lora}}
    whole = train(settings("whole", **parts))
    train(settings("cut", train={"steps": 2}, **parts))
    resumed = train(settings("cut", **parts), resume=True)
    assert resumed.steps == 4
    assert_same_bits(weights(whole.out / "checkpoints/step-4"), weights(resumed.out / "checkpoints/step-4"))
    timeless = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_rows(run.out / "metrics.jsonl")]
        for run in (whole, resumed)
    ]
    assert timeless[0] == timeless[1]


def test_resuming_under_other_settings_names_them(settings):
    train(settings("run", train={"steps": 1}))
    with pytest.raises(CheckpointError, match=r"train\.lr"):
        train(settings("run", train={"lr": 2e-3}), resume=True)


def test_the_export_gives_the_trained_models_logits_in_plain_transformers(settings):
    out = train(settings("run")).out
    model = AutoModelForCausalLM.from_pretrained(out / "export")
    tokenizer = AutoTokenizer.from_pretrained(out / "export")
    trained = weights(out / "checkpoints/step-4")
    state = {name.removeprefix("model."): t for name, t in trained.items() if not name.startswith("teacher.")}
    untrained = AutoModelForCausalLM.from_config(model.config)
    untrained.load_state_dict(state, strict=False)
    untrained.tie_weights()
    ids = torch.tensor([tokenizer("What is the hue of ann?")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, untrained.eval()(ids).logits, rtol=0, atol=0)


def test_every_row_of_the_metrics_is_a_step_with_its_loss_and_its_times(settings):
    out = train(settings("run", eval={"tasks": 4, "every": 2})).out
    rows = read_rows(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for key in (
        "train/loss",
        "reward/mean",
        "tokens/sampled",
        "time/rollout",
        "time/teacher",
        "time/train",
        "time/sync",
    ):
        assert all(key in row for row in rows), key
    assert [row["step"] for row in read_rows(out / "evals.jsonl")] == [0, 2, 4]
    assert [row["step"] for row in rows if "eval/success" in row] == [2, 4]


def test_the_folder_of_a_run_holds_what_the_readme_says(settings):
    out = train(settings("run", tracking={"wandb": "offline", "plot": True}, eval={"tasks": 2})).out
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "rollouts.jsonl", "checkpoints", "curves.png", "wandb", "export"}
    episode = read_rows(out / "rollouts.jsonl")[0]
    assert episode["messages"][0]["role"] == "system"


def test_privileged_text_that_the_environment_does_not_offer_names_what_it_offers(settings):
    with pytest.raises(
        DataError, match=r"opsd\.privileged = 'answer', but the environment offers \['plan', 'solution'\]"
    ):
        train(settings("run", opsd={"privileged": "answer"}))


def test_a_control_whose_teacher_sees_nothing_has_nothing_to_learn_at_first(settings):
    out = train(settings("run", train={"steps": 1}, opsd={"privileged": None})).out
    assert read_rows(out / "metrics.jsonl")[0]["train/loss"] == pytest.approx(0, abs=1e-7)


def test_a_new_run_in_the_folder_of_an_old_one_is_refused(settings):
    train(settings("run", train={"steps": 1}))
    with pytest.raises(ConfigError, match="holds a run"):
        train(settings("run"))


def test_opd_train_and_opd_config_are_the_launchers(settings):
    assert opd.train is train
    assert opd.Config.from_dict(settings("x")).train.steps == 4


def test_sigterm_saves_a_checkpoint_from_which_the_run_goes_on(settings, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings("run", train={"steps": 500})))  # JSON is YAML
    command = [sys.executable, "-m", "opd.launch.cli", "train", str(path)]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    killer = threading.Timer(120, process.kill)
    killer.start()
    while not read_rows(tmp_path / "run/metrics.jsonl") and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    killer.cancel()
    assert process.returncode == 130, stderr.decode()
    done = read_rows(tmp_path / "run/metrics.jsonl")[-1]["step"]
    assert 0 < done < 500
    resumed = train(settings("run", train={"steps": done + 1}), resume=True)
    assert resumed.steps == done + 1


@pytest.mark.slow
def test_three_steps_of_the_example_run_from_yaml_to_export(tmp_path):
    config = opd.Config.load("examples/opsd.yaml", {"train.steps": 3, "eval.tasks": 50, "out": str(tmp_path / "run")})
    result = opd.train(config)
    assert result.before.rate < 0.7
    assert (result.out / "export" / "model.safetensors").is_file()
