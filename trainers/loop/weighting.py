"""Lays the weightings of a run (`weighting:` in its file) over the weights of a step's samples.

The formulas are in `opd.maths.weighting`; here they meet samples, and means over the whole step and all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch

from opd.losses import unknown
from opd.maths.weighting import entropy_weights, pass_rate_weight, step_weights, turn_weights
from opd.objective.config import WeightingConfig
from opd.types import WEIGHTS, Sample

AllSum = Callable[[list[float]], list[float]]
Work = Callable[[], list[list[float]]]


def weigh(
    samples: Sequence[Sample],
    config: WeightingConfig,
    pass_rates: Mapping[str, float],
    all_sum: AllSum,
    agree: Callable[[Work], list[list[float]]] = lambda work: work(),
) -> list[Sample]:
    """Every weighting that the settings ask for, one after the other.

    `pass_rates` is the share of solved episodes by task id. `agree` runs somebody's own function, so that an error of
    one rank is raised on all (`opd.ranks.ranks.Ranks.agree`).
    """
    weighed = list(samples)
    if config.entropy is not None:
        weighed = by_entropy(weighed, config.entropy, all_sum)
    if config.steps is not None:
        weighed = by_steps(weighed, epsilon=config.steps.epsilon, most=config.steps.most)
    if config.pass_rate is not None:
        rule = config.pass_rate
        factors = {task: pass_rate_weight(rate, alpha=rule.alpha, beta=rule.beta) for task, rate in pass_rates.items()}
        if rule.on != "distilled" and rule.on != "all":
            raise unknown("weighting.pass_rate.on", rule.on, ("distilled", "all"))
        streams = WEIGHTS if rule.on == "all" else ("distill_weight",)
        weighed = by_task(weighed, factors, all_sum if rule.normalise else None, streams)
    if config.turns is not None:
        weighed = by_turn(weighed, config.turns)
    for own in config.functions:
        weighed = _times(weighed, agree(partial(own.found.factors, weighed, own.kwargs)), own.found.streams)
    return weighed


def by_entropy(samples: Sequence[Sample], beta: float, all_sum: AllSum) -> list[Sample]:
    """SRPO's weights on the distilled tokens: `opd.maths.weighting.entropy_weights` over their mean in the step."""
    # In float32 the weight of a token could vanish, and the token with it from the denominator.
    entropies = (torch.tensor(_known(s, "teacher_entropy"), dtype=torch.float64) for s in samples)
    factors = [entropy_weights(entropy, beta=beta).tolist() for entropy in entropies]
    return _times(samples, factors, ("distill_weight",), all_sum)


def by_steps(samples: Sequence[Sample], *, epsilon: float, most: float) -> list[Sample]:
    """SOD's weights on the distilled tokens: less at turns where the student has left the teacher's ground.

    The student's log-probs are those of the policy that sampled. Sequences of one episode (a template that rewrites
    the past makes several) are weighed together.
    """
    factors: list[list[float]] = []
    for _, own in groupby(samples, key=lambda s: (s.task.id if s.task else None, s.member)):
        parts = list(own)
        gaps = [
            abs(ours - theirs)
            for s in parts
            for ours, theirs in zip(
                _sampled(s, s.sampler_logprobs), _sampled(s, _known(s, "teacher_logprobs")), strict=True
            )
        ]
        turns = [turn for s in parts for turn in _sampled(s, s.turn)]
        weights = iter(step_weights(torch.tensor(gaps), torch.tensor(turns), epsilon=epsilon, most=most).tolist())
        factors += [[next(weights) if sampled else 0.0 for sampled in s.completion_mask] for s in parts]
    return _times(samples, factors, ("distill_weight",))


def by_task(
    samples: Sequence[Sample],
    factors: Mapping[str, float],
    all_sum: AllSum | None,
    streams: Sequence[str] = ("distill_weight",),
) -> list[Sample]:
    """PACED's weights, on the distilled tokens: one factor a task; with `all_sum`, over their mean in the step."""
    rows = [[factors[s.task.id] if s.task else 1.0] * len(s.token_ids) for s in samples]
    return _times(samples, rows, streams, all_sum)


def by_turn(samples: Sequence[Sample], weights: Sequence[float]) -> list[Sample]:
    """A factor for each turn on every component; the last one stands for all turns after it, 0 masks a turn."""
    last = len(weights) - 1
    rows = [turn_weights(torch.tensor(s.turn).clamp(max=last), weights).tolist() for s in samples]
    return _times(samples, rows, WEIGHTS)


def _times(
    samples: Sequence[Sample],
    factors: Sequence[Sequence[float]],
    streams: Sequence[str],
    all_sum: AllSum | None = None,
) -> list[Sample]:
    """Streams times factors [T] a sample; with `all_sum`, factors over their mean where the product is not 0: a
    denominator counts no other token, so that the step keeps its size."""
    weighed = list(samples)
    for name in streams:
        pairs = [
            [(f, w) for f, w in zip(fs, getattr(s, name), strict=True)] for s, fs in zip(weighed, factors, strict=True)
        ]
        scale = 1.0
        if all_sum is not None:
            active = [f for row in pairs for f, w in row if w != 0 and f != 0]
            total, count = all_sum([sum(active), float(len(active))])
            scale = count / total if total > 0 else 0.0
        streams_of: list[dict[str, Any]] = [{name: [w * f * scale if w != 0 else 0.0 for f, w in row]} for row in pairs]
        weighed = [replace(s, **stream) for s, stream in zip(weighed, streams_of, strict=True)]
    return weighed


def _known(sample: Sample, name: str) -> list[float]:
    """A stream that the teacher filled in; zeros for a sample that no teacher sees, whose weights are 0 as well."""
    stream: list[float] | None = getattr(sample, name)
    if stream is None:
        assert sample.teacher_view is None, f"{name} was not scored before it was needed"
        return [0.0] * len(sample.token_ids)
    return stream


def _sampled(sample: Sample, stream: Sequence[float]) -> list[float]:
    return [value for value, sampled in zip(stream, sample.completion_mask, strict=True) if sampled]
