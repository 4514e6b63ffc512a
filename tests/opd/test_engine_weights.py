"""What a model hands to an engine that keeps its own copy: names of a checkpoint, adapters merged, nothing touched.

Not covered: ZeRO-3 (its gathering is stood in for by a context that hides parameters outside of it).
"""

from contextlib import contextmanager

import pytest
import torch

from opd.engines.weights import ModelWeights, in_chunks


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
