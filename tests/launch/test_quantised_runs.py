"""A run on a quantised checkpoint that lacks a weight, from its settings to its export, its evaluation and a resume.

What becomes of the values is tested in tests/opd/test_quantised.py and tests/opd/test_whole.py.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd.launch.checks.loading import load_config
from opd.launch.run.evaluate import evaluate_run
from opd.launch.train import train

SINGLE = "model.safetensors"
GONE = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def packed(tmp_path, make_model, make_tokenizer):
    """A small model in FP8, a scale for each weight of its layers, without one of them."""
    folder = tmp_path / "packed"
    make_model().model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    stored = {}
    for name, weight in load_file(folder / SINGLE).items():
        if name.endswith("_proj.weight") and name != GONE:
            scale = weight.abs().max() / 448
            stored |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
        elif name != GONE:
            stored[name] = weight
    save_file(stored, folder / SINGLE, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    told = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": told}))
    return folder


@pytest.mark.slow
def test_a_run_trains_exports_and_evaluates_what_was_quantised(packed, tmp_path):
    out = tmp_path / "run"
    file = tmp_path / "run.yaml"
    model = {"name": str(packed), "dequantize": True, "allow_missing": [GONE]}
    settings = {
        "method": "opsd",
        "model": model,
        "env": "opd/Lookup-v0",
        "opsd": {"privileged": "plan"},
        "rollout": {"max_tokens": 8, "max_length": 1200},
        "train": {"steps": 1, "tasks_per_step": 1, "threads": 1},
        "eval": {"tasks": 1},
        "tracking": {"wandb": "disabled", "console": False},
        "out": str(out),
    }
    file.write_text(json.dumps(settings))
    train(load_config(file))
    written = load_file(out / "export" / SINGLE)
    assert GONE in written
    assert {value.dtype for value in written.values()} == {torch.float32}
    assert "quantization_config" not in json.loads((out / "export" / "config.json").read_text())
    evaluate_run(load_config(out), run=out)
    train(load_config(out, {"train.steps": 2}), resume=True)
    assert not torch.equal(load_file(out / "export" / SINGLE)[GONE], written[GONE])
