"""Addresses tasks by number, and derives seeds: the same run asks for the same tasks and the same draws anywhere.

What a task is stands in `opd.types`. Nothing here imports torch.
"""

from __future__ import annotations

from hashlib import sha256

from opd.types import Task

# Seeds of the splits lie in ranges of their own, so that no evaluation task is ever trained on by seed.
_SPLIT_BASE = {"train": 0, "eval": 1 << 29, "warm": 1 << 30}
_SPLIT_SIZE = 1 << 29


def derive_seed(*parts: object) -> int:
    """Make a 63-bit seed of anything printable; the same parts give the same seed on every machine."""
    return int.from_bytes(sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def task(index: int, *, split: str, run_seed: int = 0) -> Task:
    """Return the `index`-th task of a split. Evaluation tasks are the same for every `run_seed`."""
    offset = derive_seed("task", run_seed if split == "train" else 0, split, index) % _SPLIT_SIZE
    return Task(index=index, seed=_SPLIT_BASE[split] + offset, split=split)
