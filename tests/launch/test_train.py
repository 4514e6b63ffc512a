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
from opd.backends.local import LocalBackend
from opd.checkpoint import Checkpoint
from opd.errors import CheckpointError, ConfigError, DataError, EngineError
from opd.launch.checks.loading import config_from, load_config
from opd.launch.train import train
from opd.tracking import read_rows
from opd.trainers.loop.method import Method


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
        ({"weights": "synced", "every": 3}, None),
    ],
    ids=["frozen", "ema", "ema with lora", "synced"],
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


def test_settings_that_are_refused_leave_those_of_the_run_in_its_folder(settings):
    run = train(settings("a", train={"steps": 1}))
    before = (run.out / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match=r"train\.lr"):
        train(settings("a", train={"steps": 1, "lr": 1.0}), resume=True)
    assert (run.out / "config.yaml").read_text() == before
    assert train(before_settings(run.out, steps=2), resume=True).steps == 2


def before_settings(folder, steps):
    """What `opd train FOLDER --resume --train.steps N` reads."""
    return load_config(folder, {"train.steps": steps})


def lost(owner, name, monkeypatch, *, call):
    """From its `call`-th time on, a method of a class says that its engine is gone."""
    real, calls = getattr(owner, name), []

    def once(*arguments, **options):
        calls.append(1)
        if len(calls) >= call:
            raise EngineError("the engine is gone.")
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, once)


def test_an_engine_that_is_lost_after_a_steps_updates_ends_the_run_with_that_step_saved(settings, monkeypatch):
    whole = train(settings("whole", train={"save_every": 1, "keep_last": 9}))
    with monkeypatch.context() as patch:
        lost(Method, "observe", patch, call=2)
        with pytest.raises(EngineError, match=r"Step 2 is saved: opd train .*cut --resume"):
            train(settings("cut"))
    rows = read_rows(whole.out.parent / "cut" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    cut = Checkpoint(whole.out.parent / "cut/checkpoints/step-2")
    assert cut.record("run")["teacher_updates"] == cut.record("run")["policy_version"] == 2
    resumed = train(settings("cut"), resume=True)
    assert_same_bits(weights(whole.out / "checkpoints/step-2"), weights(cut.folder))
    assert_same_bits(weights(whole.out / "checkpoints/step-4"), weights(resumed.out / "checkpoints/step-4"))


def test_an_engine_that_is_lost_between_a_steps_updates_leaves_the_last_checkpoint_as_it_was(settings, monkeypatch):
    several = {"save_every": 1, "updates_per_step": 2}
    whole = train(settings("whole", train=several))
    with monkeypatch.context() as patch:
        lost(LocalBackend, "step", patch, call=4)  # the second update of the second step
        with pytest.raises(EngineError, match=r"gone\. The last checkpoint is step-1: opd train .*cut --resume"):
            train(settings("cut", train=several))
    assert [p.name for p in (whole.out.parent / "cut/checkpoints").iterdir()] == ["step-1"]
    resumed = train(settings("cut", train=several), resume=True)
    assert_same_bits(weights(whole.out / "checkpoints/step-4"), weights(resumed.out / "checkpoints/step-4"))


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


def test_the_names_of_the_package_are_the_launchers(settings):
    assert opd.train is train
    assert opd.load_config is load_config
    assert isinstance(config_from(settings("x")), opd.Config)


LEAVES = """
import os
import gymnasium
from opd.envs import TextSpace

class Leaves(gymnasium.Env):
    observation_space, action_space = TextSpace(), TextSpace()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        os.chdir("/")
        return "Say something.", {"privileged": {"plan": "Go."}}

    def step(self, action):
        return "", 1.0, True, False, {}
"""


def test_an_environment_that_leaves_the_folder_does_not_take_the_run_along(settings, tmp_path, monkeypatch):
    (tmp_path / "leaves_env.py").write_text(LEAVES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    short = {"env": "leaves_env:Leaves", "out": "run", "eval": {"tasks": 1}}
    out = train(settings("run", train={"steps": 1}, **short)).out
    assert out == tmp_path / "run"
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-1"]
    assert load_config(out).out == str(out)
    assert f"out: {out}" in (out / "config.yaml").read_text()
    monkeypatch.chdir("/")
    resumed = train(load_config(out, {"train.steps": 2}), resume=True)
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [1, 2]
    assert resumed.out == out


@pytest.mark.parametrize("redirection", ["2>&1 | head -1", "0<&- >&- 2>&-"])
def test_a_console_that_goes_away_does_not_end_a_run(settings, tmp_path, redirection):
    path = tmp_path / "run.yaml"
    data = settings("run", train={"steps": 3}) | {"tracking": {"wandb": "disabled", "console": True, "plot": False}}
    path.write_text(json.dumps(data))
    line = f"{sys.executable} -m opd.launch.cli train {path} {redirection}; echo code ${{PIPESTATUS[0]}} >&2"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == "code 0", done.stderr
    assert "Traceback" not in done.stderr
    assert [row["step"] for row in read_rows(tmp_path / "run/metrics.jsonl")] == [1, 2, 3]
    assert (tmp_path / "run/export/config.json").is_file()


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
    assert process.returncode == 143, stderr.decode()
    done = read_rows(tmp_path / "run/metrics.jsonl")[-1]["step"]
    assert 0 < done < 500
    resumed = train(settings("run", train={"steps": done + 1}), resume=True)
    assert resumed.steps == done + 1


@pytest.mark.slow
def test_three_steps_of_the_example_run_from_yaml_to_export(tmp_path):
    config = opd.load_config("examples/opsd.yaml", {"train.steps": 3, "eval.tasks": 50, "out": str(tmp_path / "run")})
    result = opd.train(config)
    assert result.before.rate < 0.8  # of 50 tasks; there is something left to learn
    assert (result.out / "export" / "model.safetensors").is_file()


WEIGHTED = {"entropy": 1.0, "pass_rate": {"alpha": 0.0}, "steps": {}, "turns": [1.0, 0.5]}


def test_weightings_and_the_variance_meter_leave_their_marks(settings):
    out = train(
        settings("weighted", weighting=WEIGHTED, rollout={"group_size": 3}, train={"steps": 3, "variance_every": 2})
    ).out
    rows = read_rows(out / "metrics.jsonl")
    assert [("variance/baseline" in row) for row in rows] == [True, False, True]
    assert all(row["variance/least"] <= min(1.0, row["variance/baseline"] + 1e-9) for row in rows[::2])
    assert all(0 < row["entropy/teacher"] < row["entropy/student"] + 5 for row in rows)
    assert {"distill/nats_wrong", "distill/nats_turn_0", "signal/zero"} <= rows[0].keys()


def test_weights_that_do_not_differ_train_as_if_there_were_none(settings):
    """Turns of weight one: the teacher is asked before training or while it goes on, to the same bits."""
    first = train(settings("plain")).out
    second = train(settings("scored", weighting={"steps": {"epsilon": 1e9}})).out
    assert_same_bits(weights(first / "checkpoints/step-4"), weights(second / "checkpoints/step-4"))


PARITY = """
import gymnasium
from opd.envs import TextSpace

class Parity(gymnasium.Env):
    observation_space, action_space = TextSpace(), TextSpace()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "Say something.", {}

    def step(self, action):
        return "", float(len(action) % 2), True, False, {}
"""


def test_grpo_updates_several_times_a_step_and_only_then_are_ratios_clipped(settings, tmp_path, monkeypatch):
    (tmp_path / "parity_env.py").write_text(PARITY)  # so that even a model that knows nothing has good and bad luck
    monkeypatch.syspath_prepend(tmp_path)
    grpo = {
        "method": "grpo",
        "grpo": {"clip_low": 0.01, "clip_high": 0.01},
        "rollout": {"group_size": 4},
        "env": "parity_env:Parity",
    }
    data = [settings("once", **grpo), settings("twice", **grpo, train={"updates_per_step": 2})]
    for one in data:
        del one["opsd"]
    once, twice = (train(one).out for one in data)
    first, second = read_rows(once / "metrics.jsonl"), read_rows(twice / "metrics.jsonl")
    assert all(row["policy/clipped"] == 0 and row["policy/ratio_p01"] == row["policy/ratio_p99"] == 1 for row in first)
    assert any(row["policy/clipped"] > 0 for row in second)
    assert any(row["policy/ratio_p99"] > 1 for row in second)
    assert all(row["sampler/gap"] < 1e-4 for row in first)
    assert all("distill/nats" not in row and row["time/teacher"] < 0.01 for row in first)


def test_a_correction_of_the_embedded_engine_finds_nothing_to_correct(settings):
    out = train(settings("corrected", rollout={"correction": {"mode": "mask", "low": 0.99, "high": 1.01}})).out
    for row in read_rows(out / "metrics.jsonl"):
        assert row["sampler/limited"] == 0
        assert abs(row["sampler/ratio_p01"] - 1) < 1e-3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rollout": {"top_p": 0.9, "correction": {"mode": "truncate"}}}, "no ratio to the trainer's"),
        (
            {"rollout": {"correction": {"low": 0.1}}},
            "rollout.correction.low is used by mode = mask alone, but mode = auto; remove it",
        ),
        ({"method": "grpo", "weighting": {"entropy": 1.0}}, "weighting.entropy has no effect: method = grpo"),
        ({"method": "grpo", "train": {"variance_every": 5}}, "train.variance_every has no effect"),
        ({"method": "grpo", "grpo": {"length": 5}}, "grpo.length is used by reduction = sequence_sum alone"),
    ],
)
def test_settings_that_cannot_work_together_are_refused_before_the_model_loads(settings, changed, message):
    data = settings("refused", **changed)
    if data["method"] == "grpo":
        del data["opsd"]
    with pytest.raises(ConfigError, match=message):
        train(data)
