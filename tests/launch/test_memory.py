"""The memory estimate: counted by hand, and held against real models."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from opd.episodes.config import RolloutConfig
from opd.launch.plan.memory import TILE_BYTES, ModelSize, known_size, memory_estimate, size_of_folder
from opd.maths.head import TILE_BYTES as REAL_TILE_BYTES
from opd.models.config import LoraConfig, ModelConfig
from opd.models.loading import smollm2_folder
from opd.teachers.config import TeacherConfig

# 100 embeddings of width 10, and two layers with one square and one 10 x 20 matrix and a norm each.
SHAPES = {"model.embed_tokens.weight": (100, 10)}
for layer in range(2):
    SHAPES[f"model.layers.{layer}.q_proj.weight"] = (10, 10)
    SHAPES[f"model.layers.{layer}.up_proj.weight"] = (20, 10)
    SHAPES[f"model.layers.{layer}.norm.weight"] = (10,)
SIZE = ModelSize(shapes=SHAPES, layers=2, hidden=10, intermediate=20, key_value_width=5, vocabulary=100)
LAYER = 2 * 10 * (4 + 2 * 4) + 2 * (10 + 5) * 4 + 4 * 20 * 4
"""Norms, attention and MLP of one token in float32."""
PARAMETERS = 1000 + 2 * (100 + 200 + 10)
ROLLOUT = RolloutConfig(concurrency=4, max_length=50, max_tokens=10)
FROZEN = TeacherConfig(weights="frozen")
LIVE = TeacherConfig(weights="live")
EMA = TeacherConfig(weights="ema", rate=0.1)
TRUST = TeacherConfig(weights="trust_region", rate=0.1)


def estimate(teacher=LIVE, *, gpu=False, tokens=64, **model):
    parts = memory_estimate(
        SIZE,
        model=ModelConfig(name="x", **model),
        rollout=ROLLOUT,
        teacher=teacher,
        tokens_per_microbatch=tokens,
        episodes=4,
        gpu=gpu,
    )
    return {part.name: part.bytes for part in parts}


def test_full_fine_tuning_on_a_cpu_is_counted_by_hand():
    assert SIZE.parameters == PARAMETERS == 1620
    assert estimate() == {
        "weights": 1620 * 4,
        "gradients": 1620 * 4,
        "AdamW": 2 * 1620 * 4,
        "teacher": 0,
        "activations": 2 * 32 * LAYER,  # 2 layers, half of 64 tokens
        "logits": 2 * 32 * 100 * 4,  # student and teacher
        "cache of rollouts": 4 * 50 * 2 * 2 * 5 * 4,  # episodes, tokens, keys and values, layers, width
    }


@pytest.mark.parametrize(
    ("teacher", "dtype", "size"),
    [
        (LIVE, "float32", 0),
        (FROZEN, "float32", 1620 * 4),
        (FROZEN, "bfloat16", 1620 * 2),
        (EMA, "bfloat16", 1620 * 4),
        (TRUST, "bfloat16", (1620 + 2 * SIZE.vocabulary * SIZE.hidden) * 2),
        (EMA, "float64", 1620 * 8),
        (None, "float32", 0),
    ],
)
def test_a_teacher_costs_a_copy_of_what_trains_unless_it_is_live(teacher, dtype, size):
    assert estimate(teacher, dtype=dtype)["teacher"] == size


def test_adapters_take_the_place_of_all_trained_weights():
    adapters = 2 * (3 * (10 + 10) + 3 * (20 + 10))
    parts = estimate(FROZEN, dtype="bfloat16", lora=LoraConfig(r=3))
    assert parts["weights"] == 1620 * 2 + adapters * 4
    assert parts["gradients"] == parts["teacher"] == adapters * 4
    assert parts["AdamW"] == 2 * adapters * 4


def test_adapters_of_named_modules_are_counted_for_these_alone():
    assert SIZE.adapters(LoraConfig(r=3, targets=["up_proj"])) == 2 * 3 * (20 + 10)


def test_a_gpu_halves_the_weights_where_the_type_is_left_open():
    assert estimate(gpu=True)["weights"] == 1620 * 2
    assert estimate(gpu=True, dtype="float32")["weights"] == 1620 * 4


def test_checkpointing_keeps_the_input_of_each_layer_and_one_layer_whole():
    assert estimate(gradient_checkpointing=True)["activations"] == 32 * LAYER + 2 * 32 * 10 * 4


def test_a_tile_of_logits_is_never_larger_than_the_core_makes_it():
    assert {"cpu": REAL_TILE_BYTES["cpu"], "gpu": REAL_TILE_BYTES["accelerator"]} == TILE_BYTES
    assert estimate(tokens=10**9)["logits"] == 2 * TILE_BYTES["cpu"]


def test_without_a_teacher_the_student_has_the_whole_micro_batch():
    assert estimate(None)["activations"] == 2 * estimate(LIVE)["activations"]
    assert estimate(None)["logits"] == estimate(LIVE)["logits"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_size_of_a_folder_is_the_size_of_the_model_in_it(tmp_path, tied):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=70, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    size = size_of_folder(tmp_path)
    assert size is not None
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert (size.layers, size.hidden, size.intermediate, size.vocabulary) == (3, 32, 48, 70)
    assert size.key_value_width == 2 * 8


def test_adapters_are_counted_as_peft_makes_them(tmp_path):
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=70)
    )
    model.save_pretrained(tmp_path)
    size = size_of_folder(tmp_path)
    adapted = get_peft_model(model, PeftConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert size is not None
    assert size.adapters(LoraConfig(r=4)) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


@pytest.mark.slow
def test_the_size_of_smollm2_is_known_before_it_is_unpacked():
    known = known_size("smollm2")
    assert known is not None
    assert known.parameters == 134_515_008
    assert known == size_of_folder(smollm2_folder())


@pytest.mark.parametrize("name", ["tiny:lookup", "owner/never-downloaded", "./missing", "models/a.gguf"])
def test_a_size_that_is_not_cheap_to_know_is_not_guessed(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert known_size(name) is None


def test_a_folder_that_does_not_say_enough_has_no_known_size(tmp_path):
    assert size_of_folder(tmp_path) is None
    save_file({"a.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8}))
    assert size_of_folder(tmp_path) is None
    (tmp_path / "config.json").write_text(
        json.dumps({"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 3})
    )
    size = size_of_folder(tmp_path)
    assert size == ModelSize(
        shapes={"a.weight": (2, 3)}, layers=1, hidden=8, intermediate=32, key_value_width=8, vocabulary=3
    )
