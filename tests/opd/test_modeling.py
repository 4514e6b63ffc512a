"""A model as decoder and head: what is accepted, and that our reading of the head is the model's own."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaForCausalLM

from opd.errors import ModelError
from opd.maths.logprobs import chunked_logprobs
from opd.models.causal import CausalModel
from opd.models.config import ModelConfig
from opd.models.loading import load
from tests.architectures import ARCHITECTURES, write_checkpoint

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(5, 17)[None]


def built(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.7)  # large logits, so that a soft cap and a scale show
    return model


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0), "softcap"),
        (GraniteConfig(**SMALL, logits_scaling=4.0), "scale"),
        (CohereConfig(**SMALL, logit_scale=0.3), "scale"),
    ],
    ids=["soft cap", "divided", "multiplied"],
)
def test_capped_and_scaled_logits_are_the_models_own(config, field):
    inner = built(config)
    model = CausalModel(inner)
    assert getattr(model.head(), field) not in (None, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model.hidden(IDS)), inner(input_ids=IDS).logits)


@pytest.mark.parametrize(
    "config",
    [Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=5.0), GraniteConfig(**SMALL, logits_scaling=4.0)],
)
def test_the_loss_reads_the_capped_and_scaled_head_too(config):
    inner = built(config)
    model = CausalModel(inner)
    rows, targets = torch.arange(11), IDS[0, 1:]
    with torch.no_grad():
        ours = chunked_logprobs(model(IDS, rows), model.head(), targets)
        theirs = inner(input_ids=IDS).logits[0, :-1].log_softmax(-1)[rows, targets]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Unknown(LlamaForCausalLM):
    """A head that does something of its own to the logits."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.sinh()
        return output


def test_a_head_that_does_something_unknown_is_refused(make_model):
    inner = make_model().model
    inner.__class__ = Unknown
    with pytest.raises(ModelError, match=r"Unknown computes its logits in a way that is not known here: .* nats"):
        CausalModel(inner)


def test_a_head_that_is_not_linear_is_refused(make_model):
    inner = make_model().model
    inner.lm_head = nn.Sequential(inner.lm_head, nn.Identity())
    with pytest.raises(ModelError, match="is a Sequential, but must be a plain linear layer"):
        CausalModel(inner)


def test_an_adapter_on_the_head_is_refused(make_model):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(make_model().model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ModelError, match=r"no adapter on it: leave it out of model\.lora\.targets"):
        CausalModel(adapted)


def test_padding_on_the_right_changes_no_hidden_state(make_model):
    model = make_model(dtype=torch.float64)
    rows = torch.tensor([3, 4, 11])
    plain = model(IDS, rows)
    padded = model(torch.nn.functional.pad(IDS, (0, 7), value=9), rows)
    torch.testing.assert_close(plain, padded, rtol=0, atol=1e-12)


def test_rows_index_the_flattened_batch(make_model):
    model = make_model(dtype=torch.float64)
    both = torch.cat([IDS, IDS.flip(1)])
    hidden = model(both, torch.tensor([2, 12 + 2]))
    expected = torch.stack([model.hidden(both)[0, 2], model.hidden(both)[1, 2]])
    torch.testing.assert_close(hidden, expected, rtol=0, atol=0)


def test_wrapping_leaves_training_mode_and_weights_alone(make_model):
    inner = make_model().model.train()
    weights = {name: p.clone() for name, p in inner.named_parameters()}
    model = CausalModel(inner)
    assert inner.training
    assert all(torch.equal(p, weights[name]) for name, p in inner.named_parameters())
    assert {id(p) for p in model.parameters()} == {id(p) for p in inner.parameters()}


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"lora": True}], ids=["plain", "tied", "lora"])
def test_the_head_is_gathered_before_its_weight_is_handed_out(make_model, options):
    model = make_model(**options)
    gathered = []
    model.gather_head = lambda: gathered.append(len(model.head_parameters))
    assert model.head().weight is model.head_parameters[0]
    assert gathered == [1]


def test_a_threshold_that_is_named_like_noise_is_no_dropout(tmp_path):
    """Phi-3.5-MoE chooses its experts by `router_jitter_noise`, in evaluation too."""
    write_checkpoint(ARCHITECTURES["phimoe"], tmp_path / "model")
    ids = torch.arange(20)[None]
    own = load(ModelConfig(name=str(tmp_path / "model"), dtype="float32"), device="cpu").model.model
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        found, wanted = (model(input_ids=ids).logits.log_softmax(-1) for model in (own, theirs))
    assert torch.equal(found, wanted)
    assert own.config.router_jitter_noise == theirs.config.router_jitter_noise > 0
