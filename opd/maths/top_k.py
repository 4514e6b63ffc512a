"""Narrows distributions to the likeliest k entries of the vocabulary, with all others as one more or left out.

Log-probs in nats go in and come out. Which divergence is taken of them is decided in `opd.maths.divergence`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd.errors import ConfigError, DataError
from opd.losses import SUPPORTS, Divergence, unknown

LEAST_TAIL = 1e-7
"""Stored log-probs are rounded, so that k of them may add up to 1: less than this is not taken for the rest."""


def choose_top(divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """Choose the entries that are told apart: log-probs [..., V], [..., V] -> [..., top_k]. Raises ConfigError."""
    vocabulary = student.shape[-1]
    if divergence.top_k is None or divergence.top_k > vocabulary:
        raise ConfigError(f"divergence.top_k = {divergence.top_k}: must be at most the vocabulary's {vocabulary}")
    if divergence.support == "teacher":
        chosen = teacher
    elif divergence.support == "student":
        chosen = student
    else:
        raise unknown("divergence.support", divergence.support, SUPPORTS)
    return chosen.detach().topk(divergence.top_k, dim=-1).indices


def restrict(divergence: Divergence, student: Tensor, teacher: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Take both sides' log-probs [..., V] at `ids` [..., k]: [..., k + 1] with a tail, [..., k] renormalised without.

    Raises DataError where a side without a tail has no mass on these entries.
    """
    if divergence.tail:
        return with_tail(student, ids), with_tail(teacher, ids)
    kept = [side.gather(-1, ids) for side in (student, teacher)]
    if any(side.isneginf().all(-1).any() for side in kept):
        raise DataError(f"one side has no mass on the top {divergence.top_k} of the {divergence.support}: use the tail")
    return kept[0].log_softmax(-1), kept[1].log_softmax(-1)


def with_tail(logprobs: Tensor, ids: Tensor) -> Tensor:
    """Take log-probs [..., V] at `ids` [..., k], then the log of all other mass, summed (1 - kept would cancel)."""
    rest = logprobs.scatter(-1, ids, -torch.inf)
    # A tail without mass: logsumexp's own gradient would be nan there.
    empty = rest.isneginf().all(-1, keepdim=True)
    tail = rest.masked_fill(empty, 0).logsumexp(-1, keepdim=True).masked_fill(empty, -torch.inf)
    return torch.cat([logprobs.gather(-1, ids), tail], dim=-1)


def complete(logprobs: Tensor, *, tail: bool) -> Tensor:
    """Make distributions of a teacher's likeliest entries alone: log-probs [N, k] -> [N, k + 1] or [N, k].

    The tail's mass is what the k leave of 1, at least `LEAST_TAIL`; without a tail the k are renormalised.
    """
    if not tail:
        return logprobs.log_softmax(-1)
    mass = logprobs.exp().sum(-1, keepdim=True)
    return torch.cat([logprobs, (1 - mass).clamp(min=LEAST_TAIL).log()], -1)
