"""From samples to micro-batches: global denominators first, then sequences packed by a token budget.

Everything after the forward pass lives on the N sampled tokens of a micro-batch, one flat axis: the row
that predicts each token, its id, and its weights. Prompts are only ever fed, never gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from opd.losses import Losses
from opd.types import Sample

STREAMS = ("distill_weight", "ce_weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch. N counts the sampled tokens of its B sequences, in order.

    Rows index the flattened [B * T] hidden states. Sequences are padded on the right, and a row never
    lies on padding, so no attention mask is needed.
    """

    input_ids: Tensor
    """[B, T] long."""
    rows: Tensor
    """[N] long: the student's rows."""
    targets: Tensor
    """[N] long: the sampled ids."""
    sampler_logprobs: Tensor
    """[N] float32, natural log, at the sampling temperature."""
    distill_weight: Tensor
    """[N] float32, divided by the step's denominator."""
    ce_weight: Tensor
    """[N] float32, divided by the step's denominator."""
    lengths: list[int]
    """[B] sampled tokens of each sequence; they add up to N."""
    teacher_ids: Tensor | None
    """[B, T'] long, or None where nothing is distilled."""
    teacher_rows: Tensor | None
    """[N] long: the teacher's rows."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        tensors: dict[str, Any] = {
            f.name: t.to(device) for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)


def normalise(samples: Sequence[Sample], losses: Losses, all_sum: Callable[[list[float]], list[float]]) -> list[Sample]:
    """Divide every weight by its component's denominator, taken over all ranks through `all_sum`.

    After this, summing weight times loss over any micro-batches, on any ranks, gives the step's loss.
    """
    per_sequence = losses.reduction == "sequence_mean"
    counts = [[sum(w != 0 for w in getattr(s, name)) for s in samples] for name in STREAMS]
    local = [float(sum(n > 0 for n in c) if per_sequence else sum(c)) for c in counts]
    totals = all_sum(local)
    if losses.shared:
        totals = [sum(totals)] * len(totals)
    coefs = [component.coef if component else 0.0 for component in (losses.distill, losses.ce)]
    divided = []
    for number, sample in enumerate(samples):
        streams: dict[str, Any] = {}
        for name, count, total, coef in zip(STREAMS, counts, totals, coefs, strict=True):
            scale = coef / (total * (count[number] if per_sequence else 1)) if count[number] else 0.0
            streams[name] = [w * scale for w in getattr(sample, name)]
        divided.append(replace(sample, **streams))
    return divided


def microbatches(samples: Sequence[Sample], token_budget: int) -> list[list[int]]:
    """Indices of the samples, longest first, cut so that padded student and teacher tokens fit the budget.

    A sample that is longer than the budget by itself makes a micro-batch of its own.
    """

    sizes = [(len(s.token_ids), len(s.teacher_view.token_ids) if s.teacher_view else 0) for s in samples]
    batches: list[list[int]] = []
    widest = (0, 0)
    for index in sorted(range(len(samples)), key=lambda i: sizes[i], reverse=True):
        own, view = sizes[index]
        widest = (max(widest[0], own), max(widest[1], view))
        if not batches or (len(batches[-1]) + 1) * sum(widest) > token_budget:
            batches.append([])
            widest = (own, view)
        batches[-1].append(index)
    return batches


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Pad one micro-batch. Raises ValueError on an empty one."""
    if not samples:
        raise ValueError("a micro-batch needs at least one sample")
    views = [s.teacher_view for s in samples]
    ids = _pad([s.token_ids for s in samples], pad_id)
    teacher_ids = teacher_rows = None
    if any(views):
        if not all(views):
            raise ValueError("a micro-batch mixes samples with and without a teacher's view")
        teacher_ids = _pad([v.token_ids for v in views if v], pad_id)
        teacher_rows = _flat_rows([v.rows for v in views if v], teacher_ids.shape[1])

    def sampled(name: str) -> Tensor:
        picked = ([getattr(s, name)[row + 1] for row in s.rows] for s in samples)
        return torch.tensor(list(chain.from_iterable(picked)), dtype=torch.float32)

    return Batch(
        input_ids=ids,
        rows=_flat_rows([s.rows for s in samples], ids.shape[1]),
        targets=torch.tensor([t for s in samples for t in s.completion_ids], dtype=torch.long),
        sampler_logprobs=sampled("sampler_logprobs"),
        distill_weight=sampled("distill_weight"),
        ce_weight=sampled("ce_weight"),
        lengths=[sum(s.completion_mask) for s in samples],
        teacher_ids=teacher_ids,
        teacher_rows=teacher_rows,
    )


def _pad(sequences: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    width = max(map(len, sequences))
    return torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in sequences], dtype=torch.long)


def _flat_rows(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor([n * width + row for n, own in enumerate(rows) for row in own], dtype=torch.long)
