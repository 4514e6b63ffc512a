"""Parameters that this process may hold only in part: ZeRO-3 leaves every rank a slice of each.

A plain parameter is held whole, so everything here also works without DeepSpeed. A function that gathers talks to
the other ranks: all of them must call it, in the same order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

GATHER_BYTES = 512 * 2**20
"""Parameters are gathered together up to so many bytes; a larger one by itself."""

M = TypeVar("M", bound=nn.Module)


def is_sharded(parameter: Tensor) -> bool:
    """True if other ranks hold the rest of the parameter (`ds_id` is ZeRO-3's mark)."""
    return hasattr(parameter, "ds_id")


def held_part(parameter: Tensor) -> Tensor:
    """The part that this rank holds, detached: the parameter itself, or its slice [numel / ranks, padded]."""
    return parameter.ds_tensor.data if is_sharded(parameter) else parameter.data  # type: ignore[attr-defined]


def part_of(parameter: Tensor, full: Tensor, rank: int) -> Tensor:
    """The part that `rank` holds of a weight [any shape] in the parameter's place; padding is 0."""
    if not is_sharded(parameter):
        return full.reshape(parameter.shape)
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    own = full.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(own, (0, size - own.numel()))


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter."""
    return parameter.ds_shape if is_sharded(parameter) else parameter.shape  # type: ignore[attr-defined]


@contextmanager
def whole(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Make the parameters whole on every rank inside the context; for reading."""
    sharded = [p for p in parameters if is_sharded(p)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def whole_in_turn(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter by its name, whole and detached, valid until the next is asked for.

    At no time are more than `GATHER_BYTES`, or the largest parameter, gathered. A tied weight comes once. The
    iteration must be run to its end on every rank.
    """
    for batch in _batches(model):
        with whole(parameter for _, parameter in batch):
            yield from ((name, parameter.detach()) for name, parameter in batch)


def _batches(model: nn.Module) -> Iterator[list[tuple[str, nn.Parameter]]]:
    batch: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in model.named_parameters():
        own = full_shape(parameter).numel() * parameter.element_size()
        if batch and size + own > GATHER_BYTES:
            yield batch
            batch, size = [], 0
        batch.append((name, parameter))
        size += own
    if batch:
        yield batch


def largest_gather(sizes: Iterable[int]) -> int:
    """The most bytes that `whole_in_turn` holds beside the shards, given the parameters' sizes in bytes."""
    listed = list(sizes)
    return max(min(GATHER_BYTES, sum(listed)), max(listed, default=0))


@contextmanager
def swap_weights(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Put the held parts `weights` in place of the parameters' own, in their type, inside the context.

    No data moves: pointers do. Nothing may be gathered when it begins or ends.
    """
    stores = {name: p.ds_tensor if is_sharded(p) else p for name, p in parameters.items()}  # type: ignore[attr-defined]
    own = {name: stores[name].data for name in weights}
    try:
        for name, weight in weights.items():
            stores[name].data = weight.to(own[name].dtype)
        yield
    finally:
        for name, data in own.items():
            stores[name].data = data


def blank_copy(model: M, device: torch.device | str) -> M:
    """Copy a model to `device` without its weights: with memory for them, on `meta` not even that.

    The model must be held whole. Buffers are copied; nothing in the copy requires a gradient.
    """
    memo = {id(p): nn.Parameter(torch.empty_like(p, device=device), requires_grad=False) for p in model.parameters()}
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and torch.device(device).type != "meta":
                module._buffers[name] = buffer.to(device)
    return twin


@torch.no_grad()
def fill(twin: nn.Module, model: nn.Module) -> None:
    """Copy all weights of `model`, sharded or not, into its `blank_copy`."""
    targets = dict(twin.named_parameters())
    for name, weight in whole_in_turn(model):
        targets[name].copy_(weight)


@torch.no_grad()
def collected(blank: M, model: nn.Module, *, keep: bool) -> M:
    """Collect the whole model in the CPU's memory, in a `blank_copy`; ranks that do not `keep` it only take part."""
    if not keep:
        for _ in whole_in_turn(model):
            pass
        return blank
    twin = blank_copy(blank, "cpu")
    fill(twin, model)
    return twin
