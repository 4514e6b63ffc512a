"""A checkpoint is loaded whole, or refused by name: tiny ones, damaged in each way that is known from others' runs.

Not covered: hubs; weights that are packed in a .bin file without a word; what a model's own remote code lets pass.
"""

import json
import logging

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from opd.errors import ModelError
from opd.models.config import ModelConfig
from opd.models.loading import export, load, load_teacher
from opd.models.whole import load_whole

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MEND = "Its config.json and its weights do not belong together"
LLAMA, QWEN, MOE, GPT2, NEOX = "llama", "qwen", "moe", "gpt2", "neox"


@pytest.fixture
def make(tmp_path, make_model, make_tokenizer):
    """`make(kind, edit, **config)`: a saved model with a tokenizer, after an edit of its tensors and its config."""
    rows = len(make_tokenizer())
    small = {"vocab_size": rows, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    grouped = small | {"num_key_value_heads": 1, "intermediate_size": 24, "eos_token_id": None, "bos_token_id": None}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8}
    ids = {"bos_token_id": None, "eos_token_id": None}
    models = {
        LLAMA: lambda: make_model().model,
        QWEN: lambda: Qwen2ForCausalLM(Qwen2Config(**grouped, tie_word_embeddings=True)),
        MOE: lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**grouped, **experts)),
        GPT2: lambda: GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_embd=16, n_layer=2, n_head=2, **ids)),
        NEOX: lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**small, intermediate_size=24, **ids)),
    }

    def save(kind=LLAMA, edit=None, *, model=None, shard=None, **config):
        folder = tmp_path / "model"
        torch.manual_seed(0)
        (model or models[kind]()).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
        make_tokenizer().save_pretrained(folder)
        if edit is not None:
            save_file(edit(load_file(folder / SINGLE)), folder / SINGLE, metadata={"format": "pt"})
        described = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(described))
        return folder

    return save


def read(folder, **settings):
    return load(ModelConfig(name=str(folder), **settings)).model.model


def refused(folder, message, **settings):
    """The refusal names the model as the settings do, and says the message."""
    with pytest.raises(ModelError) as caught:
        read(folder, **settings)
    assert f"model.name = {str(folder)!r}" in str(caught.value)
    assert message in str(caught.value)


def without(*names):
    return lambda tensors: {name: values for name, values in tensors.items() if name not in names}


def under(prefix):
    return lambda tensors: {prefix + name: values for name, values in tensors.items()}


def beside(**more):
    return lambda tensors: tensors | {name.replace("__", "."): values for name, values in more.items()}


def unmerged(tensors):
    named = {f"base_model.model.{n.replace('q_proj.', 'q_proj.base_layer.')}": v for n, v in tensors.items()}
    return named | {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 32)}


# -- what a model lacks, and what it has no place for -------------------------------------------------

LACKING = {
    "a weight": (LLAMA, without(Q), f"Missing, and would be random: 1 tensor ({Q}). {MEND}"),
    "the head": (LLAMA, without(HEAD), f"1 tensor ({HEAD}). It was saved without its head (AutoModel)"),
    "tied, the embeddings": (QWEN, without(EMBEDDINGS), f"would be random: 2 tensors ({HEAD}, {EMBEDDINGS})"),
    "many": (LLAMA, without(*(f"model.layers.{n}.mlp.{p}_proj.weight" for n in (0, 1) for p in ("up", "down", "gate"))),
             "6 tensors (model.layers.0.mlp.down_proj.weight, model.layers.0.mlp.gate_proj.weight, "
             "model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.down_proj.weight and 2 more)"),
    "an expert": (MOE, without(*(f"model.layers.0.mlp.experts.2.{p}_proj.weight" for p in ("up", "gate", "down"))),
                  "2 tensors (model.layers.0.mlp.experts.down_proj [3, 16, 8] in place of [4, 16, 8]"),
    "a part of an expert": (MOE, without("model.layers.0.mlp.experts.2.up_proj.weight"), "experts.gate_up_proj"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "edit", "message"), LACKING.values(), ids=LACKING)
def test_a_checkpoint_that_lacks_a_weight_is_refused(make, kind, edit, message):
    refused(make(kind, edit), message)


SPARE = {
    "a bias": (LLAMA, beside(model__layers__0__self_attn__q_proj__bias=torch.ones(32)),
               f"taken by nothing: 1 tensor (model.layers.0.self_attn.q_proj.bias). {MEND}"),
    "torch.compile": (LLAMA, under("_orig_mod."), "It was saved from inside torch.compile: save `model._orig_mod`"),
    "a wrapper": (LLAMA, under("module."), "It was saved from inside a wrapper (DDP, DeepSpeed): save `model.module`"),
    "FSDP": (LLAMA, under("_fsdp_wrapped_module."), "gather the full state dict first"),
    "another prefix": (QWEN, under("policy."), "taken by nothing: 26 tensors (policy.model.embed_tokens.weight"),
    "adapters": (LLAMA, unmerged, "Its adapters are not merged: peft's merge_and_unload(), then save"),
    "a value head": (LLAMA, beside(v_head__summary__weight=torch.ones(1, 32)), "It is a classifier, or has a value"),
    "a reward": (QWEN, beside(score__weight=torch.ones(1, 16)), "taken by nothing: 1 tensor (score.weight)"),
    "GPTQ": (LLAMA, lambda t: without(Q)(t) | {Q.replace("weight", "qweight"): torch.ones(4, 32, dtype=torch.int32)},
             "It is quantised. Name the checkpoint that it was made from"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "edit", "message"), SPARE.values(), ids=SPARE)
def test_a_tensor_that_nothing_takes_is_refused(make, kind, edit, message):
    refused(make(kind, edit), message)


SIZES = {
    "rows of the embeddings": ({"vocab_size": 300}, f"{HEAD} [273, 32] in place of [300, 32]"),
    "heads": ({"num_key_value_heads": 4}, "self_attn.k_proj.weight [16, 32] in place of [32, 32]"),
    "more layers": ({"num_hidden_layers": 3}, "would be random: 12 tensors (model.layers.2.input_layernorm.weight"),
    "fewer layers": ({"num_hidden_layers": 1}, "taken by nothing: 12 tensors (model.layers.1.input_layernorm.weight"),
}


@pytest.mark.parametrize(("config", "message"), SIZES.values(), ids=SIZES)
def test_a_config_for_other_weights_is_refused(make, config, message):
    refused(make(**config), message)


def test_a_vocabulary_that_was_resized_without_saying_so_is_refused(make):
    longer = lambda t: t | {EMBEDDINGS: torch.ones(280, 16)}  # noqa: E731
    refused(make(QWEN, longer), "model.embed_tokens.weight")
    refused(make(QWEN, lambda t: t | {HEAD: torch.ones(270, 16)}), "lm_head.weight")


@pytest.mark.parametrize("cls", [LlamaForSequenceClassification, Qwen2ForSequenceClassification])
def test_a_classifier_is_no_language_model(make, make_model, cls):
    config = make_model().config if cls is LlamaForSequenceClassification else None
    config = config or Qwen2Config(vocab_size=273, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                   num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)  # fmt: skip
    refused(make(model=cls(config)), "It is a classifier, or has a value head: name a language model")


def test_a_model_that_was_saved_without_a_head_of_its_own_is_refused(make, make_model):
    refused(make(model=make_model().model.model), "set tie_word_embeddings: true in its config.json")


# -- what is whole after all --------------------------------------------------------------------------


def untied(tensors):
    return tensors | {HEAD: tensors[EMBEDDINGS].clone()}


def only_head(tensors):
    return without(EMBEDDINGS)(tensors) | {HEAD: tensors[EMBEDDINGS]}


def bare(tensors):
    return {name.removeprefix("transformer.").removeprefix("model."): values for name, values in tensors.items()}


WHOLE = {
    "as saved": (LLAMA, None),
    "tied": (QWEN, None),
    "tied, and the head beside": (QWEN, untied),
    "tied, the head alone": (QWEN, only_head),
    "tied, of the model without a head": (QWEN, bare),
    "experts": (MOE, None),
    "one prefix more": (LLAMA, under("model.")),
    "names of the model without a head": (GPT2, bare),
    "older GPT-2": (
        GPT2,
        beside(
            transformer__h__0__attn__bias=torch.ones(1, 1, 8, 8, dtype=torch.uint8),
            transformer__h__0__attn__masked_bias=torch.tensor(-1e4),
        ),
    ),
    "older NeoX": (
        NEOX,
        beside(
            gpt_neox__layers__0__attention__bias=torch.ones(1, 1, 8, 8, dtype=torch.bool),
            gpt_neox__layers__0__attention__masked_bias=torch.tensor(-1e9),
            gpt_neox__layers__0__attention__rotary_emb__inv_freq=torch.ones(4),
        ),
    ),
}


@pytest.mark.parametrize(("kind", "edit"), WHOLE.values(), ids=WHOLE)
def test_a_whole_checkpoint_has_the_values_that_were_saved(make, kind, edit):
    expected = AutoModelForCausalLM.from_pretrained(make(kind)).state_dict()
    found = read(make(kind, edit)).state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_shards_are_read_as_one(make):
    expected = load_file(make() / SINGLE)
    (make(shard="20KB") / SINGLE).unlink()
    found = read(make(shard="20KB")).state_dict()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_a_bin_file_is_read_as_well(make):
    folder = make()
    expected = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    torch.save(expected, folder / "pytorch_model.bin")
    found = read(folder).state_dict()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_old_buffers_are_told_quietly_and_what_a_class_drops_aloud(make, monkeypatch, caplog):
    more = beside(model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    with caplog.at_level(logging.INFO, logger="opd.models.whole"):
        read(make(LLAMA, more))
    [record] = caplog.records
    assert record.levelname == "INFO"
    assert "left out, as no part of LlamaForCausalLM: 1 tensor (model.layers.0.self_attn" in record.getMessage()
    caplog.clear()
    monkeypatch.setattr("transformers.LlamaForCausalLM._keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    read(make(LLAMA, beside(mtp__fc__weight=torch.ones(2, 2))))
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "1 tensor (mtp.fc.weight)" in record.getMessage()


def test_what_a_class_lets_be_missing_is_told(make, monkeypatch, caplog):
    monkeypatch.setattr("transformers.LlamaForCausalLM._keys_to_ignore_on_load_missing", [r"lm_head"])
    read(make(LLAMA, without(HEAD)))
    assert "by the code of LlamaForCausalLM a checkpoint need not hold 1 tensor (lm_head.weight)" in caplog.text


def test_two_weights_where_the_config_knows_one_are_refused(make):
    edit = lambda t: t | {HEAD: t[EMBEDDINGS] + 1}  # noqa: E731
    refused(make(QWEN, edit), "lm_head.weight is model.embed_tokens.weight, but the checkpoint holds both, and they")
    model = read(make(QWEN, edit, tie_word_embeddings=False))
    torch.testing.assert_close(model.lm_head.weight, model.model.embed_tokens.weight + 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused(make, value):
    def spoil(tensors):
        tensors[Q][3, 5] = value
        return tensors

    refused(make(LLAMA, spoil), f"1 tensor ({Q}) hold nan or infinity")


def test_weights_beyond_the_range_of_the_type_are_refused(make):
    folder = make(LLAMA, lambda t: t | {Q: torch.full((32, 32), 1e5)})
    read(folder)
    refused(folder, "too large for model.dtype = float16", dtype="float16")


def test_the_refusal_takes_the_place_of_the_report_of_transformers(make, capfd):
    for edit in (without(Q), under("module."), lambda t: t | {HEAD: torch.ones(9, 32)}):
        refused(make(LLAMA, edit), "cannot be loaded whole as LlamaForCausalLM")
    refused(make(MOE, without("model.layers.0.mlp.experts.2.up_proj.weight")), "Error: Concatenate")
    assert "LOAD REPORT" not in capfd.readouterr().err


# -- what may begin at random -------------------------------------------------------------------------

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("allowed", [[Q, DOWN], ["*.q_proj.weight", DOWN], ["model.layers.[01].*"]])
def test_weights_that_may_be_missing_begin_at_random_and_the_rest_as_saved(make, caplog, allowed):
    expected = AutoModelForCausalLM.from_pretrained(make()).state_dict()
    model = read(make(LLAMA, without(Q, DOWN)), allow_missing=allowed)
    found = model.state_dict()
    assert {name for name in expected if not torch.equal(found[name], expected[name])} == {Q, DOWN}
    for name in (Q, DOWN):  # by the rule of the model's class: normal, as wide as its config says
        assert found[name].std().item() == pytest.approx(model.config.initializer_range, rel=0.15)
        assert abs(found[name].mean()) < 0.1 * model.config.initializer_range
    assert f"random, as model.allow_missing has it: 2 tensors ({Q}, {DOWN})" in caplog.text


def test_random_weights_are_those_of_the_seed_whatever_was_drawn_before(make):
    folder = make(LLAMA, without(Q))
    values = []
    for seed, draws in ((1, 0), (1, 5), (2, 0)):
        torch.manual_seed(seed)
        torch.rand(draws)
        before = torch.get_rng_state()
        values.append(read(folder, allow_missing=[Q]).get_parameter(Q))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


@pytest.mark.parametrize("allowed", ["model.layers.0.self_attn.k_proj.weight", "q_proj", "*.bias"])
def test_a_name_that_is_not_missing_is_refused(make, allowed):
    refused(make(LLAMA, without(Q)), f"model.allow_missing names {allowed!r}, which", allow_missing=[Q, allowed])
    refused(make(LLAMA, without(Q)), f"does not lack. It lacks 1 tensor ({Q})", allow_missing=[Q, allowed])
    refused(make(LLAMA), "It lacks nothing", allow_missing=[allowed])


def test_what_is_missing_beside_what_may_be_is_refused(make):
    refused(make(LLAMA, without(Q, DOWN)), f"would be random: 1 tensor ({DOWN})", allow_missing=[Q])
    refused(make(LLAMA, without(Q)), "To begin with random values there, name them in model.allow_missing")


def test_random_weights_are_trained_and_exported_as_others_are(make, tmp_path):
    loaded = load(ModelConfig(name=str(make(LLAMA, without(Q))), allow_missing=[Q]))
    export(loaded, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / SINGLE)[Q], loaded.model.model.get_parameter(Q))
    read(tmp_path / "out")


def test_a_teacher_is_whole_too(make, make_model):
    folder = make(LLAMA, without(Q))
    with pytest.raises(ModelError, match=r"Missing, and would be random: 1 tensor \(model\.layers\.0"):
        load_teacher(ModelConfig(name=str(folder)), make_model())


# -- what the files tell ------------------------------------------------------------------------------

QUANTISED = {
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.quant_method = 'fp8'"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config.quant_method = 'gptq'"),
    "awq": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config.quant_method = 'awq'"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "'bitsandbytes'"),
    "compressed": ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config.quant_method"),
    "mlx": ({"quantization": {"group_size": 64, "bits": 4}}, "config.json: quantization.bits = 4"),
    "without a method": ({"quantization_config": {"weights": "int8"}}, "(config.json: quantization_config)"),
    "inside": ({"text_config": {"quantization_config": {"quant_method": "hqq"}}},
               "config.json: text_config.quantization_config.quant_method = 'hqq'"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "message"), QUANTISED.values(), ids=QUANTISED)
def test_quantised_weights_are_refused_before_one_is_read(make, config, message):
    folder = make(**config)
    (folder / SINGLE).write_bytes(b"never read")
    refused(folder, message)
    refused(folder, "and such weights do not train. ")


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_quantised_weights_that_another_file_tells_of_are_refused(make, file):
    folder = make()
    (folder / file).write_text("{}")
    refused(folder, f"is quantised ({file})")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_that_are_packed_without_a_word_are_refused(make, dtype):
    folder = make(LLAMA, lambda t: t | {Q: torch.ones(32, 32).to(dtype)})
    refused(folder, f"is quantised, no plain floats: 1 tensor ({Q} (")


def test_an_empty_entry_says_nothing(make):
    read(make(quantization_config=None))


def test_adapters_are_no_model(make, tmp_path, make_tokenizer):
    whole = make()
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(whole), LoraConfig(r=2, target_modules=["q_proj"]))
    for folder in (tmp_path / "alone", whole):
        adapted.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        refused(folder, "holds adapters (adapter_config.json)")


DAMAGES = {
    "cut short": (lambda raw: raw[:-100], f"{SINGLE} is no whole safetensors file (it has"),
    "too long": (lambda raw: raw + b"more", "and its header speaks of"),
    "empty": (lambda raw: b"", "its header cannot be read"),
    "zeros": (lambda raw: bytes(len(raw)), "its header cannot be read"),
    "text": (lambda raw: b"<html>not found</html>", "its header cannot be read"),
    "pointer": (lambda raw: b"version https://git-lfs.github.com/spec/v1\noid", "it is a pointer of Git LFS"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named(make, damage, message):
    folder = make()
    (folder / SINGLE).write_bytes(damage((folder / SINGLE).read_bytes()))
    refused(folder, message)


def test_a_missing_shard_is_named(make):
    folder = make(shard="20KB")
    first, *others = sorted(folder.glob("model-*.safetensors"))
    first.unlink()
    refused(folder, f"{INDEX} names {1 + len(others)} files, of which 1 are missing: {first.name}")


def test_a_tensor_that_the_index_alone_knows_is_missed(make):
    folder = make(shard="20KB")
    [file] = [path for path in folder.glob("model-*.safetensors") if HEAD in load_file(path)]
    save_file(without(HEAD)(load_file(file)), file, metadata={"format": "pt"})
    refused(folder, f"Missing, and would be random: 1 tensor ({HEAD})")


def test_two_checkpoints_in_one_folder_are_refused(make):
    folder = make(shard="20KB")
    make()
    assert (folder / SINGLE).is_file()
    (folder / INDEX).write_text(json.dumps({"weight_map": {HEAD: "model-00001-of-00002.safetensors"}}))
    refused(folder, f"holds two checkpoints, {SINGLE} and the files of {INDEX}")
    (folder / INDEX).write_text(json.dumps({"weight_map": {HEAD: SINGLE}}))
    read(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 1}'])
def test_a_damaged_index_is_named(make, content):
    folder = make()
    (folder / INDEX).write_text(content)
    refused(folder, f"{INDEX} is damaged")


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid", b"PK\x03\x04cut", b""])
def test_a_damaged_bin_file_is_refused(make, content):
    folder = make()
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    refused(folder, "pytorch_model.bin is a pointer" if content.startswith(b"version") else "cannot be loaded")


@pytest.mark.parametrize(
    ("config", "message"), [(None, "it has no config.json"), ("{", "its config.json"), ("[]", "no settings")]
)
def test_a_folder_without_a_config_is_refused(make, config, message):
    folder = make()
    (folder / "config.json").unlink() if config is None else (folder / "config.json").write_text(config)
    refused(folder, message)


# -- GGUF ---------------------------------------------------------------------------------------------


@pytest.fixture
def gguf(tmp_path):
    """`gguf(drop, more)`: loads a Llama of one layer and 64 ids from a file without, and with other tensors."""
    package = pytest.importorskip("gguf")

    def write(drop=(), more=()):
        writer = package.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(16)
        writer.add_block_count(1)
        writer.add_feed_forward_length(24)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(64)
        writer.add_rope_dimension_count(8)
        ffn = {"gate": (24, 16), "up": (24, 16), "down": (16, 24), "norm": (16,)}
        attn = {"q": (16, 16), "k": (8, 16), "v": (8, 16), "output": (16, 16), "norm": (16,)}
        shapes = {"token_embd.weight": (64, 16), "output.weight": (64, 16), "output_norm.weight": (16,)}
        shapes |= {f"blk.0.attn_{name}.weight": shape for name, shape in attn.items()}
        shapes |= {f"blk.0.ffn_{name}.weight": shape for name, shape in ffn.items()}
        for name, shape in (shapes | dict(more)).items():
            if name not in drop:
                writer.add_tensor(name, numpy.random.default_rng(0).normal(size=shape).astype(numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return load_whole("a.gguf", str(tmp_path), torch.float32, {"gguf_file": "a.gguf"})

    return write


def test_a_gguf_file_is_loaded_whole(gguf):
    assert gguf().lm_head.weight.shape == (64, 16)
    tied = gguf(drop=["output.weight"])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("drop", "more", "message"),
    [
        (["blk.0.attn_q.weight"], (), r"would be random: 1 tensor \(model\.layers\.0\.self_attn\.q_proj\.weight\)"),
        ((), {"output.weight": (70, 16)}, r"lm_head\.weight \[70, 16\] in place of \[64, 16\]"),
        ((), {"blk.0.attn_q.bias": (16,)}, r"taken by nothing: 1 tensor \(blk\.0\.attn_q\.bias\)"),
    ],
)
def test_a_gguf_file_that_is_not_whole_is_refused(gguf, drop, more, message):
    with pytest.raises(ModelError, match=message):
        gguf(drop, more)
