"""The embedded engine and the trainer on small random models of many architectures, against transformers' own models.

The oracle is one forward pass of a whole sequence without a cache or padding. Windows are 8 tokens long, and most
sequences are longer. Not covered: 16-bit weights, a GPU.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from opd.engines.base import Request, Sampling, generate
from opd.engines.transformers import TransformersEngine
from opd.errors import ModelError
from opd.models.causal import CausalModel
from opd.models.layers import CHUNK, FULL, STATEFUL, WINDOW, Reach, reach_of

VOCABULARY, LENGTH = 96, 8
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_BOTH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": LENGTH}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MLA = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip

SERVED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": LENGTH},
    "ministral": {"sliding_window": LENGTH, "layer_types": ["sliding_attention"] * 2},
    "ministral3": {},
    "mixtral": {**_LOCAL, "sliding_window": LENGTH},
    "qwen2": {"use_sliding_window": True, "sliding_window": LENGTH, "max_window_layers": 1},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "phi": {},
    "phi3": {"sliding_window": LENGTH},
    "phimoe": {**_LOCAL, "sliding_window": LENGTH},
    "gemma": {},
    "gemma2": {**_BOTH, "attn_implementation": "eager", "query_pre_attn_scalar": 8},
    "gemma3_text": {**_BOTH, "query_pre_attn_scalar": 8},
    "vaultgemma": {**_BOTH, "attn_implementation": "eager", "query_pre_attn_scalar": 8},
    "cohere": {},
    "cohere2": _BOTH,
    "olmo": {},
    "olmo2": {},
    "olmo3": _BOTH,
    "olmoe": {k: v for k, v in _EXPERTS.items() if k != "moe_intermediate_size"},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layer_interval": 2},
    "gpt_oss": {**_BOTH, **_LOCAL},
    "llama4_text": {
        **_LOCAL, "num_experts_per_tok": 1, "num_hidden_layers": 4, "attention_chunk_size": LENGTH,
        "intermediate_size_mlp": 48, "layer_types": ["chunked_attention", "full_attention"] * 2,
        "no_rope_layers": [1, 0, 1, 0], "interleave_moe_layer_step": 2,
    },
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "glm": {},
    "glm4": {},
    "glm4_moe": {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "granite": {},
    "granitemoe": _LOCAL,
    "starcoder2": {"sliding_window": LENGTH},
    "stablelm": {},
    "persimmon": {},
    "nemotron": {},
    "exaone4": {**_BOTH, "sliding_window_pattern": 2},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "helium": {},
    "arcee": {},
    "afmoe": {**_BOTH, **_EXPERTS, "num_dense_layers": 1, "num_shared_experts": 1},
    "cwm": _BOTH,
    "gpt2": _OLD,
    "gptj": {**_OLD, "rotary_dim": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None},
    "biogpt": {},
    "granitemoehybrid": {
        **_LOCAL, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "shared_intermediate_size": 32,
        "mamba_n_heads": 4, "mamba_d_head": 16,
    },
    "lfm2": {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2},
    "mellum": {**_BOTH, **_EXPERTS},
    "exaone_moe": {**_BOTH, **_EXPERTS},
    "doge": {},
    "gemma3n_text": {
        **_BOTH, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2, "intermediate_size": [48] * 4, "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        **_BOTH, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8, "global_head_dim": 16,
    },
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
    "codegen": {**_OLD, "rotary_dim": 4},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "granite_swa": _BOTH,
    "mimo_v2_flash": {**_BOTH},
    "minimax_m2": _LOCAL,
    "dots1": {**_EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, **_BOTH},
    "seed_oss": {},
    "apertus": {},
    "bitnet": {},
    "nanochat": {},
    "jais2": {},
    "diffllama": {},
}  # fmt: skip


def small(kind: str, seed: int = 0, **changes: Any) -> nn.Module:
    """Build a random model of an architecture, in float32 and without dropout, whose distributions are not flat."""
    given = {key: value for key, value in (SHAPE | SERVED.get(kind, {}) | changes).items() if value is not None}
    attention = given.pop("attn_implementation", None)
    config = AutoConfig.for_model(given.pop("model_type", kind), **given)
    for name in vars(config):
        if "dropout" in name or "pdrop" in name:
            setattr(config, name, 0.0)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.25)
            elif "sink" in name:
                parameter.normal_()
    return model.eval()


@pytest.fixture(scope="module")
def models():
    """`models(kind)`: the small model of an architecture, made once."""
    made = {}

    def model(kind):
        if kind not in made:
            made[kind] = CausalModel(small(kind))
        return made[kind]

    return model


def ids(count, seed):
    return torch.randint(5, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def own_logprobs(model, sequence):
    """Log-probs [T, V] by transformers' whole model, which sees this sequence alone and caches nothing."""
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0]
    return logits.double().log_softmax(-1)


def turns(asked, done, number):
    """The next turn of all conversations; at the second of them, one forks."""
    for r in asked:
        before = r.prompt_ids[:20] if (number, r.session) == (1, 1) else r.prompt_ids
        yield replace(r, prompt_ids=before + done[r.session].token_ids + ids(3 + r.session, 9))


def play(engine, asked):
    engine.begin(Sampling(temperature=1.0), frozenset())
    return {d.session: d for d in generate(engine, asked)}


def assert_the_models_own(model, asked, done):
    for r in asked:
        sampled = torch.tensor(done[r.session].token_ids)
        rows = own_logprobs(model, r.prompt_ids + sampled.tolist())[len(r.prompt_ids) - 1 : -1]
        expected = rows.gather(-1, sampled[:, None])[:, 0].tolist()
        assert done[r.session].logprobs == pytest.approx(expected, abs=1e-4)


every_architecture = pytest.mark.parametrize("kind", SERVED)


@every_architecture
def test_sampled_logprobs_are_the_models_own_over_turns_forks_and_unequal_rows(models, kind):
    model = models(kind)
    engine = TransformersEngine(model)
    asked = [Request(session=n, prompt_ids=ids(size, n), seed=n, max_tokens=6) for n, size in enumerate([3, 30, 1, 17])]
    for number in range(3):
        done = play(engine, asked)
        assert_the_models_own(model, asked, done)
        asked = list(turns(asked, done, number))


@every_architecture
def test_training_sees_what_the_whole_model_sees_beyond_windows_and_beside_padding(models, kind):
    model, sequences = models(kind), [ids(40, 1), ids(11, 2), ids(25, 3)]
    padded = torch.tensor([sequence + [0] * (40 - len(sequence)) for sequence in sequences])
    with torch.no_grad():
        ours = model.logits(model.hidden(padded)).double().log_softmax(-1)
    for row, sequence in zip(ours, sequences, strict=True):
        torch.testing.assert_close(row[: len(sequence)], own_logprobs(model, sequence), atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_query_far_behind_its_row_sees_something(attention):
    model = CausalModel(small("mistral", attn_implementation=attention))
    engine = TransformersEngine(model)
    long, fresh = (Request(session=n, prompt_ids=ids(size, n), seed=n, max_tokens=2) for n, size in ((0, 60), (1, 30)))
    long = replace(long, prompt_ids=long.prompt_ids + play(engine, [long])[0].token_ids + ids(2, 3))
    for asked in ([long, fresh], [replace(long, prompt_ids=long.prompt_ids + ids(40, 4))]):
        # The long one is fed 3 ids beside 30: 27 padded queries, more than a window's length behind its end.
        assert_the_models_own(model, asked, play(engine, asked))


WINDOWED = [kind for kind, given in SERVED.items() if "sliding_window" in given]


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_that_is_never_reached_is_full_attention_to_the_bit(monkeypatch, kind):
    model = CausalModel(small(kind, sliding_window=64))
    asked = [Request(session=n, prompt_ids=ids(size, n), seed=n, max_tokens=8) for n, size in enumerate([3, 50, 17])]

    windowed = play(TransformersEngine(model), asked)
    monkeypatch.setattr("opd.engines.transformers.reach_of", lambda _: Reach((FULL,)))
    assert windowed == play(TransformersEngine(model), asked)


# -- what cannot be served ------------------------------------------------------------------------------

REFUSED = {
    "an SSM": ({"model_type": "mamba"}, "layers of mamba keep a state of their own"),
    "a hybrid by its name": ({"model_type": "jamba"}, "layers of jamba keep a state"),
    "a hybrid by its layers": (
        {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
        "it has layers of linear_attention, which keep a state",
    ),
    "convolutions": ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "layers of conv, which"),
    "a part for text": (
        {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}},
        "layers of qwen3_5_text keep a state",
    ),
    "masks of its own": ({"model_type": "gpt_neo"}, "gpt_neo computes who sees whom by itself"),
    "positions in its masks": ({"model_type": "falcon", "alibi": True}, "falcon computes who sees whom by itself"),
    "an unknown kind": ({"model_type": "new", "layer_types": ["sparse_attention"]}, "layers of sparse_attention"),
}


@pytest.mark.parametrize(("config", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_a_mask_cannot_say_is_refused_with_the_reason(config, reason):
    with pytest.raises(ValueError, match=reason):
        reach_of(config)


def test_layers_are_read_by_kind():
    assert reach_of({"model_type": "llama"}) == Reach((FULL,))
    assert reach_of({"model_type": "mistral", "sliding_window": 4096}) == Reach((WINDOW,), window=4096)
    assert reach_of({"model_type": "falcon", "alibi": False}) == Reach((FULL,))
    hybrid = {"model_type": "granitemoehybrid", "layer_types": ["attention", "attention"]}
    assert reach_of(hybrid) == Reach((FULL,))
    mixed = {"layer_types": [CHUNK, FULL], "attention_chunk_size": 8}
    assert reach_of({"model_type": "gemma3", "text_config": mixed}) == Reach((CHUNK, FULL), chunk=8)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "mamba"])
def test_the_engine_itself_refuses_them_too_and_names_vllm(kind):
    model = small("llama")
    object.__setattr__(model, "config", AutoConfig.for_model(kind))
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ModelError, match=r"transformers cannot generate with this model: .*Set rollout\.engine: vllm"):
        TransformersEngine(CausalModel(model))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # importing all of them
def test_the_architectures_with_a_state_are_those_that_transformers_calls_so():
    stateful = {
        config.model_type
        for config, made in MODEL_FOR_CAUSAL_LM_MAPPING.items()
        if any(getattr(kind, "_is_stateful", False) for kind in (made if isinstance(made, tuple) else (made,)))
    }
    assert stateful <= STATEFUL
    assert STATEFUL - stateful == {"inkling_text", "lfm2", "lfm2_moe", "minimax"}  # a convolution, or linear attention
