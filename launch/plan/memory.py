"""How much memory a run takes, estimated from the files of a model without loading it.

The parts that follow from counting (weights, gradients, AdamW, teacher, cache) are exact up to what torch
adds; activations are a rule of thumb.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.episodes.config import RolloutConfig
from opd.launch.checks.models import is_hub_id
from opd.models.config import LoraConfig, ModelConfig
from opd.teachers.config import TeacherConfig

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
TILE_BYTES = {"cpu": 128 * 2**20, "gpu": 512 * 2**20}
"""As in `opd.maths.head`, which imports torch; a test holds the two together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The sizes of a model that an estimate needs."""

    shapes: Mapping[str, tuple[int, ...]]
    """The shape of every weight, by name; a tied head is not counted twice."""
    layers: int
    hidden: int
    intermediate: int
    """Width of the MLP."""
    key_value_width: int
    """Key heads times their width: what one token adds to one half of a layer's cache."""
    vocabulary: int

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def query_width(self) -> int:
        """The query heads times their width."""
        rows = (shape[0] for name, shape in self.shapes.items() if name.endswith("q_proj.weight"))
        return next(rows, self.hidden)

    def adapters(self, lora: LoraConfig) -> int:
        """Count the parameters that LoRA adds: two low-rank factors for each linear layer that is targeted."""
        return sum(lora.r * sum(shape) for name, shape in self.shapes.items() if _is_targeted(name, shape, lora))


@dataclass(frozen=True, slots=True)
class Part:
    """One line of an estimate."""

    name: str
    bytes: int
    note: str = ""


def memory_estimate(
    size: ModelSize,
    *,
    model: ModelConfig,
    rollout: RolloutConfig,
    teacher: TeacherConfig | None,
    tokens_per_microbatch: int,
    episodes: int,
    gpu: bool,
) -> list[Part]:
    """Return the parts of a run's peak on one device, in bytes; their sum is an upper estimate.

    `episodes` are played at once (`opd.launch.plan.counts.episodes_at_once`).
    `model.dtype` auto is float32 on a CPU and bfloat16 on a GPU. Adapters are trained in float32.
    """
    width = BYTES[model.dtype if model.dtype != "auto" else "bfloat16" if gpu else "float32"]
    trained = size.parameters if model.lora is None else size.adapters(model.lora)
    trained_width = width if model.lora is None else 4
    copies = {"live": 0, "frozen": trained_width, "synced": trained_width, "trust_region": trained_width}
    copies["ema"] = max(4, trained_width)
    own = trained * copies.get(teacher.weights, 0) + external_bytes(teacher, width) if teacher else 0
    if teacher and teacher.weights == "trust_region" and not model.lora:
        own += 2 * size.vocabulary * size.hidden * width  # both heads side by side
    # The teacher's view holds the student's sequence, so the student has at most half of a micro-batch.
    tokens = tokens_per_microbatch // 2 if teacher else tokens_per_microbatch
    tile = tile_bytes(tokens, size.vocabulary, gpu=gpu)
    # Steps of 16-bit weights are taken on float32 copies of them, by float32 gradients.
    optimizer = 12 if trained_width < 4 else 2 * trained_width
    return [
        Part("weights", size.parameters * width + (trained * 4 if model.lora else 0)),
        Part("gradients", trained * max(4, trained_width)),
        Part("AdamW", optimizer * trained, "two moments for each trained parameter"),
        Part("teacher", own, teacher_in_words(teacher)),
        Part("activations", activations(size, tokens, width, model.gradient_checkpointing), "rough"),
        Part("logits", tile * (2 if teacher else 1), "a tile at a time, never all"),
        cache_of_rollouts(size, rollout, episodes, width),
    ]


def cache_of_rollouts(size: ModelSize, rollout: RolloutConfig, episodes: int, width: int) -> Part:
    """Return what so many episodes at once keep of keys and values, at `width` bytes each."""
    if rollout.engine != "transformers":
        share = "in vLLM's share" if rollout.engine == "vllm" else "another process's"
        return Part("cache of rollouts", 0, share)
    return Part(
        "cache of rollouts",
        episodes * rollout.max_length * 2 * size.layers * size.key_value_width * width,
        f"at most {episodes} episode{'' if episodes == 1 else 's'} of {rollout.max_length} tokens",
    )


def external_bytes(teacher: TeacherConfig, width: int) -> int:
    """Return the bytes of another model that teaches, at `width` bytes a weight; 0 if its size is not known."""
    size = known_size(teacher.model) if teacher.model and not teacher.servers else None
    return size.parameters * width if size else 0


def teacher_in_words(teacher: TeacherConfig | None) -> str:
    """Say in words whose weights teach."""
    if teacher is None or teacher.model is None:
        return teacher.weights if teacher else "none"
    if teacher.servers:
        return f"{teacher.model}, served by {', '.join(teacher.servers)}"
    return teacher.model if known_size(teacher.model) else f"{teacher.model}, size not known before it is loaded"


def tile_bytes(tokens: int, vocabulary: int, *, gpu: bool) -> int:
    """Return the most bytes that a tile of logits takes."""
    return min(TILE_BYTES["gpu" if gpu else "cpu"], 4 * tokens * vocabulary)


def activations(size: ModelSize, tokens: int, width: int, checkpointing: bool) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, as Llama and Qwen3 do.

    A token and layer: two norms (a float32 copy of what goes in, and two results), queries and what attention makes
    of them, keys and values, four vectors of the MLP's width; and where queries and keys have norms, these too.
    """
    heads = size.query_width + size.key_value_width
    kept = 2 * size.hidden * (4 + 2 * width) + 2 * heads * width + 4 * size.intermediate * width
    if any("q_norm" in name for name in size.shapes):
        kept += heads * (4 + width)
    layer = tokens * kept
    return layer + size.layers * tokens * size.hidden * width if checkpointing else size.layers * layer


def _is_targeted(name: str, shape: tuple[int, ...], lora: LoraConfig) -> bool:
    if len(shape) != 2 or not name.endswith(".weight"):
        return False
    module = name.removesuffix(".weight").rpartition(".")[2]
    if lora.targets == "all-linear":
        return "embed" not in module and module not in ("lm_head", "wte", "wpe")
    return module in lora.targets


def known_size(name: str) -> ModelSize | None:
    """Return the size of a model that is on this disk, or of SmolLM2; None if it is not known without a download."""
    if name == "smollm2":
        return _size_of_smollm2()
    folder = _folder_of_model(name)
    return size_of_folder(folder) if folder is not None else None


def size_of_folder(folder: Path) -> ModelSize | None:
    """Read `config.json` and the headers of the safetensors files; return None if they do not say enough."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        shapes = {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in _read_shapes(path).items()}
        if not shapes:
            return None
        return ModelSize(
            shapes=shapes,
            layers=config["num_hidden_layers"],
            hidden=hidden,
            intermediate=config.get("intermediate_size") or 4 * hidden,
            key_value_width=(config.get("num_key_value_heads") or heads) * (config.get("head_dim") or hidden // heads),
            vocabulary=config["vocab_size"],
        )
    except (OSError, ValueError, KeyError):
        return None


def has_gpu() -> bool:
    """True: torch will probably find a GPU. False: it will not. torch is not asked: importing it takes seconds."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return shutil.which("nvidia-smi") is not None


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes in a safetensors file: eight bytes hold the length of a JSON header, which follows."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _folder_of_model(name: str) -> Path | None:
    """Return the folder of a local model, or of a hub model in the cache; None if there is none."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.endswith(".gguf") or not is_hub_id(name):
        return None
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(name, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def _size_of_smollm2() -> ModelSize:
    """Return the size of SmolLM2-135M: 30 layers of width 576, 9 query and 3 key heads of 64, a tied head."""
    layer = {
        "self_attn.q_proj.weight": (576, 576),
        "self_attn.k_proj.weight": (192, 576),
        "self_attn.v_proj.weight": (192, 576),
        "self_attn.o_proj.weight": (576, 576),
        "mlp.gate_proj.weight": (1536, 576),
        "mlp.up_proj.weight": (1536, 576),
        "mlp.down_proj.weight": (576, 1536),
        "input_layernorm.weight": (576,),
        "post_attention_layernorm.weight": (576,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (49152, 576), "model.norm.weight": (576,)}
    shapes |= {f"model.layers.{n}.{name}": shape for n in range(30) for name, shape in layer.items()}
    return ModelSize(shapes=shapes, layers=30, hidden=576, intermediate=1536, key_value_width=192, vocabulary=49152)
