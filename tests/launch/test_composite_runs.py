"""A run on a checkpoint of a language model with a vision tower, from its start over a restart to its export."""

import json

import pytest
import torch
from safetensors.torch import load_file

from opd.launch.train import train
from tests.composites import composite

pytestmark = pytest.mark.slow


def test_a_run_trains_the_language_model_alone_and_exports_the_whole(tmp_path, make_tokenizer):
    base, tokenizer = tmp_path / "base", make_tokenizer()
    model = composite("gemma3", max_position_embeddings=4096)
    model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().weight.shape[0]))
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "preprocessor_config.json").write_text("{}")
    data = {
        "method": "opsd",
        "model": str(base),
        "env": "opd/Lookup-v0",
        "opsd": {"privileged": "plan"},
        "rollout": {"max_tokens": 6, "max_length": 2000},
        "train": {"steps": 1, "tasks_per_step": 2, "threads": 1},
        "eval": {"tasks": 0},
        "tracking": {"wandb": "disabled", "console": False, "plot": False},
        "out": str(tmp_path / "run"),
    }
    assert train(data).steps == 1
    data["train"]["steps"] = 2
    assert train(data, resume=True).steps == 2
    export = tmp_path / "run" / "export"
    before, after = load_file(base / "model.safetensors"), load_file(export / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("language_model.") for name in changed)
    assert json.loads((export / "config.json").read_text())["architectures"] == ["Gemma3ForConditionalGeneration"]
    assert (export / "preprocessor_config.json").is_file()
