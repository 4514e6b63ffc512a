"""Mixtures of experts in vLLM, the real CPU build: an update serves the weights that were sent.

On a CPU vLLM packs experts for its kernel, and gpt-oss copies its weights past the loaders that updates go by: both
were accepted and wrong. Not covered: a GPU, several workers, 16-bit weights.
"""

import dataclasses
from contextlib import closing

import pytest
import torch
from peft import LoraConfig, get_peft_model

from opd.engines.config import Limits, VllmConfig
from opd.engines.vllm import VllmEngine
from opd.engines.weights import ModelWeights
from opd.errors import ModelError
from opd.models.causal import CausalModel
from tests.architectures import ARCHITECTURES, engine_gap

pytest.importorskip("vllm", reason="vLLM is not installed: make test installs its CPU build where there is no GPU")
pytestmark = pytest.mark.slow


def start(model):
    return closing(VllmEngine(model, VllmConfig(kv_cache_gib=0.1), Limits(256, 8)))


def check_updates(architecture, first, second):
    """Both sets of weights in turn, the first once more: an update must not depend on the one before."""
    models = [CausalModel(first), CausalModel(second)]
    with start(models[0]) as engine:
        for version, model in enumerate([*models, models[0]]):
            engine.update_weights(ModelWeights(model), version)
            assert engine_gap(model.model, engine) < 1e-4, architecture


@pytest.mark.parametrize(
    "name",
    ["mixtral", "gpt_oss", *(pytest.param(name, marks=pytest.mark.long) for name in ("olmoe", "qwen2_moe"))],
)
def test_a_mixture_is_served_with_the_weights_of_each_update(name):
    architecture = ARCHITECTURES[name]
    check_updates(name, architecture.model(), architecture.model(seed=1))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern")  # names of its own making
def test_experts_that_are_padded_and_have_adapters_are_served_as_they_are_trained():
    wide = dict(ARCHITECTURES["qwen3_moe"].settings) | {"moe_intermediate_size": 40}  # padded to a multiple of 32
    architecture = dataclasses.replace(ARCHITECTURES["qwen3_moe"], settings=wide)
    adapted = get_peft_model(architecture.model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert any(type(module).__name__ == "ParamWrapper" for module in adapted.modules())
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    check_updates("qwen3_moe", adapted, architecture.model(seed=1))


def test_weights_that_would_be_taken_and_lost_are_named(monkeypatch):
    monkeypatch.setattr("opd.engines.vllm_worker.COPIED", ())
    model = CausalModel(ARCHITECTURES["gpt_oss"].model())
    lost = r"GptOssForCausalLM takes 10 weights, such as \['model.layers.0.attn.sinks', .* would stay the old ones"
    with start(model) as engine, pytest.raises(ModelError, match=lost):
        engine.update_weights(ModelWeights(model), 0)
