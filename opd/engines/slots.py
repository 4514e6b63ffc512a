"""The embedded engine's cache: each conversation's keys and values in a slot of its own, and who sees which of them.

All columns of a slot are kept, also those that a window has left behind: what a layer sees is its mask's to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from opd.models.layers import CHUNK, FULL, WINDOW, Reach

GROW = 64
"""Columns and slots are added in steps of this, so that the cache is rarely copied."""


@dataclass(slots=True)
class View:
    """The part of the cache that the running forward pass reads and writes; all layers share it."""

    slots: Tensor
    """[b] long: the slot of each row."""
    columns: Tensor
    """[b, q] long: the columns of each row's new keys."""
    span: int
    """The number of columns that queries may see."""
    room: tuple[int, int]
    """The slots and columns that the cache must have for the new keys; known without asking a device."""


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, [slots, heads, columns, dim], read and written through the view."""

    is_sliding = False

    def __init__(self, view: View) -> None:
        super().__init__()
        self.view = view

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = self._empty(key_states)
        self.values = self._empty(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._write(self.keys, key_states)
        self.values = self._write(self.values, value_states)
        return self._read(self.keys), self._read(self.values)

    def _empty(self, like: Tensor, slots: int = 0, columns: int = 0) -> Tensor:
        return like.new_zeros(slots, like.shape[1], columns, like.shape[3])

    def _write(self, store: Tensor, new: Tensor) -> Tensor:
        slots, columns = self.view.room
        if slots > store.shape[0] or columns > store.shape[2]:
            wider = self._empty(store, _round_up(max(slots, store.shape[0])), _round_up(max(columns, store.shape[2])))
            wider[: store.shape[0], :, : store.shape[2]] = store
            store = wider
        store[self.view.slots[:, None], :, self.view.columns] = new.transpose(1, 2)
        return store

    def _read(self, store: Tensor) -> Tensor:
        return store[:, :, : self.view.span].index_select(0, self.view.slots)

    def get_seq_length(self) -> int:
        return self.view.span

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.view.span, 0

    def get_max_length(self) -> int:
        return -1


def _round_up(size: int) -> int:
    return -(-size // GROW) * GROW


def masks(view: View, reach: Reach, bias: torch.dtype | None) -> Tensor | dict[str, Tensor]:
    """Return who sees whom in the view, [b, 1, q, span]: one mask, or one for each kind of layer where they differ.

    Masks are boolean (True: it is seen), or with `bias` of that type and added to the scores.
    """
    # A padded query must see something: of nothing some kernels make nan, which would stay in the cache as a key. It
    # may lie far behind the row's end, and sees what the last column of all would see.
    queries = view.columns.clamp(max=view.span - 1)[:, :, None]
    keys = torch.arange(view.span, device=queries.device)
    made = {kind: _as_bias(_seen(kind, queries, keys, reach)[:, None], bias) for kind in reach.kinds}
    return made if len(made) > 1 else made[reach.kinds[0]]


def _seen(kind: str, queries: Tensor, keys: Tensor, reach: Reach) -> Tensor:
    """True where a query in a column, [b, q, 1], sees the key in another, [span], in layers of this kind."""
    seen = keys <= queries
    if kind == WINDOW:
        return seen & (keys > queries - reach.window)
    if kind == CHUNK:
        return seen & (keys // reach.chunk == queries // reach.chunk)
    assert kind == FULL, kind
    return seen


def _as_bias(seen: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
