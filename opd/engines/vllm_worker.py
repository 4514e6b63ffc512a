"""The code that runs inside vLLM: receiving weights, drawing ids on a CPU, and asking for the key.

The entry point `vllm.general_plugins` in pyproject.toml calls `register` in every process of vLLM, whoever started it.
vLLM's own weight-transfer interface calls `WeightReceiver` in every worker, where it is known as `opd_weights`. Weights
come as tensors (an engine in the trainer's process) or as safetensors in base64 (over HTTP), so that no pickle is ever
read.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_layer
from vllm.platforms import current_platform

from opd.engines.vllm_http import OTHER_MODEL, sizes

BACKEND = "opd_weights"
KEY_VARIABLE = "VLLM_API_KEY"
COPIED = ("GptOssRoutedExperts", "OAIAttention")
"""Layers of vLLM into which a model's code copies weights by itself: an update fills them before they are processed."""


def register() -> None:
    """Make the receiver known to vLLM, and mend its draws on a CPU; it may be called several times in a process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, WeightReceiver)
    if current_platform.is_cpu():
        _draw_only_what_is_kept()
        _pack_experts_again()


def _draw_only_what_is_kept() -> None:
    """Let a request whose prompt is read in pieces draw nothing before the last one, as if it were read at once.

    vLLM draws an id after each piece, throws it away, and turns the request's generator back. A generator on a CPU
    cannot be turned back: the engine ends with "CPU Generator does not use offset". Here the generators of such
    requests are put aside meanwhile, and the ids to throw away come from the generator of the process.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    if "sample_tokens" in vars(CPUModelRunner):
        return
    sample = CPUModelRunner.sample_tokens

    def sample_tokens(runner: Any, *args: Any, **options: Any) -> Any:
        generators, thrown_away = runner.input_batch.generators, runner.discard_request_mask.np
        aside = {row: generators.pop(row) for row in list(generators) if thrown_away[row]}
        try:
            return sample(runner, *args, **options)
        finally:
            generators.update(aside)

    CPUModelRunner.sample_tokens = sample_tokens


def _pack_experts_again() -> None:
    """Let an update of a mixture's experts pack them for their kernel, as the first weights are packed.

    On a CPU the kernel reads packed weights. vLLM packs them when it makes the kernel, and an update makes none: the
    kernel would read plain weights as packed ones, whole nats off and in silence.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    if getattr(UnquantizedFusedMoEMethod, "_opd_packs_again", False):
        return
    set_up = UnquantizedFusedMoEMethod._setup_kernel

    def set_up_anew(method: Any, *args: Any, **options: Any) -> Any:
        method.moe_kernel = None
        return set_up(method, *args, **options)

    UnquantizedFusedMoEMethod._setup_kernel = set_up_anew
    UnquantizedFusedMoEMethod._opd_packs_again = True


@dataclass
class Model(WeightTransferInitInfo):  # type: ignore[misc]
    """The sizes of the model whose weights will come: `opd.engines.vllm_http.sizes`."""

    sizes: dict[str, int] = field(default_factory=dict)


@dataclass
class Chunk(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Some weights, under the names of a checkpoint: as tensors, or as a safetensors file in base64."""

    tensors: list[tuple[str, Tensor]] = field(default_factory=list)
    safetensors: str = ""
    last: bool = False
    """True: no chunk comes after it, so that every weight must have come."""

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        if not self.safetensors:
            return self.tensors
        try:
            return list(load_safetensors(base64.b64decode(self.safetensors, validate=True)).items())
        except (SafetensorError, binascii.Error, KeyError) as error:
            raise ValueError(f"the weights that arrived are damaged: {error}") from error


class WeightReceiver(WeightTransferEngine[Model, Chunk]):  # type: ignore[misc]
    """Loads weights layer by layer through vLLM's own reloading, and sees that none was left out."""

    init_info_cls = Model
    update_info_cls = Chunk

    def init_transfer_engine(self, init_info: Model) -> None:
        """Check that the weights will fit. Raises ValueError where they will not. Nothing is connected here."""
        own, given = sizes(self.model_config.hf_text_config), init_info.sizes
        both = sorted(own.keys() & given)
        differ = [f"{name} is {own[name]} there, {given[name]} here" for name in both if own[name] != given[name]]
        if differ:
            raise ValueError(f"{OTHER_MODEL}: {', '.join(differ)}")

    def start_weight_update(self) -> None:
        """Begin an update; discard first what an update that broke off has left."""
        finalize_layerwise_reload(self.model, self.model_config)
        # By name, before the layers' weights give way to their loaders; a packed weight keeps its name.
        self._expected = {name for name, _ in self.model.named_parameters()}
        self._loaded: set[str] = set()
        initialize_layerwise_reload(self.model)
        for layer in _copied_layers(self.model):
            materialize_layer(layer, get_layerwise_info(layer))

    def receive_weights(self, update_info: Chunk) -> None:
        """Load a chunk. Raises ValueError after the last one, naming weights that never came."""
        self._loaded |= self.model.load_weights(update_info.named_tensors())
        missing = self._expected - self._loaded
        if update_info.last and missing and self.model_config.quantization is None:
            raise ValueError(f"{len(missing)} weights of the model were not sent, such as {sorted(missing)[:3]}")
        if update_info.last and self.model_config.quantization is None:
            self._check_nothing_lost()

    def _check_nothing_lost(self) -> None:
        """Raise ValueError where the model's code has copied weights into layers that vLLM had emptied for loaders."""
        copied = {id(layer) for layer in _copied_layers(self.model)}
        lost = [
            full
            for name, layer in self.model.named_modules()
            if (info := get_layerwise_info(layer)).can_load() and id(layer) not in copied
            for own, tensor in layer.named_parameters(recurse=False)
            if tensor.is_meta and own not in {loaded for loaded, _ in info.loaded_weights}
            if (full := f"{name}.{own}") in self._loaded
        ]
        if lost:
            raise ValueError(
                f"vLLM's code of {type(self.model).__name__} takes {len(lost)} weights, such as {sorted(lost)[:3]}, in "
                "a way that its updates do not know, so that they would stay the old ones"
            )

    def finish_weight_update(self) -> None:
        """Put the new weights in place. It never fails, so that an update that broke off can be closed with it."""
        for layer in _copied_layers(self.model):
            if (info := get_layerwise_info(layer)).can_load() and not any(
                t.is_meta for t in layer._parameters.values()
            ):
                _layerwise_process(layer, info)
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_heads(self.model)

    def shutdown(self) -> None:
        """Do nothing: nothing is held between calls."""


def _copied_layers(model: Any) -> list[Any]:
    """Return the layers into which the model's code copies weights by itself, past the loaders that updates go by."""
    return [layer for layer in model.modules() if type(layer).__name__ in COPIED]


def _repack_heads(model: Any) -> None:
    """Pack the heads' weights again, on a CPU.

    A head multiplies with a packed copy of its weight there, and a tied head is never loaded by itself: its copy would
    stay the old one, in silence.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

    for module in model.modules():
        if isinstance(module, ParallelLMHead) and isinstance(module.quant_method, UnquantizedEmbeddingMethod):
            module.quant_method.process_weights_after_loading(module)


class RequireKey:
    """ASGI middleware that asks for the key on every path but /health.

    vLLM's own --api-key leaves the paths open that replace weights.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.expected = f"Bearer {os.environ[KEY_VARIABLE]}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] in ("http", "websocket") and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self.expected):
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b"a key is needed"})
                return
        await self.app(scope, receive, send)
