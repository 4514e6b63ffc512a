"""What a user does on a GPU: whole runs, every method's example, DeepSpeed, and the memory that the plan told.

What a GPU computes is held against a CPU, on the same recorded rollouts. Not covered: several GPUs, vLLM, offload.
"""

import importlib.util
import json
import math
import os
import pickle
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from opd.launch.checks.loading import config_from, load_config
from opd.launch.plan.plan import plan
from opd.launch.run.build import build
from opd.launch.train import train
from opd.models.config import ModelConfig
from opd.models.loading import load
from opd.tracking import read_rows
from opd.trainers.loop.registry import METHODS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing here was tried on one"),
]

ROOT = Path(__file__).resolve().parents[2]
WORKER = ROOT / "tests/zero/worker.py"


@pytest.fixture(scope="module", autouse=True)
def _coin_env():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(WORKER.parent))
        yield


@pytest.fixture(scope="module")
def models(tiny_model):
    """A student that knows the format a little, and a teacher of the same tokenizer."""
    return [str(tiny_model(steps=30)), str(tiny_model(seed=1))]


@pytest.fixture(scope="module")
def settings(models, tmp_path_factory):
    """`settings(name, **sections)`: a run's, as plain data; a section that is None is left out."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name, **sections):
        data = {
            "method": "opsd",
            "out": str(folder / name),
            "model": {"name": models[0], "dtype": "float32"},
            "env": {"id": "opd/Lookup-v0", "max_turns": 3},
            "rollout": {"max_tokens": 16, "max_length": 256},
            "train": {"steps": 3, "tasks_per_step": 6, "lr": 1e-3, "tokens_per_microbatch": 512},
            "tracking": {"wandb": "disabled", "console": False, "plot": False},
            "opsd": {"privileged": "plan", "divergence": {"clip": None}},
        }
        for section, values in sections.items():
            own = data.get(section)
            data[section] = own | values if isinstance(own, dict) and isinstance(values, dict) else values
        return {key: value for key, value in data.items() if value is not None}

    return make


def steps(out):
    return [row for row in read_rows(out / "metrics.jsonl") if "train/loss" in row]


# -- whole runs ---------------------------------------------------------------------------------------


def test_a_model_is_loaded_onto_the_gpu_in_bfloat16_where_nothing_else_is_said(models):
    loaded = load(ModelConfig(name=models[0]))
    assert {(p.device.type, p.dtype) for p in loaded.model.parameters()} == {("cuda", torch.bfloat16)}


@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_run_ends_in_finite_numbers_and_an_export_that_loads(settings, models, dtype, lora):
    name = f"{dtype}-{lora and 'lora'}"
    out = train(settings(name, model={"name": models[0], "dtype": dtype, "lora": lora}, eval={"tasks": 4})).out
    assert [row["step"] for row in steps(out)] == [1, 2, 3]
    for row in steps(out):
        assert math.isfinite(row["train/loss"])
        assert row["train/grad_norm"] > 0
        assert row["train/skipped"] == 0
    exported = AutoModelForCausalLM.from_pretrained(out / "export")
    AutoTokenizer.from_pretrained(out / "export")
    assert exported.dtype == getattr(torch, dtype)
    before = AutoModelForCausalLM.from_pretrained(models[0], dtype=exported.dtype).state_dict()
    moved = [float((weight - before[key]).abs().max()) for key, weight in exported.state_dict().items()]
    assert 0 < max(moved) < 0.01  # three steps of 1e-3, rounded


def test_large_logits_in_bfloat16_are_float32_and_no_reason_to_refuse_a_model(models, tmp_path):
    """At 40 bfloat16 is 0.1 nats off: the model's own logits are, the embedded engine's are the losses'."""
    model = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.bfloat16)
    hidden = model.model(torch.arange(8)[None]).last_hidden_state
    with torch.no_grad():
        model.model.norm.weight *= 40 / (hidden @ model.lm_head.weight.T).abs().max()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(models[0]).save_pretrained(tmp_path)
    student = load(ModelConfig(name=str(tmp_path))).model
    with torch.no_grad():
        hidden = student.hidden(torch.arange(8, device="cuda")[None])
        logits = student.logits(hidden)
    assert logits.dtype == torch.float32
    assert logits.abs().max() > 30
    exact = hidden.double() @ student.head().weight.double().T
    torch.testing.assert_close(logits.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(settings, models, dtype):
    """But for rounding: GPUs add in no fixed order."""
    sections = {"model": {"name": models[0], "dtype": dtype}, "opsd": {"teacher": {"weights": "ema", "rate": 0.1}}}
    whole = train(settings(f"whole-{dtype}", train={"save_every": 2}, **sections)).out
    train(settings(f"cut-{dtype}", train={"steps": 2}, **sections))
    resumed = train(settings(f"cut-{dtype}", **sections), resume=True).out
    assert [row["step"] for row in steps(resumed)] == [1, 2, 3]
    closeness = 0.05 if dtype == "bfloat16" else 2e-3
    for key in ("train/loss", "train/grad_norm", "train/lr"):
        assert steps(resumed)[-1][key] == pytest.approx(steps(whole)[-1][key], rel=closeness), key
    ours, theirs = (torch.load(out / "checkpoints/step-3/backend.pt") for out in (resumed, whole))
    for number, state in theirs["optimizer"]["state"].items():
        found = ours["optimizer"]["state"][number]
        assert float(found["step"]) == float(state["step"]) == 3
        for moment in ("exp_avg", "exp_avg_sq"):
            assert (found[moment] - state[moment]).norm() <= closeness * state[moment].norm()
    before = load_file(whole / "checkpoints/step-2/student.safetensors")
    one, two = (load_file(out / "checkpoints/step-3/student.safetensors") for out in (whole, resumed))
    off, way = (
        math.sqrt(sum(float((a[key].float() - b[key].float()).square().sum()) for key in one))
        for a, b in ((one, two), (one, before))
    )
    assert off < 0.1 * way


@pytest.mark.parametrize("name", METHODS)
def test_the_example_of_a_method_trains(name, small_example, models, tmp_path):
    student, teacher = models
    result = train(load_config(*small_example(name, tmp_path / "run", student=student, teacher=teacher)))
    rows = steps(result.out)
    assert result.steps == rows[-1]["step"] == len(rows) > 0
    for row in rows:
        assert math.isfinite(row["train/loss"])
        assert row["train/skipped"] == 0
        assert row["tokens/trained"] > 0
    assert any(row["train/grad_norm"] > 0 for row in rows)
    assert (result.out / "export/model.safetensors").is_file()


# -- the same numbers as on a CPU ---------------------------------------------------------------------

EMA = {"teacher": {"weights": "ema", "rate": 0.2}}
GROUPS = {"opsd": None, "rollout": {"group_size": 2}}
EXTERNAL = {"weights": "external", "model": "EXTERNAL"}
CASES = {
    "opsd": {},
    "jsd, clipped": {"opsd": {"divergence": {"kind": "jsd", "clip": 0.05}}},
    "trust region": {"opsd": {"teacher": {"weights": "trust_region", "rate": 0.3}}},
    "lora, ema": {"model": {"lora": {"r": 4}}, "opsd": EMA},
    "recomputed": {"model": {"gradient_checkpointing": True}},
    "weighted": {"weighting": {"entropy": 1.0}},
    "opd, top k": {
        "method": "opd",
        "opsd": None,
        "opd": {"teacher": EXTERNAL, "form": "exact", "divergence": {"top_k": 20}},
    },
    "vopd, metered": {
        "method": "vopd",
        "opsd": None,
        "vopd": {"teacher": EXTERNAL, "baseline": "optimal"},
        "train": {"variance_every": 1},
    },
    "grpo, two updates": {"method": "grpo", **GROUPS, "train": {"updates_per_step": 2}},
    "grpo by sequence": {"method": "grpo", **GROUPS, "grpo": {"ratio": "sequence"}},
    "srpo": {"method": "srpo", **GROUPS, "srpo": EMA | {"feedback_at": "start"}},
    "sdpo": {"method": "sdpo", **GROUPS, "sdpo": {"policy_share": 0.5}},
}


@pytest.fixture(scope="module")
def replay():
    """The worker's own `replay`, in this process: steps on recorded rollouts."""
    spec = importlib.util.spec_from_file_location("zero_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.replay


@contextmanager
def on_cpu():
    """As if there were no GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def recorded(settings, tmp_path_factory):
    """Rollouts of one step, as the CPU plays them, by the size of a group; of each group every second is right."""
    folder = tmp_path_factory.mktemp("recorded")

    def record(size):
        with on_cpu():
            run = build(config_from(settings(f"recorded-{size}", rollout={"group_size": size})))
            groups = [with_rewards(group) for group in run.loop.player.play_step(0)]
            run.close()
        path = folder / f"{size}.pickle"
        path.write_bytes(pickle.dumps(groups))
        return str(path)

    return {size: record(size) for size in (1, 2)}


def with_rewards(group):
    def reward(trajectory):
        right = trajectory.member % 2 == 1 or group.task.index % 2 == 0
        value = right - 0.3 * (trajectory.member == 0)
        turns = [replace(turn, reward=value / len(trajectory.turns)) for turn in trajectory.turns]
        return replace(trajectory, turns=turns, success=right)

    return replace(group, trajectories=[reward(t) for t in group.trajectories])


@pytest.fixture(scope="module")
def case(settings, models, recorded):
    """`case(place, name, sections, ...)`: what the worker is to do in one step."""

    def make(place, name, sections, **more):
        data = settings(f"case-{name}", **sections, **more)
        data["train"]["steps"] = 1
        data = json.loads(json.dumps(data).replace("EXTERNAL", models[1]))
        rollouts = recorded[data["rollout"].get("group_size", 1)]
        return {"do": "replay", "config": data, "rollouts": rollouts, "out": str(place / name), "spoil": None}

    return make


def same(ours, theirs):
    """What was measured in a step on a CPU and elsewhere: the loss and its gradient, and all the rest."""
    assert ours.keys() == theirs.keys()
    assert theirs["train/loss"] != 0
    for key, value in theirs.items():
        closeness = (
            {"rel": 1e-4, "abs": 1e-7} if key in ("train/loss", "train/grad_norm") else {"rel": 1e-3, "abs": 1e-5}
        )
        if not key.startswith("time/"):
            assert ours[key] == pytest.approx(value, nan_ok=True, **closeness), key


@pytest.mark.parametrize("name", CASES)
def test_a_step_measures_what_it_measures_on_a_cpu(replay, case, tmp_path, name):
    replay(case(tmp_path, "gpu", CASES[name]))
    with on_cpu():
        replay(case(tmp_path, "cpu", CASES[name]))
    [ours], [theirs] = (json.loads((tmp_path / where).read_text()) for where in ("gpu", "cpu"))
    same(ours, theirs)


# -- DeepSpeed, one process ---------------------------------------------------------------------------


def worker(cases, folder):
    """The cases in a process of their own: a DeepSpeed that was once started never quite ends."""
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "PYTHONPATH": _python_path()}
    command = [sys.executable, str(WORKER), str(folder / "cases.json")]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=folder, timeout=240, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


def _python_path():
    return os.pathsep.join(filter(None, [str(WORKER.parent), os.environ.get("PYTHONPATH")]))


def zero(stage, **sections):
    """Settings of DeepSpeed with torch's optimiser, which needs no compiler."""
    json_of_it = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": "auto", "weight_decay": "auto"}},
    }
    return sections | {"backend": "deepspeed", "deepspeed": json_of_it}


@pytest.mark.timeout(300)
def test_deepspeed_measures_what_one_process_without_it_measures_on_a_cpu(replay, case, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    chosen = {"opsd": CASES["opsd"], "ema": {"opsd": EMA}, "srpo": CASES["srpo"]}
    found = {(name, stage): sections for name, sections in chosen.items() for stage in (2, 3)}
    worker([case(tmp_path, f"{name}-{stage}", zero(stage, **found[name, stage])) for name, stage in found], tmp_path)
    for name, sections in chosen.items():
        with on_cpu():
            replay(case(tmp_path, name, sections))
        [theirs] = json.loads((tmp_path / name).read_text())
        for stage in (2, 3):
            [ours] = json.loads((tmp_path / f"{name}-{stage}").read_text())
            same(ours, theirs)


@pytest.mark.timeout(300)
def test_the_ready_files_of_deepspeed_train_in_bfloat16(case, tmp_path):
    """With DeepSpeed's own Adam, which it compiles, where nvcc is."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    cases = [
        case(tmp_path, ready, {"backend": "deepspeed", "deepspeed": ready}, model={"dtype": "bfloat16"})
        for ready in ("zero2", "zero3")
    ]
    worker(cases, tmp_path)
    first, second = (json.loads((tmp_path / ready).read_text())[0] for ready in ("zero2", "zero3"))
    assert first["train/loss"] == pytest.approx(second["train/loss"], rel=0.02)
    assert first["train/grad_norm"] == pytest.approx(second["train/grad_norm"], rel=0.05)
    start = load_file(Path(cases[0]["config"]["model"]["name"]) / "model.safetensors")
    for ready in ("zero2", "zero3"):
        trained = load_file((tmp_path / ready).with_suffix(".safetensors"))
        moved = [
            float((trained[f"model.{key}"] - weight.to(torch.bfloat16)).abs().max()) for key, weight in start.items()
        ]
        assert 0 < max(moved) < 0.02


# -- memory -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_shape(models, tmp_path_factory):
    """A folder with the shape of Qwen3-0.6B and random weights; the tiny tokenizer's ids are the first of its many."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    shape = Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151_936, tie_word_embeddings=True, max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return str(folder)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_the_plan_tells_the_memory_of_a_model_of_real_shape(settings, real_shape, checkpointing):
    config = config_from(
        settings(
            f"real-{checkpointing}",
            model={"name": real_shape, "dtype": "bfloat16", "gradient_checkpointing": checkpointing},
            env={"id": "opd/Lookup-v0", "max_turns": 2},
            rollout={"max_tokens": 48, "max_length": 384, "concurrency": 32},
            train={"steps": 2, "tasks_per_step": 32, "lr": 1e-6, "tokens_per_microbatch": 8192},
        )
    )
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run = build(config)
    rows = [run.loop.step(number)[0] for number in range(2)]  # the optimiser has its memory from the first one on
    peak = torch.cuda.max_memory_allocated() - before
    run.close()
    del run
    told = plan(config, Path(config.out), gpu=True)
    parts = ", ".join(f"{part.name} {part.bytes / 2**30:.2f}" for part in told.memory)
    print(f"peak {peak / 2**30:.2f} GiB, told {told.memory_bytes / 2**30:.2f}: {parts}")
    assert rows[-1]["train/skipped"] == 0
    assert 0.9 < told.memory_bytes / peak < 1.6, f"{peak / 2**30:.2f} GiB: {parts}"
