"""One small model of each architecture, two layers deep, built from transformers' own configs with random weights.

`.ci/models.py` makes a table of docs/models.md from them, and tests go over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from opd.engines.base import Request, Sampling, generate

VOCABULARY = 320
LENGTH = 256
WINDOW = 16

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,  # vLLM has no smaller heads on a CPU
    "max_position_embeddings": LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
WINDOWS = {"sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass(frozen=True)
class Architecture:
    """A kind of model, by transformers' name of it, and what a small one of it is like."""

    name: str
    """The config's `model_type`."""
    kind: str = "dense"
    """dense, window (some layers see only the last tokens), experts, or hybrid (layers other than attention)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of its config, beside the common ones; None leaves a common one out."""
    vllm: bool = False
    """True: vLLM's log-probs are compared with the model's for the table."""

    def config(self, *, tied: bool | None = None) -> Any:
        """Return the small model's config; `tied` overrides whether its head is its embedding."""
        given = {key: value for key, value in (COMMON | dict(self.settings)).items() if value is not None}
        config = AutoConfig.for_model(self.name, **given)
        if tied is not None:
            config.tie_word_embeddings = tied
        return config

    def model(self, *, tied: bool | None = None, seed: int = 0) -> Any:
        """Return a transformers model in float32 and evaluation mode, each weight of it random."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(self.config(tied=tied), dtype=torch.float32)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(torch.randn_like(weight), alpha=0.05)
        model.config.architectures = [type(model).__name__]  # as saving it would write down
        return model.eval()


def write_checkpoint(architecture: Architecture, folder: Path, *, tied: bool | None = None) -> Any:
    """Write a small model with a tokenizer as a Hugging Face folder; return the model."""
    model = architecture.model(tied=tied)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes behind three control tokens, with a plain chat template."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<pad>", *bytes_])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    return made


@torch.no_grad()
def engine_gap(model: Any, engine: Any, *, turns: int = 3) -> float:
    """Return how far an engine's log-probs lie from the model's own, in nats: the most over conversations and turns.

    Three conversations of several turns are sampled, each turn behind all that was said before and a few ids more.
    """
    engine.begin(Sampling(temperature=1.0), frozenset({1}))
    generator = torch.Generator().manual_seed(1)
    said = [torch.randint(3, VOCABULARY - 64, (length,), generator=generator).tolist() for length in (5, 21, 40)]
    worst = 0.0
    for turn in range(turns):
        asked = [
            Request(session=number, prompt_ids=ids, seed=10 * turn + number, max_tokens=8)
            for number, ids in enumerate(said)
        ]
        for done in generate(engine, asked):
            before = len(said[done.session])
            said[done.session] = ids = said[done.session] + done.token_ids
            own = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
            own = own[range(before - 1, len(ids) - 1), done.token_ids]
            worst = max(worst, float((own - torch.tensor(done.logprobs)).abs().max()))
        for ids in said:
            ids += torch.randint(3, VOCABULARY - 64, (6,), generator=generator).tolist()
    for number in range(len(said)):
        engine.release(number)
    return worst


ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", vllm=True),
        Architecture("apertus"),
        Architecture("arcee"),
        Architecture("bloom"),
        Architecture("cohere"),
        Architecture("ernie4_5"),
        Architecture("exaone4", "window", {"sliding_window": WINDOW, "sliding_window_pattern": 2}),
        Architecture("falcon", settings={"head_dim": None}),
        Architecture("gemma", settings={"hidden_act": "gelu_pytorch_tanh"}),
        Architecture("glm"),
        Architecture("glm4"),
        Architecture("gpt2", settings={"n_positions": LENGTH}),
        Architecture("gpt_neox"),
        Architecture("gptj", settings={"rotary_dim": 16}),
        Architecture("granite"),
        Architecture("helium"),
        Architecture("hunyuan_v1_dense"),
        Architecture("mpt"),
        Architecture("nemotron"),
        Architecture("olmo"),
        Architecture("olmo2"),
        Architecture("opt", settings={"ffn_dim": 96, "word_embed_proj_dim": 64}),
        Architecture("persimmon"),
        Architecture("phi"),
        Architecture("phi3", settings={"sliding_window": None}, vllm=True),
        Architecture("qwen2"),
        Architecture("qwen3", vllm=True),
        Architecture("seed_oss"),
        Architecture("smollm3"),
        Architecture("stablelm"),
        Architecture("starcoder2"),
        Architecture("cohere2", "window", WINDOWS),
        Architecture("gemma2", "window", WINDOWS | {"query_pre_attn_scalar": 32}),
        Architecture("gemma3_text", "window", WINDOWS | {"query_pre_attn_scalar": 32}, vllm=True),
        Architecture("mistral", "window", WINDOWS, vllm=True),
        Architecture("olmo3", "window", WINDOWS),
        Architecture("deepseek_v2", "experts", LATENT | ROUTED),
        Architecture("deepseek_v3", "experts", LATENT | ROUTED),
        Architecture("dots1", "experts", ROUTED),
        Architecture(
            "ernie4_5_moe",
            "experts",
            {
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_intermediate_size": 32,
                "moe_layer_start_index": 1,
                "moe_num_shared_experts": 1,
            },
        ),
        Architecture("flex_olmo", "experts", EXPERTS),
        Architecture("glm4_moe", "experts", ROUTED),
        Architecture("gpt_oss", "experts", LOCAL | WINDOWS, vllm=True),
        Architecture("granitemoe", "experts", LOCAL),
        Architecture("granitemoeshared", "experts", LOCAL | {"shared_intermediate_size": 32}),
        Architecture("hunyuan_v1_moe", "experts", {"num_experts": 4, "moe_topk": 2}),
        Architecture("jetmoe", "experts", LOCAL),
        Architecture("llama4_text", "experts", LOCAL | {"intermediate_size_mlp": 96}),
        Architecture("minimax_m2", "experts", LOCAL),
        Architecture("mixtral", "experts", LOCAL, vllm=True),
        Architecture("olmoe", "experts", EXPERTS, vllm=True),
        Architecture("phimoe", "experts", LOCAL),
        Architecture("qwen2_moe", "experts", EXPERTS | {"shared_expert_intermediate_size": 32}, vllm=True),
        Architecture("qwen3_moe", "experts", EXPERTS, vllm=True),
        Architecture(
            "falcon_h1", "hybrid", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
        ),
        Architecture("lfm2", "hybrid", {"layer_types": ["conv", "full_attention"]}),
        Architecture(
            "lfm2_moe", "hybrid", EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
        ),
        Architecture("minimax", "hybrid", LOCAL),
        Architecture(
            "qwen3_next",
            "hybrid",
            EXPERTS | {"shared_expert_intermediate_size": 32, "layer_types": ["linear_attention", "full_attention"]},
        ),
        Architecture("qwen3_5_text", "hybrid", {"layer_types": ["linear_attention", "full_attention"]}),
    )
}
