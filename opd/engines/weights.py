"""The student's weights under a checkpoint's names, a module at a time, for an engine that keeps its own copy.

Adapters are merged on the way out, into a fresh tensor: the model that trains is never touched, so that nothing
is merged twice and nothing drifts. Sharded parameters are gathered a module at a time through `gather`, never all
at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from opd.errors import ModelError
from opd.models.causal import CausalModel

Named = tuple[str, Tensor]
Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]
"""Makes sharded parameters whole inside the context; a collective call, the same on every rank."""


class ModelWeights:
    """Iterates over a model's weights as they are now; each `iter` is a fresh pass, in the same order.

    With `gather` it yields copies, because a gathered parameter is whole only until the next one.
    """

    def __init__(self, model: CausalModel, *, gather: Gather | None = None) -> None:
        self.collective = gather is not None
        self._model = model.model
        self._gather = gather

    @torch.no_grad()
    def __iter__(self) -> Iterator[Named]:
        seen: set[int] = set()  # a tied head is the embedding once more
        for name, module in _weight_modules(self._model):
            parameters = [p for p in module.parameters(recurse=isinstance(module, BaseTunerLayer)) if id(p) not in seen]
            seen.update(map(id, parameters))
            if self._gather is None:
                yield from _weights(name, module, parameters)
            else:
                with self._gather(parameters):
                    copies = [(full, t.clone()) for full, t in _weights(name, module, parameters)]
                yield from copies


def _weight_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules that own weights, an adapted layer as one, under the names of the model without adapters."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapted: str | None = None
    for name, module in base.named_modules():
        if adapted is not None and name.startswith(adapted):
            continue
        adapted = f"{name}." if isinstance(module, BaseTunerLayer) else None
        yield name, module


def _weights(name: str, module: nn.Module, parameters: list[nn.Parameter]) -> Iterator[Named]:
    if isinstance(module, BaseTunerLayer):
        yield from _merged_weights(name, module)
        return
    whole = {id(p) for p in parameters}
    for own, parameter in module.named_parameters(recurse=False):
        if id(parameter) in whole:
            yield _full_name(name, own), parameter.detach()
    for own, buffer in module.named_buffers(recurse=False):
        if own not in module._non_persistent_buffers_set:
            yield _full_name(name, own), buffer


def _merged_weights(name: str, layer: Any) -> Iterator[Named]:
    """Yield an adapted layer's weight, its active adapters added in float32, and its bias."""
    base = layer.get_base_layer()
    weight = base.weight
    if not layer.merged and not layer.disable_adapters:
        if not hasattr(layer, "get_delta_weight"):
            raise ModelError(f"the adapter of {name} ({type(layer).__name__}) cannot be merged for another engine")
        deltas = [layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters]
        weight = (weight.float() + sum(deltas)).to(weight.dtype)
    yield _full_name(name, "weight"), weight.detach()
    if getattr(base, "bias", None) is not None:
        yield _full_name(name, "bias"), base.bias.detach()


def _full_name(name: str, own: str) -> str:
    return f"{name}.{own}" if name else own


def in_chunks(weights: Iterable[Named], limit: int) -> Iterator[list[Named]]:
    """Group consecutive weights, at most `limit` bytes together unless a single one is larger."""
    chunk: list[Named] = []
    size = 0
    for name, tensor in weights:
        if chunk and size + tensor.nbytes > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, tensor))
        size += tensor.nbytes
    if chunk:
        yield chunk
