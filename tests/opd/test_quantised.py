"""Quantised checkpoints become plain floats where that is asked for: weights that the tests quantise themselves.

Not covered: GPTQ and AWQ, which transformers does not dequantise; kernels of a GPU.
"""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GptOssConfig,
    LlamaConfig,
    Qwen3MoeConfig,
)

from opd.errors import ModelError
from opd.models.config import ModelConfig
from opd.models.loading import export, load

SINGLE = "model.safetensors"
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None, "head_dim": 32}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
CONFIGS = {
    "llama": lambda rows: LlamaConfig(vocab_size=rows, **SMALL),
    "tied": lambda rows: LlamaConfig(vocab_size=rows, **SMALL, tie_word_embeddings=True),
    "qwen3_moe": lambda rows: Qwen3MoeConfig(vocab_size=rows, **SMALL, **EXPERTS, num_experts=4),
    "gpt_oss": lambda rows: GptOssConfig(vocab_size=rows, **SMALL, num_experts_per_tok=2, num_local_experts=4),
}
BLOCK = 32
LEVELS = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def fp8_blocks(name, weight):
    """A scale for each block of 32 rows and columns, beside values of 8 bits."""
    rows, columns = weight.shape
    scales = weight.reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).abs().amax((1, 3)) / 448
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    packed = (weight / spread).to(torch.float8_e4m3fn)
    return {name: packed, f"{name}_scale_inv": scales}, packed.float() * spread


def fp8_tensor(name, weight):
    """One scale for a weight, and one of its inputs, which trains nothing."""
    scale = weight.abs().max() / 448
    packed = (weight / scale).to(torch.float8_e4m3fn)
    stored = {name: packed, f"{name}_scale_inv": scale, name.replace("weight", "activation_scale"): torch.tensor(0.5)}
    return stored, packed.float() * scale


def mxfp8(name, weight):
    """A power of two for each 32 values of a row."""
    parts = weight.reshape(weight.shape[0], -1, BLOCK)
    powers = (parts.abs().amax(-1) / 448).log2().ceil()
    packed = (parts / 2 ** powers[..., None]).to(torch.float8_e4m3fn)
    expected = (packed.float() * 2 ** powers[..., None]).reshape(weight.shape)
    return {name: packed.reshape(weight.shape), f"{name}_scale_inv": (powers + 127).to(torch.uint8)}, expected


def int8_rows(name, weight):
    scales = weight.abs().amax(1, keepdim=True) / 127
    packed = (weight / scales).round().to(torch.int8)
    return {name: packed, f"{name}_scale": scales}, packed.float() * scales


def fp8_rows(name, weight):
    scales = weight.abs().amax(1, keepdim=True) / 448
    packed = (weight / scales).to(torch.float8_e4m3fn)
    return {name: packed, f"{name}_scale": scales}, packed.float() * scales


def int4_groups(name, weight):
    """Eight values in an int32, the first in its lowest bits, each with 8 added."""
    parts = weight.reshape(weight.shape[0], -1, BLOCK)
    scales = parts.abs().amax(-1) / 7
    values = (parts / scales[..., None]).round().clamp(-8, 7)
    expected = (values * scales[..., None]).reshape(weight.shape)
    nibbles = (values.reshape(weight.shape[0], -1, 8) + 8).to(torch.int64) << (4 * torch.arange(8))
    packed = nibbles.sum(-1).to(torch.int32)
    stored = {f"{name}_packed": packed, f"{name}_scale": scales, f"{name}_shape": torch.tensor(weight.shape)}
    return stored, expected


def mxfp4(name, weight):
    """Two values of four bits in a byte, and a power of two for each 32 of them; experts are stored turned."""
    experts, inputs, outputs = weight.shape
    codes = torch.randint(0, 16, (experts, outputs, inputs // BLOCK, BLOCK))
    powers = torch.randint(120, 126, (experts, outputs, inputs // BLOCK))
    expected = torch.tensor(LEVELS)[codes] * 2.0 ** (powers - 127)[..., None]
    packed = (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8)
    stored = {f"{name}_blocks": packed, f"{name}_scales": powers.to(torch.uint8)}
    return stored, expected.reshape(experts, outputs, inputs).transpose(1, 2)


def compressed(kind, weights, inputs=None):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    told = {"quantization_status": "compressed", "ignore": ["lm_head"], "config_groups": {"group_0": group}}
    return {"quant_method": "compressed-tensors", "format": kind, **told}


FLOAT = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
INT8, INT4 = FLOAT | {"type": "int"}, FLOAT | {"num_bits": 4, "type": "int", "strategy": "group", "group_size": BLOCK}
BY_TOKEN = INT8 | {"strategy": "token", "dynamic": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
KINDS = {
    "FP8 by blocks": ("llama", fp8_blocks, FP8),
    "FP8 by blocks, tied": ("tied", fp8_blocks, FP8),
    "FP8 by blocks, experts": ("qwen3_moe", fp8_blocks, FP8),
    "FP8 by tensor": ("llama", fp8_tensor, FP8 | {"weight_block_size": None, "activation_scheme": "static"}),
    "MXFP8": ("llama", mxfp8, {"quant_method": "mxfp8", "weight_block_size": [1, BLOCK]}),
    "MXFP4": ("gpt_oss", mxfp4, {"quant_method": "mxfp4"}),
    "compressed FP8": ("llama", fp8_rows, compressed("float-quantized", FLOAT)),
    "compressed int8": ("llama", int8_rows, compressed("int-quantized", INT8, BY_TOKEN)),
    "compressed int4": ("llama", int4_groups, compressed("pack-quantized", INT4)),
}


def is_packed(kind, name):
    if kind == "gpt_oss":
        return name.endswith(("gate_up_proj", "down_proj"))
    return name.endswith("_proj.weight")


@pytest.fixture
def quantised(tmp_path, make_tokenizer):
    """`quantised(kind)`: the folder of a quantised model, and the values that its tensors stand for, by name."""

    def made(kind):
        architecture, pack, told = KINDS[kind]
        if told["quant_method"] == "compressed-tensors" and importlib.util.find_spec("compressed_tensors") is None:
            pytest.skip("needs the package compressed-tensors, which vLLM brings")
        folder = tmp_path / "model"
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(CONFIGS[architecture](len(make_tokenizer()))).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        stored, expected = {}, {}
        for name, weight in load_file(folder / SINGLE).items():
            packed, value = pack(name, weight) if is_packed(architecture, name) else ({name: weight}, weight)
            stored |= packed
            expected[name] = value
        save_file({name: value.contiguous() for name, value in stored.items()}, folder / SINGLE, {"format": "pt"})
        tell(folder, told)
        return folder, expected

    return made


def tell(folder, quantisation):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantisation}))


def asked(folder, **settings):
    return load(ModelConfig(name=str(folder), dequantize=True, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dequantised_model_has_the_values_that_its_tensors_stand_for(quantised, tmp_path, kind):
    folder, expected = quantised(kind)
    loaded = asked(folder)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    out = tmp_path / "out"
    export(loaded, out)  # its names are those of the checkpoint
    written = load_file(out / SINGLE)
    assert written.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(written[name], expected[name])] == []
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(out)(ids).logits
        assert torch.equal(again, loaded.model.model(ids).logits)


def test_a_dequantised_model_has_the_type_that_was_asked_for(quantised):
    folder, expected = quantised("FP8 by blocks")
    model = asked(folder, dtype="bfloat16").model.model
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(model.get_parameter(name), expected[name].bfloat16(), rtol=0.01, atol=0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["FP8 by blocks", "MXFP4", "compressed int8"])
def test_quantised_weights_are_refused_unless_they_are_asked_for(quantised, kind):
    folder, _ = quantised(kind)
    with pytest.raises(ModelError, match=r"such weights do not train\. Set model\.dequantize: true, or name the check"):
        load(ModelConfig(name=str(folder)))


def test_what_is_not_quantised_is_not_dequantised(tmp_path, make_model, make_tokenizer):
    make_model().model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is not quantised: remove model\.dequantize, which has no effect"):
        asked(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "modelopt"])
def test_kinds_that_cannot_be_dequantised_are_refused(quantised, method):
    folder, _ = quantised("FP8 by blocks")
    tell(folder, {"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=r"model\.dequantize cannot undo this kind\. Name the checkpoint"):
        asked(folder)
    with pytest.raises(ModelError, match=r"do not train\. Name the checkpoint that it was made from, or a dequantised"):
        load(ModelConfig(name=str(folder)))


def test_blocks_that_do_not_cut_a_weight_evenly_are_refused(quantised):
    folder, _ = quantised("FP8 by blocks")
    name = "model.layers.1.mlp.up_proj.weight"  # 128 rows: two whole blocks of 48, and one of 32
    stored = load_file(folder / SINGLE)
    stored[f"{name}_scale_inv"] = torch.ones(3, 2)
    save_file(stored, folder / SINGLE, {"format": "pt"})
    tell(folder, FP8 | {"weight_block_size": [48, BLOCK]})
    with pytest.raises(ModelError, match=r"blocks of 48 rows and 32 columns do not cut 10 tensors"):
        asked(folder)
    stored[f"{name}_scale_inv"] = torch.ones(2, 2)  # of 96 rows, which transformers would take for two of 64
    save_file(stored, folder / SINGLE, {"format": "pt"})
    with pytest.raises(ModelError, match=r"do not cut 10 tensors"):
        asked(folder)


def test_a_missing_package_is_named(quantised, monkeypatch):
    folder, _ = quantised("FP8 by blocks")
    tell(folder, {"quant_method": "compressed-tensors"})
    monkeypatch.setattr("opd.models.files.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="with a package: pip install compressed-tensors"):
        asked(folder)


def test_a_packed_weight_that_is_missing_is_named(quantised):
    folder, _ = quantised("FP8 by blocks")
    tensors = load_file(folder / SINGLE)
    del tensors["model.layers.0.mlp.up_proj.weight"], tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    with pytest.raises(ModelError, match=r"would be random: 1 tensor \(model\.layers\.0\.mlp\.up_proj\.weight\)"):
        asked(folder)
    model = asked(folder, allow_missing=["*.0.mlp.up_proj.weight"]).model.model
    assert 0.01 < model.get_parameter("model.layers.0.mlp.up_proj.weight").std() < 0.03


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_is_undone_where_its_package_is_here(tmp_path, make_tokenizer, bits):
    pytest.importorskip("bitsandbytes")
    plain, folder = tmp_path / "plain", tmp_path / "packed"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["llama"](len(make_tokenizer()))).save_pretrained(plain)
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, device_map="cpu").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    loaded = asked(folder)
    for name, weight in load_file(plain / SINGLE).items():
        torch.testing.assert_close(loaded.model.model.get_parameter(name), weight, rtol=0, atol=0.02)
    export(loaded, tmp_path / "out")
