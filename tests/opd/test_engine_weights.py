"""What a model hands to an engine that keeps its own copy: names of a checkpoint, adapters merged, nothing touched.

Not covered: ZeRO-3 (its gathering is stood in for by a context that hides parameters outside of it).
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter

from opd.engines.weights import ModelWeights, in_chunks
from tests.architectures import ARCHITECTURES


def randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def test_names_and_values_are_those_of_the_checkpoint(make_model):
    model = make_model()
    sent, own = dict(ModelWeights(model)), model.model.state_dict()
    assert sent.keys() == own.keys()
    assert all(torch.equal(sent[name], own[name]) for name in own)


def test_a_tied_head_is_sent_once(make_model):
    names = [name for name, _ in ModelWeights(make_model(tie_word_embeddings=True))]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_adapters_are_merged_into_the_names_of_the_plain_model(make_model):
    plain, adapted = make_model(), randomise(make_model(lora=True))
    sent = dict(ModelWeights(adapted))
    assert sent.keys() == plain.model.state_dict().keys()
    plain.model.load_state_dict(sent)
    ids = torch.arange(20)[None]
    theirs, ours = adapted.model(input_ids=ids).logits, plain.model(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (make_model().model(input_ids=ids).logits - theirs).abs().max() > 0.1


def test_merging_leaves_the_model_as_it_was_and_never_adds_up(make_model):
    model = randomise(make_model(lora=True))
    before = {name: p.clone() for name, p in model.named_parameters()}
    first = {name: t.clone() for name, t in ModelWeights(model)}
    again = dict(ModelWeights(model))
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_each_pass_sees_the_weights_as_they_are_then(make_model):
    model = make_model()
    weights = ModelWeights(model)
    before = dict(weights)["model.norm.weight"].clone()
    with torch.no_grad():
        model.model.model.norm.weight.add_(1)
    assert torch.equal(dict(weights)["model.norm.weight"], before + 1)


@pytest.mark.parametrize("lora", [False, True])
def test_gathered_weights_outlive_the_gathering_and_come_a_module_at_a_time(make_model, lora):
    model = randomise(make_model(lora=lora))
    expected = {name: t.clone() for name, t in ModelWeights(model)}
    most = 0

    @contextmanager
    def gather(parameters):
        nonlocal most
        most = max(most, sum(p.numel() for p in parameters))
        yield
        for parameter in parameters:  # what was gathered is given back
            parameter.data = torch.full_like(parameter.data, float("nan"))

    sent = dict(ModelWeights(model, gather=gather))
    assert all(torch.equal(sent[name], expected[name]) for name in expected)
    assert most < sum(p.numel() for p in model.parameters()) / 2


def test_chunks_keep_the_order_and_the_limit(make_model):
    weights = list(ModelWeights(make_model()))
    chunks = list(in_chunks(weights, 40_000))
    assert [name for chunk in chunks for name, _ in chunk] == [name for name, _ in weights]
    assert len(chunks) > 2
    assert all(len(chunk) == 1 or sum(t.nbytes for _, t in chunk) <= 40_000 for chunk in chunks)


# -- as a checkpoint has them ----------------------------------------------------------------------------


def saved(model, folder):
    """What transformers itself writes of a model: the tensors of its files, by name."""
    model.save_pretrained(folder)
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(sent, stored):
    assert sent.keys() == stored.keys()
    assert {name: tensor.shape for name, tensor in sent.items()} == {name: t.shape for name, t in stored.items()}
    assert [name for name in stored if not torch.equal(sent[name], stored[name])] == []
    assert all(tensor.is_contiguous() for tensor in sent.values())


def sent_by(model, **options):
    pairs = list(ModelWeights(SimpleNamespace(model=model), **options))
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_what_is_sent_is_what_the_checkpoint_holds(architecture, tied, tmp_path):
    model = architecture.model(tied=tied)
    stored = saved(model, tmp_path)
    assert_same(sent_by(model), stored)
    assert_same(sent_by(AutoModelForCausalLM.from_pretrained(tmp_path)), stored)  # by the rules that loading it used


def test_the_experts_of_a_mixture_are_sent_one_by_one():
    names = set(sent_by(ARCHITECTURES["mixtral"].model()))
    experts = "model.layers.1.block_sparse_moe.experts"
    assert {f"{experts}.{expert}.{part}.weight" for expert in range(4) for part in ("w1", "w2", "w3")} <= names
    assert not [name for name in names if "gate_up_proj" in name]


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern")  # names of its own making
@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral", "qwen3_moe", "gpt_oss"])
def test_adapters_on_experts_are_sent_as_peft_merges_and_saves_them(name, tmp_path):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = randomise(get_peft_model(ARCHITECTURES[name].model(), lora))
    sent = {name: tensor.clone() for name, tensor in sent_by(adapted).items()}
    stored = saved(adapted.merge_and_unload(), tmp_path)
    assert sent.keys() == stored.keys()
    assert max((sent[name] - stored[name]).abs().max().item() for name in stored) < 1e-6


def test_modules_that_are_one_tensor_of_the_checkpoint_are_sent_as_one_and_gathered_together(tmp_path):
    model = ARCHITECTURES["llama"].model()
    parts = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    model._weight_conversions = [WeightConverter("mlp.fused.weight", parts, [Chunk(0)])]
    whole = set()

    @contextmanager
    def gather(parameters):
        whole.add(len(parameters))
        yield

    stored = saved(model, tmp_path)
    assert stored["model.layers.0.mlp.fused.weight"].shape == (192, 64)
    assert_same(sent_by(model, gather=gather), stored)
    assert max(whole) == 2
