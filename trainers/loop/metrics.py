"""The numbers of a step, from its episodes, its samples, and what the objective found out about their tokens.

Names that are not plain: `end/*` is the share of episodes that ended so (`opd.types.End`); `distill/nats` is the
divergence a token (of the sampled token alone: the log-ratio), split by whether the episode solved its task and by
turn; `distill/kept` the probability that the top k hold; `.../clipped` the share of what a clip touched;
`policy/ratio_*` quantiles of student over old policy, `sampler/ratio_*` of old policy over sampler; `sampler/gap` the
mean absolute difference of their log-probs; `signal/zero` the share of samples from which nothing can be learned,
`signal/solved_groups` that of tasks of which an episode is solved, `signal/mixed_groups` that of tasks whose rewards
differ; `shown/*` the share of samples whose teacher is shown that; `variance/*` see `of_variance`. `reward/part/NAME`
is a named part of the reward before its weight, `reward/abstained/NAME` the number of episodes that it could not tell
of; `reward/logged/NAME` what a reward function logged. `rollout/unscored` counts episodes that nobody could score: they
are in no mean of rewards and in no baseline. `failures/grading` counts texts that a grader had no result for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from opd.types import End, Sample, StopReason, Trajectory, TrajectoryGroup

MOST_TURNS = 8
"""Turns with a metric of their own; the last one stands for all after it too."""
QUANTILES = {"p01": 0.01, "p50": 0.5, "p99": 0.99}
Column = np.ndarray


def of_groups(groups: Sequence[TrajectoryGroup]) -> dict[str, float]:
    """Rewards, ends and sizes of the episodes. Means are over the episodes whose environment did not break.

    Failures are counted over all attempts, those included that were played again.
    """
    episodes = [t for group in groups for t in group.trajectories]
    whole = [t for t in episodes if t.failed is None]
    turns = [turn for t in episodes for turn in t.turns]
    row = {
        "rollout/episodes": float(len(episodes)),
        "rollout/failed": float(len(episodes) - len(whole)),
        "rollout/retried": float(sum(len(group.replaced) for group in groups)),
        "rollout/groups_dropped": float(sum(group.dropped for group in groups)),
        "rollout/forks": float(sum(turn.forked for turn in turns)),
    }
    ends = Counter(t.end for t in episodes)
    row |= {f"end/{end}": ends[end] / len(episodes) for end in End if episodes}
    faults = Counter(t.fault for group in groups for t in group.attempts if t.fault is not None)
    row["failures/infrastructure"] = float(sum(n for fault, n in faults.items() if fault.of_infrastructure))
    row["failures/environment"] = float(faults.total()) - row["failures/infrastructure"]
    if ungraded := sum(len(t.ungraded) for group in groups for t in group.attempts):
        row["failures/grading"] = float(ungraded)
    row |= {f"failures/{fault}": float(count) for fault, count in faults.items()}
    row |= _of_rewards(whole)
    if whole:
        row |= {
            "rollout/turns": _mean(len(t.turns) for t in whole),
            "rollout/truncated": _mean(t.truncated for t in whole),
            "rollout/tokens_per_episode": _mean(t.completion_tokens for t in whole),
        }
    if usable := [group.usable for group in groups if group.usable]:
        row["signal/solved_groups"] = _mean(any(t.success for t in group) for group in usable)
        row["signal/mixed_groups"] = _mean(len({t.reward for t in group if not t.unscored}) > 1 for group in usable)
    if turns:
        row["rollout/cut_completions"] = _mean(turn.stop_reason is StopReason.LENGTH for turn in turns)
        row["rollout/unreadable"] = _mean(turn.unreadable for turn in turns)
    return row


def _of_rewards(episodes: Sequence[Trajectory]) -> dict[str, float]:
    """Average the rewards of episodes that have one, and what they are made of."""
    scored = [t for t in episodes if not t.unscored]
    row = {"rollout/unscored": float(len(episodes) - len(scored))} if len(scored) < len(episodes) else {}
    if scored:
        row |= {"reward/mean": _mean(t.reward for t in scored), "reward/success": _mean(t.success for t in scored)}
    return row | _of_parts([t.reward_parts for t in episodes]) | _logged([t.metrics for t in episodes])


def _of_parts(episodes: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """The mean of each named part of the reward where it told, and how many episodes it abstained from."""
    row: dict[str, float] = {}
    for name in dict.fromkeys(name for parts in episodes for name in parts):
        told = [parts[name] for parts in episodes if name in parts]
        numbers = [value for value in told if value is not None]
        row |= {f"reward/part/{name}": _mean(numbers)} if numbers else {}
        row |= {f"reward/abstained/{name}": float(len(told) - len(numbers))} if len(numbers) < len(told) else {}
    return row


def _logged(episodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each number that reward functions logged, over the episodes that have one."""
    names = dict.fromkeys(name for metrics in episodes for name in metrics)
    return {f"reward/logged/{name}": _mean(metrics[name] for metrics in episodes if name in metrics) for name in names}


def pass_rates(groups: Iterable[TrajectoryGroup]) -> dict[str, float]:
    """The share of a task's episodes that solved it, by task id; tasks of which none was played whole are left out."""
    return {group.task.id: _mean(t.success for t in group.usable) for group in groups if group.usable}


def of_samples(samples: Sequence[Sample]) -> dict[str, float]:
    """Count samples by their routes, and by what their teachers are shown."""
    row: dict[str, float] = {}
    for route, count in Counter(s.route for s in samples).items():
        row |= {f"route/{route}": float(count), f"route/{route}_share": count / len(samples)}
    shown = Counter(name for s in samples if s.teacher_view for name in s.teacher_view.shows)
    row |= {f"shown/{name}": count / len(samples) for name, count in shown.items()}
    if samples:
        row["signal/zero"] = _mean(s.zero_signal for s in samples)
    return row


def of_tokens(samples: Sequence[Sample], facts: Mapping[int, Mapping[str, Tensor]]) -> dict[str, float]:
    """Average the objective's facts, each over the tokens that train by the component it is about."""
    columns = _columns(samples, facts)
    distilled, policy = columns["distill_weight"] != 0, columns["policy_weight"] != 0
    trained = distilled | policy | (columns["ce_weight"] != 0)
    row = _of_distillation({name: column[distilled] for name, column in columns.items()})
    row |= _means(columns, trained, {"entropy": "entropy/student", "sampler_limited": "sampler/limited"})
    row |= _means(columns, policy, {"ratio_clipped": "policy/clipped"})
    row |= _quantiles("policy/ratio", columns, "ratio", policy)
    row |= _quantiles("sampler/ratio", columns, "sampler_ratio", trained)
    gap = _known(columns, "sampler_gap", trained)
    if gap.size:
        row["sampler/gap"] = float(np.abs(gap).mean())
    return row | of_variance(columns)


def of_variance(columns: Mapping[str, Column]) -> dict[str, float]:
    """The variance meter, over the tokens that the teacher saw.

    `variance/plain`: of the sampled-token gradient by the logits, without a baseline, mean a token (nats squared).
    `variance/baseline` and `variance/least`: with the method's baseline (or the full one), and with the best that a
    state can have, over without; `variance/reached`: the share of that reduction which the baseline gets.
    """
    everywhere = np.ones(len(columns["turn"]), bool)
    found = {name: _known(columns, f"variance_{name}", everywhere) for name in ("plain", "baselined", "least")}
    sums = {name: float(values.sum()) for name, values in found.items()}
    if not sums["plain"] > 0:
        return {}
    reachable = sums["plain"] - sums["least"]
    row = {
        "variance/plain": sums["plain"] / found["plain"].size,
        "variance/baseline": sums["baselined"] / sums["plain"],
        "variance/least": sums["least"] / sums["plain"],
    }
    return row | ({"variance/reached": (sums["plain"] - sums["baselined"]) / reachable} if reachable > 0 else {})


def _of_distillation(columns: Mapping[str, Column]) -> dict[str, float]:
    everywhere = np.ones(len(columns["turn"]), bool)
    row = _means(
        columns,
        everywhere,
        {
            "nats": "distill/nats",
            "clipped": "distill/clipped",
            "kept": "distill/kept",
            "teacher_entropy": "entropy/teacher",
        },
    )
    if "distill/nats" not in row:
        return row
    row["distill/nats_max"] = float(np.nanmax(columns["nats"]))
    right, turn = columns["right"] != 0, np.minimum(columns["turn"], MOST_TURNS - 1)
    row |= _means(columns, right, {"nats": "distill/nats_right"}) | _means(
        columns, ~right, {"nats": "distill/nats_wrong"}
    )
    for number in np.unique(turn):
        row |= _means(columns, turn == number, {"nats": f"distill/nats_turn_{int(number)}"})
    return row


def _columns(samples: Sequence[Sample], facts: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Column]:
    """One row a sampled token, one column a fact (nan where it has none) or a stream of its sample."""
    names = sorted({name for own in facts.values() for name in own})
    columns: dict[str, list[Column]] = {name: [] for name in names}
    streams = ("turn", "policy_weight", "distill_weight", "ce_weight")
    columns |= {name: [] for name in (*streams, "right")}
    for index in sorted(facts):
        sample, own = samples[index], facts[index]
        mask = np.array(sample.completion_mask, bool)
        for name in streams:
            columns[name].append(np.array(getattr(sample, name), float)[mask])
        columns["right"].append(np.full(mask.sum(), float(sample.success)))
        for name in names:
            columns[name].append(own[name].double().numpy() if name in own else np.full(mask.sum(), np.nan))
    return {name: np.concatenate(parts) if parts else np.empty(0) for name, parts in columns.items()}


def _known(columns: Mapping[str, Column], name: str, where: Column) -> Column:
    """The values of a fact at some tokens, without those that have none."""
    values = columns[name][where] if name in columns else np.empty(0)
    known: Column = values[~np.isnan(values)]
    return known


def _means(columns: Mapping[str, Column], where: Column, names: Mapping[str, str]) -> dict[str, float]:
    """Means of facts, under the names of their metrics; nothing where no token has any."""
    values = {metric: _known(columns, fact, where) for fact, metric in names.items()}
    return {metric: float(known.mean()) for metric, known in values.items() if known.size}


def _quantiles(prefix: str, columns: Mapping[str, Column], name: str, where: Column) -> dict[str, float]:
    values = _known(columns, name, where)
    return {f"{prefix}_{label}": float(np.quantile(values, q)) for label, q in QUANTILES.items()} if values.size else {}


def _mean(values: Iterable[float]) -> float:
    listed = [float(v) for v in values]
    return sum(listed) / len(listed)
