"""Weights on plain models; slices of real ranks are in tests/zero."""

import pytest
import torch

from opd.models import sharding
from opd.models.sharding import blank_copy, collected, fill, held, largest_gather, swapped, whole, whole_in_turn

KINDS = [{}, {"tie_word_embeddings": True}, {"lora": True}]


@pytest.mark.parametrize("options", KINDS, ids=["plain", "tied", "lora"])
def test_a_blank_copy_once_filled_computes_what_the_model_does(make_model, options):
    model = make_model(**options)
    twin = blank_copy(model, "cpu")
    ids = torch.arange(6)[None]
    fill(twin, model)
    assert not any(p.requires_grad for p in twin.parameters())
    with torch.no_grad():
        assert torch.equal(twin.model(input_ids=ids).logits, model.model(input_ids=ids).logits)
        next(model.parameters()).add_(1)
        assert not torch.equal(next(twin.parameters()), next(model.parameters()))


def test_a_blank_on_meta_holds_no_weights_and_becomes_the_whole_model(make_model):
    model = make_model(lora=True)
    blank = blank_copy(model, "meta")
    assert {p.device.type for p in blank.parameters()} == {"meta"}
    assert collected(blank, model, keep=False) is blank
    found = dict(collected(blank, model, keep=True).named_parameters())
    assert all(torch.equal(found[name], p) for name, p in model.named_parameters())


def test_swapped_weights_are_in_place_only_within(make_model):
    model = make_model(tie_word_embeddings=True)
    parameters = dict(model.named_parameters())
    before = {name: p.clone() for name, p in parameters.items()}
    others = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}

    def interrupted():
        with swapped(parameters, others):
            assert all(not p.any() and p.dtype == torch.float32 for p in model.parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert held(next(model.parameters())).data_ptr() == next(model.parameters()).data_ptr()


def test_every_weight_comes_once_and_not_too_many_at_a_time(make_model, monkeypatch):
    model = make_model(tie_word_embeddings=True)
    sizes = [p.numel() * 4 for p in model.parameters()]
    monkeypatch.setattr(sharding, "GATHER_BYTES", 2 * min(sizes))
    gathered = []

    def note(parameters):
        gathered.append([p.numel() * 4 for p in parameters])
        return whole([])

    monkeypatch.setattr(sharding, "whole", note)
    assert [name for name, _ in whole_in_turn(model)] == [name for name, _ in model.named_parameters()]
    assert [size for batch in gathered for size in batch] == sizes
    assert len(gathered) > 1
    assert max(map(sum, gathered)) <= largest_gather(sizes)
