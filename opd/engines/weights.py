"""The student's weights under a checkpoint's names, a module at a time, for an engine that keeps its own copy.

What transformers renames, splits and fuses on loading is sent as a checkpoint holds it (`opd.models.names`). Adapters
are merged on the way out, into a fresh tensor: the model that trains is never touched, so that nothing is merged twice
and nothing drifts. Sharded parameters are gathered a module at a time through `gather`, never all at once; modules
whose weights are one tensor of the checkpoint come together.
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
from opd.models.names import CheckpointNames

Named = tuple[str, Tensor]
Modules = list[tuple[str, nn.Module]]
"""Modules under their names in the model without adapters; an adapted layer is one, with its adapters."""
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
        model: Any = self._model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        modules = list(_weight_modules(base))
        saved = _saved_names(base, modules)
        names = CheckpointNames(base, [name for of in saved.values() for name in of])
        for unit in _units(modules, saved, names):
            if self._gather is None:
                yield from names.stored(_weights(unit, saved))
            else:
                with self._gather([p for _, module in unit for p in _parameters(module)]):
                    copies = [(name, tensor.clone()) for name, tensor in names.stored(_weights(unit, saved))]
                yield from copies


def _weight_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    for own, child in _plain(module).named_children():
        yield from _weight_modules(child, _full_name(name, own))


def _plain(module: Any) -> nn.Module:
    """Return a module without the adapters around it."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module  # type: ignore[no-any-return]


def _saved_names(base: Any, modules: Modules) -> dict[str, list[str]]:
    """Return the full names of the weights that each module has to send, by its name: those that are saved.

    Of weights that are one (a tied head is the embedding once more) one is sent, under the name that is saved.
    """
    kept: dict[str, str] = {}  # the owner, by the weight's name
    first: dict[int, str] = {}
    left_out = set(getattr(base, "_keys_to_ignore_on_save", None) or ())
    tied = base.get_expanded_tied_weights_keys(all_submodels=True)
    for name, module in modules:
        for full, tensor in _own(name, module):
            other = first.setdefault(id(tensor), full)
            if other != full and other in tied and full not in tied:
                del kept[other]
                first[id(tensor)] = full
            elif other != full:
                continue
            kept[full] = name
    found: dict[str, list[str]] = {name: [] for name, _ in modules}
    for full, name in kept.items():
        if full not in left_out:
            found[name].append(full)
    return found


def _units(modules: Modules, saved: dict[str, list[str]], names: CheckpointNames) -> list[Modules]:
    """Group modules whose weights are one tensor of the checkpoint; most stand alone."""
    units: dict[int, Modules] = {}  # by the unit's identity
    at: dict[str, Modules] = {}  # by a tensor that it becomes
    for name, module in modules:
        targets = [names.target(full) for full in saved[name]]
        if not targets:
            continue
        unit: Modules = []
        for other in [at[target] for target in targets if target in at]:
            if units.pop(id(other), None) is not None:
                unit += other
        unit.append((name, module))
        units[id(unit)] = unit
        at |= {target: unit for target, of in at.items() if id(of) not in units} | dict.fromkeys(targets, unit)
    return list(units.values())


def _weights(unit: Modules, saved: dict[str, list[str]]) -> dict[str, Tensor]:
    """Return the weights that the modules of a unit have to send, by their full names, adapters merged."""
    found: dict[str, Tensor] = {}
    for name, module in unit:
        weights = dict(_own(name, module))
        if isinstance(module, BaseTunerLayer):
            weights |= _merged(name, module)
        found |= {full: weights[full].detach() for full in saved[name]}
    return found


def _own(name: str, module: nn.Module) -> Iterator[Named]:
    """Yield the parameters and the saved buffers of a module itself, without adapters, by their full names."""
    plain = _plain(module)
    for own, tensor in (*plain._parameters.items(), *plain._buffers.items()):
        if tensor is not None and own not in plain._non_persistent_buffers_set:
            yield _full_name(name, own), tensor


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return what must be whole for a module's weights: its own parameters, and those of its adapters."""
    return list(module.parameters(recurse=isinstance(module, BaseTunerLayer)))


def _merged(name: str, layer: Any) -> Iterator[Named]:
    """Yield the weights of an adapted layer that have adapters, these added in float32.

    peft wraps a layer once for each of its weights that has an adapter, as the experts of a mixture have.
    """
    base = layer.get_base_layer()
    while isinstance(layer, BaseTunerLayer):
        wrapper: Any = layer
        own = getattr(wrapper, "parameter_name", "weight")
        if not wrapper.merged and not wrapper.disable_adapters:
            if not hasattr(wrapper, "get_delta_weight"):
                raise ModelError(
                    f"the adapter of {name} ({type(wrapper).__name__}) cannot be merged for another engine"
                )
            weight = getattr(base, own)
            deltas = [wrapper.get_delta_weight(adapter).float() for adapter in wrapper.active_adapters]
            yield _full_name(name, own), (weight.float() + sum(deltas)).to(weight.dtype)
        layer = wrapper.base_layer


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
