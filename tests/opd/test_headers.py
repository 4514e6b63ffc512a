"""What config.json and the headers of safetensors tell of a model's weights, before one is read.

Not covered: the hub itself, whose answer the test makes up.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3MoeConfig

from opd.errors import ModelError
from opd.launch.cli.main import main
from opd.models.config import ModelConfig
from opd.models.headers import _engines, check_headers
from opd.models.loading import load

SINGLE = "model.safetensors"
Q, HEAD = "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"
EXPERT = "model.layers.0.mlp.experts.2"
SMALL = {"vocab_size": 273, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "intermediate_size": 24, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SMALL, max_position_embeddings=512),
    "tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "experts": Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8),
    "gpt2": GPT2Config(vocab_size=273, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None),
}


@pytest.fixture
def make(tmp_path, make_tokenizer):
    """`make(kind, edit, **config)`: a saved model with a tokenizer, after an edit of its tensors and its config."""

    def made(kind="llama", edit=lambda tensors: tensors, **config):
        folder = tmp_path / "model"
        AutoModelForCausalLM.from_config(CONFIGS[kind]).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        save_file(edit(load_file(folder / SINGLE)), folder / SINGLE, {"format": "pt"})
        described = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(described))
        return folder

    return made


def without(*names):
    return lambda tensors: {name: values for name, values in tensors.items() if name not in names}


def told(folder, **settings):
    return dict(check_headers(ModelConfig(name=str(folder), **settings)))


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("llama", "21 tensors, 12,656 numbers in F32: all of LlamaForCausalLM, and nothing else"),
        ("tied", "26 tensors, 8,352 numbers in F32: all of Qwen2ForCausalLM, and nothing else"),
        ("experts", "of Qwen3MoeForCausalLM"),
        ("gpt2", "of GPT2LMHeadModel"),
    ],
)
def test_a_whole_checkpoint_is_told_to_be_whole(make, kind, weights):
    rows = told(make(kind))
    assert weights in rows["weights"]
    assert rows["quantisation"] == "none"


def test_positions_are_told(make):
    assert told(make())["positions"] == "512 (max_position_embeddings)"


WRONG = {
    "missing": ("llama", without(Q), {}),
    "an expert": ("experts", without(*(f"{EXPERT}.{part}_proj.weight" for part in ("up", "gate", "down"))), {}),
    "half an expert": ("experts", without(f"{EXPERT}.up_proj.weight"), {}),
    "too many": ("llama", lambda t: t | {"score.weight": torch.ones(1, 16)}, {}),
    "another size": ("llama", lambda t: t | {HEAD: torch.ones(270, 16)}, {}),
    "more layers": ("llama", without(), {"num_hidden_layers": 3}),
    "inside torch.compile": ("llama", lambda t: {f"_orig_mod.{name}": value for name, value in t.items()}, {}),
    "packed": ("llama", lambda t: t | {Q: torch.ones(16, 16, dtype=torch.int8)}, {}),
    "quantised": ("llama", without(), {"quantization_config": {"quant_method": "gptq"}}),
    "FP8": ("llama", without(), {"quantization_config": {"quant_method": "fp8"}}),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "edit", "config"), WRONG.values(), ids=WRONG)
def test_what_loading_refuses_is_refused_before_by_the_same_words(make, kind, edit, config, monkeypatch):
    model = ModelConfig(name=str(make(kind, edit, **config)))
    with pytest.raises(ModelError) as late:
        load(model)
    monkeypatch.setattr("safetensors.safe_open", None)  # no weight can be read
    with pytest.raises(ModelError) as early:
        check_headers(model)
    assert str(early.value).replace("meta", "cpu") == str(late.value)


def test_weights_that_may_be_missing_are_not_missed(make):
    folder = make("llama", without(Q))
    rows = told(folder, allow_missing=[Q])
    assert rows["weights"].endswith("all of LlamaForCausalLM, but for model.allow_missing, and nothing else")
    with pytest.raises(ModelError, match=r"does not lack\. It lacks 1 tensor"):
        told(folder, allow_missing=[Q, HEAD])


def test_how_weights_are_dequantised_is_told(make):
    rows = told(make(quantization_config={"quant_method": "fp8"}), dequantize=True)
    assert rows["quantisation"] == (
        "config.json: quantization_config.quant_method = 'fp8'; plain floats are made of it (model.dequantize)"
    )
    with pytest.raises(ModelError, match=r"is not quantised: remove model\.dequantize"):
        told(make(), dequantize=True)


def test_what_only_loading_can_tell_is_left_to_it(make, tmp_path):
    folder = make()
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()
    assert told(folder)["weights"] == "no safetensors; compared with config.json when they are loaded"


def test_the_headers_on_the_hub_are_compared_where_it_answers(make, tmp_path, monkeypatch):
    folder = make()
    shapes = {name: SimpleNamespace(dtype="F32", shape=list(v.shape)) for name, v in load_file(folder / SINGLE).items()}
    (folder / SINGLE).unlink()
    config = ModelConfig(name="owner/name")
    monkeypatch.setattr("opd.models.headers.describing_folder", lambda name, source: folder)

    def answer(tensors):
        found = SimpleNamespace(files_metadata={SINGLE: SimpleNamespace(tensors=tensors)})
        monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", lambda name: found)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    answer(shapes)
    assert "21 tensors on the hub, 12,656 numbers" in dict(check_headers(config))["weights"]
    answer(without(Q)(shapes))
    with pytest.raises(ModelError, match=r"would be random: 1 tensor"):
        check_headers(config)
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", None)
    assert dict(check_headers(config))["weights"].startswith("not here yet")


@pytest.mark.slow
def test_a_large_model_is_compared_in_seconds_and_without_its_memory(tmp_path, make_tokenizer):
    folder = tmp_path / "model"
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: tuple(w.shape) for n, w in AutoModelForCausalLM.from_config(config).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / SINGLE).open("wb") as file:  # its weights are a hole in the file
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert "8,030,261,248 numbers in BF16: all of LlamaForCausalLM" in told(folder)["weights"]


@pytest.mark.parametrize(("edit", "code"), [(without(), 0), (without(Q), 1)])
def test_the_command_and_the_dry_run_tell_of_weights(make, tmp_path, capsys, edit, code):
    folder = make("llama", edit)
    assert main(["check", str(folder)]) == code
    said = " ".join(capsys.readouterr().out.split())
    assert ("all of LlamaForCausalLM" in said, "would be random: 1 tensor" in said) == (not code, bool(code))
    file = tmp_path / "run.yaml"
    env = {"id": "opd/Lookup-v0", "probe": False}  # its prompt is longer than the model's positions
    run = {"method": "opsd", "model": str(folder), "env": env, "opsd": {"privileged": "plan"},
           "rollout": {"max_tokens": 8, "max_length": 512}, "train": {"steps": 1}}  # fmt: skip
    file.write_text(json.dumps(run))
    assert main(["train", str(file), "--dry-run"]) == 2 * code
    answer = capsys.readouterr()
    assert ("all of LlamaForCausalLM" in answer.out) == (not code)
    assert ("would be random: 1 tensor" in answer.err) == bool(code)


@pytest.mark.parametrize(
    ("changed", "engines"),
    [
        ({}, "transformers, vllm"),
        ({"model_type": "mistral", "sliding_window": 4096}, "transformers, vllm; windows of 4,096 tokens"),
        ({"model_type": "lfm2"}, "vllm, not transformers: layers of lfm2 keep a state of their own"),
        ({"model_type": "bloom"}, "vllm, not transformers: bloom computes who sees whom by itself"),
    ],
)
def test_the_engines_that_can_generate_are_told_by_config_json(changed, engines):
    assert _engines({"model_type": "llama"} | changed).startswith(engines)


def test_an_export_is_tried_before_anything_is_loaded(make, monkeypatch):
    folder = make()
    assert told(folder)["export"] == "config, generation settings and tokenizer are written and read back as they were"

    def fails(*_, **__):
        raise ValueError("config says no")

    monkeypatch.setattr("transformers.LlamaConfig.save_pretrained", fails)
    with pytest.raises(ModelError, match=r"could be trained, but not exported: config says no"):
        check_headers(ModelConfig(name=str(folder)))
