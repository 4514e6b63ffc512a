"""Loading and exporting: folders made on the spot. Not covered: hubs, and SmolLM2's package (`tests/launch`)."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from opd.errors import ConfigError, ModelError
from opd.models.causal import CausalModel
from opd.models.config import LoraConfig, ModelConfig
from opd.models.description import dropouts
from opd.models.loading import Loaded, export, load, load_teacher

IDS = torch.arange(5, 25)[None]


@pytest.fixture
def folder(tmp_path, make_model, make_tokenizer):
    """A saved model, as a hub would give it."""
    path = tmp_path / "model"
    make_model().model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def train(loaded):
    """Move everything that trains, so that an export of the old weights would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_a_folder_loads_as_the_model_that_was_saved(folder, make_model, make_tokenizer):
    loaded = load(ModelConfig(name=str(folder)))
    torch.testing.assert_close(logits(loaded.model.model), logits(make_model().model))
    assert loaded.tokenizer.chat_template == make_tokenizer().chat_template
    assert not loaded.model.training
    assert loaded.stop_ids == []


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_type_of_the_weights_is_the_one_asked_for(folder, dtype):
    loaded = load(ModelConfig(name=str(folder), dtype=dtype))
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}


def test_automatic_weights_on_a_cpu_are_float32(folder):
    loaded = load(ModelConfig(name=str(folder)), device="cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("saved", "expected"), [(7, [7]), ([7, 9], [7, 9])])
def test_the_stop_ids_are_those_of_the_models_generation_settings(folder, saved, expected):
    GenerationConfig(eos_token_id=saved).save_pretrained(folder)
    assert load(ModelConfig(name=str(folder))).stop_ids == expected


def test_a_name_that_cannot_be_loaded_says_so(tmp_path):
    with pytest.raises(ModelError, match=r"model\.name = '.*absent' cannot be loaded"):
        load(ModelConfig(name=str(tmp_path / "absent")))


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path, make_model, make_tokenizer):
    make_model(vocab=200).model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="the tokenizer has 273 ids but the model only 200 embeddings"):
        load(ModelConfig(name=str(tmp_path)))


def test_embeddings_that_are_padded_beyond_the_tokenizer_are_fine(tmp_path, make_model, make_tokenizer):
    make_model(vocab=320).model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert load(ModelConfig(name=str(tmp_path))).model.head().vocabulary == 320


def test_with_adapters_only_they_train_and_the_model_says_what_it_said(folder, make_model):
    loaded = load(ModelConfig(name=str(folder), lora=LoraConfig(r=2)))
    trained = [name for name, p in loaded.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    torch.testing.assert_close(logits(loaded.model.model), logits(make_model().model))


def test_adapters_go_where_they_are_told(folder):
    loaded = load(ModelConfig(name=str(folder), lora=LoraConfig(r=2, alpha=6, targets=["q_proj"])))
    trained = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2
    assert all(".q_proj.lora_" in name for name in trained)
    assert {min(p.shape) for p in trained.values()} == {2}
    layer = next(m for name, m in loaded.model.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    assert layer.scaling["default"] == 3.0


def test_adapters_for_modules_that_are_not_there_are_refused(folder):
    with pytest.raises(ConfigError, match=r"model\.lora\.targets = \['qq_proj'\]"):
        load(ModelConfig(name=str(folder), lora=LoraConfig(targets=["qq_proj"])))


def test_recomputing_activations_is_switched_on_when_asked(folder):
    for asked in (False, True):
        loaded = load(ModelConfig(name=str(folder), gradient_checkpointing=asked))
        calls = []
        layer = next(m for name, m in loaded.model.named_modules() if name.endswith("layers.0.self_attn"))
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        loaded.model(IDS, torch.tensor([3, 4])).sum().backward()
        assert len(calls) == 1 + asked


def test_padding_takes_any_id_that_there_is(folder, make_tokenizer):
    loaded = load(ModelConfig(name=str(folder)))
    assert loaded.pad_id == make_tokenizer().pad_token_id
    bare = AutoTokenizer.from_pretrained(folder)
    bare.pad_token = None
    assert replace(loaded, tokenizer=bare).pad_id == make_tokenizer().eos_token_id
    bare.eos_token = None
    assert replace(loaded, tokenizer=bare).pad_id == 0


# -- exports ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)], ids=["full", "lora"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_trained_export_loads_in_plain_transformers_and_gives_the_same_logits(
    tmp_path, make_model, make_tokenizer, lora, tied
):
    make_model(tie_word_embeddings=tied).model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    loaded = load(ModelConfig(name=str(tmp_path / "model"), lora=lora, dtype="float64"))
    before = logits(loaded.model.model)
    train(loaded)
    trained = logits(loaded.model.model)
    assert (trained - before).abs().max() > 0.1
    export(loaded, tmp_path / "out" / "export")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "export").eval()
    torch.testing.assert_close(logits(plain), trained, rtol=1e-9, atol=1e-9)
    assert not any("lora" in name for name, _ in plain.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "export")
    messages = [{"role": "user", "content": "the 12 ab"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == make_tokenizer().apply_chat_template(
        messages, tokenize=False
    )
    assert tokenizer("the 12 ab<|im_end|>")["input_ids"] == make_tokenizer()("the 12 ab<|im_end|>")["input_ids"]


def test_an_export_leaves_the_training_model_as_it_was(folder, tmp_path):
    loaded = load(ModelConfig(name=str(folder), lora=LoraConfig(r=2)))
    train(loaded)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    trained = logits(loaded.model.model)
    export(loaded, tmp_path / "export")
    assert {name for name, _ in loaded.model.named_parameters()} == set(before)
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())
    assert torch.equal(logits(loaded.model.model), trained)


def test_a_second_export_takes_the_place_of_the_first(folder, tmp_path):
    loaded = load(ModelConfig(name=str(folder)))
    export(loaded, tmp_path / "export")
    (tmp_path / "export" / "stale").touch()
    train(loaded)
    export(loaded, tmp_path / "export")
    again = load(ModelConfig(name=str(tmp_path / "export")))
    torch.testing.assert_close(logits(again.model.model), logits(loaded.model.model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "model"]
    assert not (tmp_path / "export" / "stale").exists()


def test_an_export_that_fails_leaves_the_one_before(folder, tmp_path, monkeypatch):
    loaded = load(ModelConfig(name=str(folder)))
    export(loaded, tmp_path / "export")

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fails)
    with pytest.raises(OSError, match="No space left"):
        export(loaded, tmp_path / "export")
    assert isinstance(load(ModelConfig(name=str(tmp_path / "export"))), Loaded)


# -- dropout, and the attention that a model needs ----------------------------------------------------

IDS_OF_ALL = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
OPT = OPTConfig(vocab_size=273, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, dropout=0.4,
                word_embed_proj_dim=16, max_position_embeddings=64, attention_dropout=0.25, layerdrop=0.5, init_std=0.3,
                **IDS_OF_ALL)  # fmt: skip
GPT2 = GPT2Config(vocab_size=273, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.3, attn_pdrop=0.2, **IDS_OF_ALL)
GEMMA2 = Gemma2Config(vocab_size=273, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=1, head_dim=16, attn_logit_softcapping=0.5, initializer_range=1.0,
                      query_pre_attn_scalar=1, **IDS_OF_ALL)  # fmt: skip


@pytest.fixture
def saved(tmp_path, make_tokenizer):
    """`saved(config)`: the folder of a model of that config."""

    def made(config):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        model.save_pretrained(tmp_path / "model")
        make_tokenizer().save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return made


def loss_of(model):
    """The loss of the next ids, as a training step computes it."""
    logits = model.logits(model(IDS, torch.arange(19)))
    return torch.nn.functional.cross_entropy(logits, IDS[0, 1:])


@pytest.mark.parametrize("config", [OPT, GPT2], ids=["OPT", "GPT-2"])
def test_no_dropout_comes_on_while_training_and_the_export_keeps_the_bases(saved, tmp_path, config):
    folder = saved(config)
    losses = []
    for checkpointing in (False, True):
        loaded = load(ModelConfig(name=str(folder), gradient_checkpointing=checkpointing))
        losses += [loss_of(loaded.model) for _ in range(2)]
        losses[-1].backward()
    losses.append(loss_of(CausalModel(AutoModelForCausalLM.from_pretrained(folder).eval())))
    found = [loss.item() for loss in losses]
    assert found == pytest.approx([found[-1]] * 5, rel=1e-5)
    assert not dropouts(loaded.model.config)
    export(loaded, tmp_path / "export")
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "export", folder))
    assert ours == theirs
    assert dropouts(AutoConfig.from_pretrained(tmp_path / "export")) == dropouts(config) != {}


def test_dropout_that_would_come_on_is_no_silent_loss():
    torch.manual_seed(0)
    model = OPTForCausalLM(copy.deepcopy(OPT)).eval()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = CausalModel(model).eval()
    with torch.no_grad():
        model(IDS, torch.arange(20))
    with pytest.raises(ModelError, match=r"layers\.0 of OPTForCausalLM would drop out at random while training"):
        model(IDS, torch.arange(20))


def test_a_soft_cap_is_applied_and_never_left_out_in_silence(saved):
    folder = saved(GEMMA2)
    with torch.no_grad():
        expected, uncapped = (
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation=how)(IDS).logits.log_softmax(-1)
            for how in ("eager", "sdpa")
        )
        assert (expected - uncapped).abs().max() > 0.05
        for attention in ("auto", "eager"):
            model = load(ModelConfig(name=str(folder), attention=attention)).model
            torch.testing.assert_close(model.logits(model.hidden(IDS)).log_softmax(-1), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match=r"model\.attention = sdpa leaves out the soft-cap of .*softcapping = 0\.5"):
        load(ModelConfig(name=str(folder), attention="sdpa"))


@pytest.mark.parametrize("attention", ["auto", "eager", "sdpa"])
def test_the_attention_is_the_one_asked_for_and_a_teachers_too(folder, make_model, attention):
    config = ModelConfig(name=str(folder), attention=attention)
    expected = "sdpa" if attention == "auto" else attention
    for model in (load(config).model, load_teacher(config, make_model())):
        assert model.config._attn_implementation == expected


def test_the_soft_cap_holds_in_an_export_and_for_its_log_probs(saved, tmp_path):
    loaded = load(ModelConfig(name=str(saved(GEMMA2))))
    export(loaded, tmp_path / "export")
    again = load(ModelConfig(name=str(tmp_path / "export")))
    torch.testing.assert_close(again.model.hidden(IDS), loaded.model.hidden(IDS))
