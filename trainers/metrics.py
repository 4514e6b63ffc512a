"""The numbers of a step, from its episodes and its samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from opd.types import Sample, StopReason, TrajectoryGroup


def of_groups(groups: Iterable[TrajectoryGroup]) -> dict[str, float]:
    """Rewards, ends and sizes of the episodes. Means are over the episodes whose environment did not break."""
    episodes = [t for group in groups for t in group.trajectories]
    whole = [t for t in episodes if t.failed is None]
    turns = [turn for t in episodes for turn in t.turns]
    row = {
        "rollout/episodes": float(len(episodes)),
        "rollout/failed": float(len(episodes) - len(whole)),
        "rollout/forks": float(sum(turn.forked for turn in turns)),
        "tokens/sampled": float(sum(t.completion_tokens for t in episodes)),
    }
    if whole:
        row |= {
            "reward/mean": _mean(t.reward for t in whole),
            "reward/success": _mean(t.success for t in whole),
            "rollout/turns": _mean(len(t.turns) for t in whole),
            "rollout/truncated": _mean(t.truncated for t in whole),
            "rollout/tokens_per_episode": _mean(t.completion_tokens for t in whole),
        }
    if turns:
        row["rollout/cut_completions"] = _mean(turn.stop_reason is StopReason.LENGTH for turn in turns)
    return row


def of_samples(samples: Sequence[Sample], divergences: Mapping[int, Tensor]) -> dict[str, float]:
    """How much trains, by which route, and how far the teacher is from the student where it does."""
    row = {"tokens/trained": float(sum(sum(s.completion_mask) for s in samples))}
    for route, count in Counter(s.route for s in samples).items():
        row[f"route/{route}"] = float(count)
    if divergences:
        nats = torch.cat([divergences[i] for i in sorted(divergences)]).double()
        row |= {"distill/nats": float(nats.mean()), "distill/nats_max": float(nats.max())}
    return row


def _mean(values: Iterable[float]) -> float:
    listed = [float(v) for v in values]
    return sum(listed) / len(listed)
