"""A check while a run goes on: the sampler's log-probs must be those of the trainer.

A wrong position, a stale cache, a weight that an update left out or a window that is not there shows here as a gap of
tenths of a nat; rounding alone is far smaller. The engine is asked for tokens of the check's own, at temperature 1 and
without truncation, whatever the run samples with: another temperature would hide a gap or magnify it, and top-p and
top-k give log-probs that cannot be compared. It costs the engine `SEQUENCES` prefills and `TOKENS` tokens behind each,
and the trainer one forward pass of these sequences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opd.engines.base import Completion, Request, RolloutEngine, Sampling, generate
from opd.errors import ModelError

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""The largest mean gap in nats, by the type of the weights; 16-bit kernels differ by more than a sum's rounding."""
PLAIN = Sampling(temperature=1.0)
SEQUENCES = 4
"""Sequences that an engine with one copy of the weights is asked to go on with."""
TOKENS = 16
"""The tokens that are sampled behind each of them, or half of `max_length` where that is fewer."""


def choose(sequences: Sequence[list[int]], count: int) -> list[list[int]]:
    """Choose `count` sequences of ids to go on with: the longest, in which a window may end, and the shortest."""
    ordered = sorted((ids for ids in sequences if ids), key=len)
    return ordered if len(ordered) <= count else [*ordered[: count - 1], ordered[-1]]


def sample_plainly(
    engine: RolloutEngine, sequences: Sequence[list[int]], *, max_length: int
) -> list[tuple[list[int], Completion]]:
    """Let the engine go on with each of the sequences, by fixed seeds; return what it was given with what it sampled.

    Nothing may be in flight. A sequence that leaves no room in `max_length` loses its end.
    """
    tokens = min(TOKENS, max_length // 2)
    engine.begin(PLAIN, frozenset())
    requests = [
        Request(session=-1 - number, prompt_ids=ids[: max_length - tokens], seed=number, max_tokens=tokens)
        for number, ids in enumerate(sequences)
    ]
    sampled = {done.session: done for done in generate(engine, requests)}
    for request in requests:
        engine.release(request.session)
    return [(request.prompt_ids, sampled[request.session]) for request in requests]


def check_gap(own: Tensor, sampled: Tensor, *, dtype: torch.dtype, engine_dtype: torch.dtype | None = None) -> float:
    """Return the mean absolute difference, in nats, between the trainer's log-probs [N] and the sampler's [N].

    `dtype` is that of the weights that train, `engine_dtype` the type that the engine computes in where it is another.
    Raises ModelError beyond the tolerance, and where the difference is no number.
    """
    gap = float((own - sampled).abs().mean())
    allowed = max(TOLERANCE[dtype], TOLERANCE[engine_dtype or dtype])
    if not gap <= allowed:
        raise ModelError(
            f"the rollout engine's log-probs differ from the trainer's by {gap:.3g} nats a token (allowed: {allowed}), "
            "at temperature 1: the engine does not sample from the policy that trains. Check the engine's weights and "
            "type (rollout.vllm.dtype), and whether it knows this architecture."
        )
    return gap
