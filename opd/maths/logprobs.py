"""Computes log-probs of given ids, and entropies, from hidden states. The `[N, V]` logits never exist at once."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from opd.errors import ConfigError, DataError
from opd.maths.head import Head, Projection, Projector, per_token, row_block, tiles, weighted_sum


class TokenScores(NamedTuple):
    """Holds what a distribution says of a token, and how sure it is."""

    logprobs: Tensor
    """[N] nats, with a gradient where the hidden states or the head have one."""
    entropy: Tensor
    """[N] nats of the whole distribution, without gradient."""


def chunked_logprobs(
    hidden: Tensor,
    head: Head | Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Compute log-probs of `token_ids` `[N]` after hidden states `[N, H]`, without their logits: `[N]` nats.

    `weights`, the gradients and their cost: as for `opd.maths.divergence.chunked_divergence`. With minus a weight
    this is the weighted cross-entropy.

    Raises:
        ConfigError: an option outside its range.
        DataError: shapes that do not match, or an id outside the vocabulary.
    """
    projection = _projection(hidden, head, token_ids, temperature, chunk_size)
    start = partial(_LogProbTile, token_ids, None)
    if weights is None:
        return per_token(hidden, projection, start)
    return weighted_sum(hidden, projection, start, weights)[0]


def chunked_scores(
    hidden: Tensor,
    head: Head | Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> TokenScores:
    """Compute `chunked_logprobs` and the entropies, which the same softmaxes give for next to nothing."""
    projection = _projection(hidden, head, token_ids, temperature, chunk_size)
    entropy = torch.empty(len(hidden), dtype=projection.dtype, device=hidden.device)
    return TokenScores(per_token(hidden, projection, partial(_LogProbTile, token_ids, entropy)), entropy)


@torch.no_grad()
def chunked_top_k(
    hidden: Tensor, head: Head | Tensor, top_k: int, *, temperature: float = 1.0, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Find the `top_k` likeliest ids after hidden states `[N, H]`, likeliest first, and their log-probs: `[N, k]` each.

    Raises ConfigError for an option outside its range.
    """
    projection = Projection.of(hidden, head, temperature, chunk_size)
    if not 1 <= top_k <= projection.head.vocabulary:
        raise ConfigError(f"top_k = {top_k}: must be between 1 and the vocabulary's {projection.head.vocabulary}")
    ids = torch.empty(len(hidden), top_k, dtype=torch.long, device=hidden.device)
    values = torch.empty(len(hidden), top_k, dtype=projection.dtype, device=hidden.device)
    projector = Projector(projection)
    for rows in tiles(len(hidden), projection.size):
        logits = projector.logits(hidden[rows])
        for part in tiles(len(logits), row_block(logits)):
            top = logits[part].log_softmax(-1).topk(top_k, dim=-1)
            values[rows][part], ids[rows][part] = top.values, top.indices
    return ids, values


def chunked_entropy(
    hidden: Tensor,
    head: Head | Tensor,
    *,
    weights: Tensor,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Tensor:
    """Sum the entropies after hidden states `[N, H]`, weighted: a scalar in nats, with its gradient.

    Raises:
        ConfigError: an option outside its range.
        DataError: shapes that do not match.
    """
    return weighted_sum(hidden, Projection.of(hidden, head, temperature, chunk_size), _EntropyTile, weights)[0]


def entropy_of(logprobs: Tensor, p: Tensor) -> Tensor:
    """Compute entropies from log-probs and probabilities: [n, V], [n, V] -> [n] nats.

    An excluded entry (-inf) adds nothing.
    """
    negative: Tensor = torch.linalg.vecdot(p, logprobs.clamp(min=torch.finfo(p.dtype).min))
    return -negative


def _projection(
    hidden: Tensor, head: Head | Tensor, token_ids: Tensor, temperature: float, chunk_size: int | None
) -> Projection:
    projection = Projection.of(hidden, head, temperature, chunk_size)
    if token_ids.shape != hidden.shape[:1]:
        raise DataError(f"{list(token_ids.shape)} token ids for {len(hidden)} hidden states")
    if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < projection.head.vocabulary:
        least, most = (int(end) for end in token_ids.aminmax())
        raise DataError(f"token ids from {least} to {most}: a vocabulary of {projection.head.vocabulary} has no such")
    return projection


class _LogProbTile:
    """Computes the log-probs of given ids in a tile, and notes the entropies in `entropy` [N] if that is given."""

    def __init__(self, token_ids: Tensor, entropy: Tensor | None) -> None:
        self.token_ids = token_ids
        self.entropy = entropy

    def __call__(self, logits: Tensor, rows: slice, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        ids = self.token_ids[rows, None]
        values = logits.new_empty(len(logits))
        for part in tiles(len(logits), row_block(logits)):
            logprobs = logits[part].log_softmax(-1)
            values[part] = logprobs.gather(-1, ids[part]).squeeze(-1)
            if weights is not None:
                weight = weights[part, None]
                torch.mul(logprobs.exp_(), -weight, out=logits[part])
                logits[part].scatter_add_(-1, ids[part], weight)
            elif self.entropy is not None:
                self.entropy[rows][part] = entropy_of(logprobs, logprobs.exp())
        return values, logits


class _EntropyTile:
    """Computes the entropies of a tile. The gradient through the log-softmax is minus p times (log p + entropy)."""

    def __call__(self, logits: Tensor, rows: slice, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        values = logits.new_empty(len(logits))
        for part in tiles(len(logits), row_block(logits)):
            logprobs = logits[part].log_softmax(-1)
            p = logprobs.exp()
            values[part] = entropy_of(logprobs, p)
            if weights is not None:
                slope = logprobs.clamp_(min=torch.finfo(p.dtype).min).add_(values[part, None])
                torch.mul(slope.mul_(p), -weights[part, None], out=logits[part])
        return values, logits
