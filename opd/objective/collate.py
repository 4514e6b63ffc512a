"""From samples to micro-batches: global denominators first, then sequences packed by a token budget.

Everything after the forward pass lives on the N sampled tokens of a micro-batch, one flat axis: the row
that predicts each token, its id, and its weights. Prompts are only ever fed, never gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opd.errors import DataError
from opd.losses import Losses
from opd.maths.head import Head
from opd.types import WEIGHTS, Sample, TeacherView


class Taught(NamedTuple):
    """The teacher's side of an exact divergence: hidden states [N, H] and the head that reads them."""

    hidden: Tensor
    head: Head


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
    policy_weight: Tensor
    """[N] float32, divided by the step's denominator; so are the other weights."""
    distill_weight: Tensor
    """[N] float32."""
    ce_weight: Tensor
    """[N] float32."""
    advantage: Tensor
    """[N] float32."""
    lengths: list[int]
    """[B] sampled tokens of each sequence; they add up to N."""
    teacher_ids: Tensor | None
    """[B', T'] long: the views of those sequences that have one; None where none has."""
    teacher_rows: Tensor | None
    """[M] long: the teacher's rows, of the sampled tokens that it sees."""
    taught: Tensor | None
    """[M] long: the indices of these among the N tokens; None where they are all."""
    old_logprobs: Tensor | None = None
    """[N] float32, or None where the student has not changed since it played the rollouts."""
    teacher_logprobs: Tensor | None = None
    """[N] float32, where scores were stored; None where the teacher reads the batch, or was not asked."""
    teacher_top_ids: Tensor | None = None
    """[N, k] long, where the teacher's likeliest ids were stored; None elsewhere."""
    teacher_top_logprobs: Tensor | None = None
    """[N, k] float32 of these."""

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to another device."""
        tensors: dict[str, Any] = {
            f.name: t.to(device) for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)
        }
        return replace(self, **tensors)


def check_fed(samples: Sequence[Sample], losses: Losses, *, of: str) -> None:
    """Raise DataError if samples `of` a method carry weights for a component that its losses lack, or for a token to
    distil that no teacher sees. Such weights must be found before ranks add theirs up (`normalise`)."""
    components = {"policy_weight": losses.policy, "distill_weight": losses.distill, "ce_weight": losses.ce}
    for name, component in components.items():
        if component is None and any(any(getattr(sample, name)) for sample in samples):
            have = ", ".join(other for other, one in components.items() if one is not None) or "none"
            raise DataError(f"{of} makes samples with {name}, but its losses have no such component: they read {have}")
    for sample in samples:
        if sample.teacher_view is None and sample.teacher_logprobs is None and any(sample.distill_weight):
            raise DataError(
                f"{of} makes samples whose distill_weight is non-zero, but no teacher sees the sample, or has scored it"
            )


def normalise(samples: Sequence[Sample], losses: Losses, all_sum: Callable[[list[float]], list[float]]) -> list[Sample]:
    """Divide every weight by its component's denominator, taken over all ranks through `all_sum`.

    After this, summing weight times loss over any micro-batches, on any ranks, gives the step's loss.
    `check_fed` says which weights there may be.
    """
    by_sequence = losses.reduction != "token_mean"
    counts = [[sum(w != 0 for w in getattr(s, name)) for s in samples] for name in WEIGHTS]
    local = [float(sum(n > 0 for n in c) if by_sequence else sum(c)) for c in counts]
    totals = all_sum(local)
    if losses.shared:
        totals = [sum(totals)] * len(totals)
    coefs = [part.coef if part else 0.0 for part in (losses.policy, losses.distill, losses.ce)]
    divided = []
    for number, sample in enumerate(samples):
        streams: dict[str, Any] = {}
        for name, count, total, coef in zip(WEIGHTS, counts, totals, coefs, strict=True):
            within = {"token_mean": 1, "sequence_mean": count[number], "sequence_sum": losses.length}[losses.reduction]
            scale = coef / (total * within) if count[number] else 0.0
            streams[name] = [w * scale for w in getattr(sample, name)]
        divided.append(replace(sample, **streams))
    return divided


def microbatches(samples: Sequence[Sample], token_budget: int) -> list[list[int]]:
    """Group samples, longest first, so that padded student and teacher tokens fit the budget; lists of their indices.

    A sample that is longer than the budget makes a micro-batch of its own.
    """

    sizes = [(len(s.token_ids), len(s.teacher_view.token_ids) if s.teacher_view else 0) for s in samples]
    batches: list[list[int]] = []
    for index in sorted(range(len(samples)), key=lambda i: sizes[i], reverse=True):
        if not batches or _padded([sizes[i] for i in [*batches[-1], index]]) > token_budget:
            batches.append([])
        batches[-1].append(index)
    return batches


def _padded(sizes: Sequence[tuple[int, int]]) -> int:
    """Count the tokens fed, padding included, for these (student, teacher or 0) lengths."""
    widest, widest_view = max(own for own, _ in sizes), max(view for _, view in sizes)
    return len(sizes) * widest + sum(view > 0 for _, view in sizes) * widest_view


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Pad samples into one micro-batch. Raises ValueError for none, or for samples that need different columns."""
    if not samples:
        raise ValueError("a micro-batch needs at least one sample")
    ids = _pad([s.token_ids for s in samples], pad_id)
    views = [s.teacher_view for s in samples if s.teacher_view is not None]

    def sampled(name: str) -> Tensor:
        picked = ([getattr(s, name)[row + 1] for row in s.rows] for s in samples)
        return torch.tensor(list(chain.from_iterable(picked)), dtype=torch.float32)

    def sampled_or_none(name: str) -> Tensor | None:
        missing = [getattr(s, name) is None for s in samples]
        if any(missing) and not all(missing):
            raise ValueError(f"a micro-batch mixes samples with and without {name}")
        return None if any(missing) else sampled(name)

    return Batch(
        input_ids=ids,
        rows=_flat_rows([s.rows for s in samples], ids.shape[1]),
        targets=torch.tensor([t for s in samples for t in s.completion_ids], dtype=torch.long),
        sampler_logprobs=sampled("sampler_logprobs"),
        policy_weight=sampled("policy_weight"),
        distill_weight=sampled("distill_weight"),
        ce_weight=sampled("ce_weight"),
        advantage=sampled("advantage"),
        lengths=[sum(s.completion_mask) for s in samples],
        old_logprobs=sampled_or_none("old_logprobs"),
        # Where there are views, the weights already hold what scores from before training were needed for.
        teacher_logprobs=None if views else sampled_or_none("teacher_logprobs"),
        **_read_columns(samples, views, pad_id),
        **_stored_top_columns(samples),
    )


def _read_columns(samples: Sequence[Sample], views: Sequence[TeacherView], pad_id: int) -> dict[str, Tensor | None]:
    """The columns of what a teacher reads: `teacher_ids`, `teacher_rows`, `taught` (see `Batch`).

    Raises ValueError where it would read some samples and has stored its scores of others.
    """
    if not views:
        return {"teacher_ids": None, "teacher_rows": None, "taught": None}
    if any(s.teacher_view is None and s.teacher_logprobs is not None for s in samples):
        raise ValueError("a micro-batch mixes samples that a teacher reads with samples whose scores are stored")
    ids = _pad([v.token_ids for v in views], pad_id)
    taught = None
    if len(views) < len(samples):
        seen = [s.teacher_view is not None for s in samples for _ in s.rows]
        taught = torch.tensor(seen).nonzero().squeeze(-1)
    return {"teacher_ids": ids, "teacher_rows": _flat_rows([v.rows for v in views], ids.shape[1]), "taught": taught}


def _stored_top_columns(samples: Sequence[Sample]) -> dict[str, Tensor | None]:
    """The columns of a stored top k: `teacher_top_ids`, `teacher_top_logprobs` (see `Batch`).

    Raises ValueError where only some samples have one.
    """
    top = [s for s in samples if s.teacher_top_ids is not None and s.teacher_top_logprobs is not None]
    if not top:
        return {"teacher_top_ids": None, "teacher_top_logprobs": None}
    if len(top) < len(samples):
        raise ValueError("a micro-batch mixes samples with and without a stored top k")
    ids = [row for s in top for row in s.teacher_top_ids or []]
    logprobs = [row for s in top for row in s.teacher_top_logprobs or []]
    return {
        "teacher_top_ids": torch.tensor(ids, dtype=torch.long),
        "teacher_top_logprobs": torch.tensor(logprobs, dtype=torch.float32),
    }


def empty_batch(pad_id: int) -> Batch:
    """Make a micro-batch of one sequence of padding, with N = 0 sampled tokens, for student and teacher.

    A forward pass over it reaches every weight, and so does the graph of its loss of 0.
    """
    ids = torch.full((1, 2), pad_id)
    nowhere, nothing = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    return Batch(
        input_ids=ids,
        rows=nowhere,
        targets=nowhere,
        sampler_logprobs=nothing,
        policy_weight=nothing,
        distill_weight=nothing,
        ce_weight=nothing,
        advantage=nothing,
        lengths=[0],
        teacher_ids=ids,
        teacher_rows=nowhere,
        taught=None,
        old_logprobs=nothing,
        teacher_logprobs=nothing,
    )


def _pad(sequences: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    width = max(map(len, sequences))
    return torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in sequences], dtype=torch.long)


def _flat_rows(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor([n * width + row for n, own in enumerate(rows) for row in own], dtype=torch.long)
