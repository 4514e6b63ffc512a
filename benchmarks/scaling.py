"""Prints the tables of docs/scaling.md: what a rank holds and sends when models of four sizes train on 8 to 512 GPUs.

Nothing is measured here: the numbers are counted by `opd.launch.plan.scaling`, which `opd train --dry-run` also uses,
and which tests hold against real allocations at small sizes.
"""

from __future__ import annotations

from opd.episodes.config import RolloutConfig
from opd.launch.plan.memory import ModelSize
from opd.launch.plan.scaling import Sharding, Work, device_memory, traffic
from opd.models.config import ModelConfig
from opd.teachers.config import TeacherConfig

GIB = 2**30
TOKENS = 16384
"""Padded tokens in a micro-batch, student and teacher."""
EPISODES, LENGTH = 512, 8192
GPUS = (8, 64, 512)


def decoder(
    *, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocabulary: int, tied: bool, norms: bool
) -> ModelSize:
    """Describe a Llama-like model with heads of 128; `norms` are Qwen3's on queries and keys."""
    layer = {
        "self_attn.q_proj.weight": (heads * 128, hidden),
        "self_attn.k_proj.weight": (kv_heads * 128, hidden),
        "self_attn.v_proj.weight": (kv_heads * 128, hidden),
        "self_attn.o_proj.weight": (hidden, heads * 128),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    if norms:
        layer |= {"self_attn.q_norm.weight": (128,), "self_attn.k_norm.weight": (128,)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    shapes["model.norm.weight"] = (hidden,)
    shapes |= {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}
    return ModelSize(
        shapes=shapes,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        key_value_width=kv_heads * 128,
        vocabulary=vocabulary,
    )


MODELS = {
    "1.7B": decoder(
        layers=28, hidden=2048, intermediate=6144, heads=16, kv_heads=8, vocabulary=151936, tied=True, norms=True
    ),
    "8B": decoder(
        layers=36, hidden=4096, intermediate=12288, heads=32, kv_heads=8, vocabulary=151936, tied=False, norms=True
    ),
    "32B": decoder(
        layers=64, hidden=5120, intermediate=25600, heads=64, kv_heads=8, vocabulary=151936, tied=False, norms=True
    ),
    "70B": decoder(
        layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, vocabulary=128256, tied=False, norms=False
    ),
}
"""Qwen3-1.7B, Qwen3-8B, Qwen3-32B and Llama-3.1-70B."""


def work(ranks: int, *, embedded: bool) -> Work:
    """Describe a rank's share of a step of OPSD with a frozen teacher, in bfloat16, with recomputed activations."""
    return Work(
        model=ModelConfig(name="x", dtype="bfloat16", gradient_checkpointing=True),
        rollout=RolloutConfig(concurrency=64, max_length=LENGTH),
        teacher=TeacherConfig(weights="frozen", rate=None),
        tokens_per_microbatch=TOKENS,
        episodes=min(64, -(-EPISODES // ranks)),
        embedded=embedded,
        gpu=True,
    )


def rows(*, embedded: bool) -> list[list[str]]:
    """Count a row for each model and number of GPUs, ZeRO-3: parts of the memory in GiB, their sum, traffic in GiB."""
    found = []
    for name, size in MODELS.items():
        for ranks in GPUS:
            task, sharding = work(ranks, embedded=embedded), Sharding(stage=3, ranks=ranks)
            memory = device_memory(size, task, sharding)
            microbatches = max(1, -(-2 * EPISODES * LENGTH // (ranks * TOKENS)))
            sent = traffic(size, task, sharding, microbatches=microbatches)
            cells = [f"{part.bytes / GIB:.1f}" for part in memory]
            total = sum(part.bytes for part in memory) / GIB
            found.append([name, str(ranks), *cells, f"{total:.0f}", str(microbatches), f"{_total(sent):.0f}"])
    return found


def _total(parts: list) -> float:
    return sum(part.bytes for part in parts) / GIB


def table(*, embedded: bool) -> str:
    """Write the rows in Markdown."""
    names = [part.name for part in device_memory(MODELS["8B"], work(8, embedded=embedded), Sharding(stage=3, ranks=8))]
    head = ["model", "GPUs", *names, "**sum**", "micro-batches", "sent in a step"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows(embedded=embedded)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print("Rollouts by vLLM servers:\n")
    print(table(embedded=False))
    print("\nRollouts by the embedded engine:\n")
    print(table(embedded=True))
