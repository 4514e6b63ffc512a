"""The loss of one micro-batch, with facts about its tokens for the logs.

Only here do per-token values become a sum; the weights already carry every coefficient and denominator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opd.losses import FORMS, Distill, Divergence, Losses, Policy, SampledDistill, Sampler, unknown
from opd.maths.advantage import chunked_advantages
from opd.maths.divergence import stored_divergence, weighted_divergence
from opd.maths.estimators import estimator_loss
from opd.maths.head import Head
from opd.maths.logprobs import chunked_entropy, chunked_logprobs, chunked_scores
from opd.maths.policy import LOG_RATIO_BOUND, importance_weights, policy_loss
from opd.maths.variance import GradientVariance, chunked_gradient_variance
from opd.models.causal import CausalModel
from opd.objective.collate import Batch, Taught


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The part of one micro-batch in the step's loss."""

    loss: Tensor
    """Scalar, with a graph even where nothing trains, so that sharded gradients always reduce."""
    facts: dict[str, Tensor] = field(default_factory=dict)
    """[N] each, detached, nan where a token has none; `trainers/loop/metrics.py` turns them into numbers of a step:

    nats, clipped, kept, teacher_entropy: of the distillation, per token;
    entropy, ratio, ratio_clipped: of the student, and of its ratio to the old policy;
    sampler_gap, sampler_ratio, sampler_limited: of the old policy against the sampler;
    variance_plain, variance_baselined, variance_least: `opd.maths.variance.GradientVariance`.
    """


@dataclass(slots=True, kw_only=True)
class _Pass:
    """The student's side of one micro-batch, and the facts that the components note about it."""

    batch: Batch
    sampler: Sampler
    hidden: Tensor
    head: Head
    logprobs: Tensor | None = None
    """[N] at the sampling temperature; with a graph where a component needs one."""
    trust: Tensor | None = None
    """[N] importance weights between trainer and sampler; None where there is no correction."""
    facts: dict[str, Tensor] = field(default_factory=dict)

    def own(self) -> Tensor:
        assert self.logprobs is not None
        return self.logprobs

    def weights(self, name: str) -> Tensor:
        """A weight stream [N] times the correction for the sampler."""
        stream: Tensor = getattr(self.batch, name)
        return stream if self.trust is None else stream * self.trust

    def ratio(self, most: float | None) -> Tensor:
        """The ratio of student to old policy, detached, at most `most`: [N], ones before the first update."""
        if self.batch.old_logprobs is None:
            return torch.ones_like(self.batch.distill_weight)
        log_ratio = self.own().detach() - self.batch.old_logprobs
        return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp().clamp(max=math.inf if most is None else most)

    def note(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Keep a fact of all tokens, or of those at `where`."""
        values = values.detach()
        if where is not None:
            values = values.new_full((len(self.hidden),), torch.nan).index_copy_(0, where, values)
        self.facts[name] = values


def objective(
    student: CausalModel,
    batch: Batch,
    losses: Losses,
    taught: Taught | None,
    sampler: Sampler = Sampler(),  # noqa: B008  (frozen)
    *,
    meter: bool = False,
) -> Objective:
    """Run the student's forward pass and add up every component that the method asked for.

    `taught` is the teacher's side. It may be None where nothing is distilled, or only scores that the batch holds:
    the teacher's log-probs of the sampled tokens, or its top k. `meter` also measures the variance of the sampled-token
    gradient, with and without a baseline, for about the cost of two forward projections.
    """
    hidden = student(batch.input_ids, batch.rows)
    run = _Pass(batch=batch, sampler=sampler, hidden=hidden, head=student.head())
    _score(run, losses)
    loss = hidden[:1].float().sum() * 0.0  # of few rows: a sum of all may be infinite in 16 bits
    if losses.policy:
        loss = loss + _policy(run, losses.policy)
    if isinstance(losses.distill, Distill) and taught is not None:
        loss = loss + _distill(run, losses.distill, taught)
    elif isinstance(losses.distill, Distill) and batch.teacher_top_ids is not None:
        loss = loss + _stored(run, losses.distill)
    if isinstance(losses.distill, SampledDistill) and (taught or batch.teacher_logprobs is not None):
        if losses.distill.needs_distributions:
            assert taught is not None
            loss = loss + _with_baseline(run, losses.distill, taught)
        else:
            loss = loss + _sampled(run, losses.distill, taught)
    if meter and taught is not None:
        _measure(run, losses.distill, taught)
    if losses.ce:
        loss = loss - chunked_logprobs(hidden, run.head, batch.targets, weights=batch.ce_weight)
    return Objective(loss=loss, facts=run.facts)


def _score(run: _Pass, losses: Losses) -> None:
    """Compute the student's own log-probs, if a component needs them, and the correction for the sampler."""
    trained = losses.policy is not None or isinstance(losses.distill, SampledDistill)
    bounded = isinstance(losses.distill, Distill) and losses.distill.max_ratio and run.batch.old_logprobs is not None
    if not (trained or bounded or run.sampler.correction or run.sampler.measured):
        return
    with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
        scored = chunked_scores(run.hidden, run.head, run.batch.targets, temperature=run.sampler.temperature)
    run.logprobs = scored.logprobs
    run.note("entropy", scored.entropy)
    old = scored.logprobs.detach() if run.batch.old_logprobs is None else run.batch.old_logprobs
    run.note("sampler_gap", old - run.batch.sampler_logprobs)
    if run.sampler.correction:
        corrected = importance_weights(
            old, run.batch.sampler_logprobs, run.sampler.correction, lengths=run.batch.lengths
        )
        run.trust = corrected.weights
        run.note("sampler_ratio", corrected.ratio)
        run.note("sampler_limited", corrected.limited)


def _policy(run: _Pass, policy: Policy) -> Tensor:
    part = policy_loss(
        run.own(),
        run.batch.advantage,
        old_logprobs=run.batch.old_logprobs,
        clip_low=policy.clip_low,
        clip_high=policy.clip_high,
        level=policy.level,
        lengths=run.batch.lengths,
    )
    run.note("ratio", part.ratio)
    run.note("ratio_clipped", part.clipped)
    weights = run.weights("policy_weight")
    loss = (part.values * weights).sum()
    if policy.entropy:
        bonus = chunked_entropy(run.hidden, run.head, weights=weights, temperature=run.sampler.temperature)
        loss = loss - policy.entropy * bonus
    return loss


def _distill(run: _Pass, distill: Distill, taught: Taught) -> Tensor:
    """The exact divergence at the tokens that the teacher sees."""
    where = run.batch.taught
    weights = run.weights("distill_weight")
    if distill.max_ratio is not None:
        weights = weights * run.ratio(distill.max_ratio)
    part = weighted_divergence(
        _at(run.hidden, where),
        run.head,
        taught.hidden,
        taught.head,
        _at_temperature(distill.divergence, run.sampler),
        weights=_at(weights, where),
    )
    run.note("nats", part.per_token, where)
    run.note("teacher_entropy", part.teacher_entropy, where)
    if run.logprobs is None:
        run.note("entropy", part.student_entropy, where)
    if distill.divergence.clip is not None:
        run.note("clipped", part.clipped, where)
    if distill.divergence.top_k is not None:
        run.note("kept", part.kept, where)
    return part.total


def _stored(run: _Pass, distill: Distill) -> Tensor:
    """The divergence from the teacher's stored top k."""
    batch = run.batch
    assert batch.teacher_top_ids is not None
    assert batch.teacher_top_logprobs is not None
    part = stored_divergence(
        run.hidden,
        run.head,
        batch.teacher_top_ids,
        batch.teacher_top_logprobs,
        _at_temperature(distill.divergence, run.sampler),
        weights=run.weights("distill_weight"),
    )
    run.note("nats", part.per_token)
    run.note("kept", part.kept)
    run.note("entropy", part.student_entropy)
    return part.total


def _with_baseline(run: _Pass, distill: SampledDistill, taught: Taught) -> Tensor:
    """The policy gradient of the sampled divergence, with a baseline over the teacher's distribution."""
    where = run.batch.taught
    found = chunked_advantages(
        _at(run.hidden.detach(), where),
        run.head,
        taught.hidden,
        taught.head,
        _at(run.batch.targets, where),
        temperature=run.sampler.temperature,
        baseline=distill.baseline,
        top_k=distill.top_k,
        renormalise=distill.renormalise,
        clip=distill.clip,
    )
    run.note("nats", found.gap, where)
    run.note("teacher_entropy", found.teacher_entropy, where)
    weights = _at(run.weights("distill_weight"), where)
    return -(found.values * _at(run.own(), where) * weights * _at(run.ratio(distill.max_ratio), where)).sum()


def _sampled(run: _Pass, distill: SampledDistill, taught: Taught | None) -> Tensor:
    """The divergence's estimate from the teacher's log-prob of the sampled token alone."""
    where = run.batch.taught
    own, targets = _at(run.own(), where), _at(run.batch.targets, where)
    weights = _at(run.weights("distill_weight"), where)
    if taught is None:
        assert run.batch.teacher_logprobs is not None
        teacher = _at(run.batch.teacher_logprobs, where)
    else:
        scored = chunked_scores(taught.hidden, taught.head, targets, temperature=run.sampler.temperature)
        teacher = scored.logprobs
        run.note("teacher_entropy", scored.entropy, where)
    gap = own.detach() - teacher
    run.note("nats", gap, where)
    if distill.form == "policy_gradient":
        advantage = -gap if distill.clip is None else (-gap).clamp(-distill.clip, distill.clip)
        return -(advantage * own * weights * _at(run.ratio(distill.max_ratio), where)).sum()
    if distill.form == "weighted_k3":
        old = None if run.batch.old_logprobs is None else _at(run.batch.old_logprobs, where)
        values = estimator_loss(own, teacher, "weighted_k3", sampler_logprobs=old, max_ratio=distill.max_ratio)
    elif distill.form == "k2" or distill.form == "k3":
        values = estimator_loss(own, teacher, distill.form)
    else:
        raise unknown("form of the sampled divergence", distill.form, FORMS)
    return (values * weights).sum()


def _measure(run: _Pass, distill: Distill | SampledDistill | None, taught: Taught) -> None:
    """Measure the gradient's variance, with the method's own baseline or, where it has none, the full one."""
    sampled = distill if isinstance(distill, SampledDistill) and distill.baseline else SampledDistill(baseline="full")
    variance = chunked_gradient_variance(
        _at(run.hidden.detach(), run.batch.taught),
        run.head,
        taught.hidden,
        taught.head,
        sampled.baseline or "full",
        temperature=run.sampler.temperature,
        top_k=sampled.top_k,
        renormalise=sampled.renormalise,
    )
    for name, values in zip(GradientVariance._fields, variance, strict=True):
        run.note(f"variance_{name}", values, run.batch.taught)


def _at_temperature(divergence: Divergence, sampler: Sampler) -> Divergence:
    """The divergence with its temperature said: the sampling temperature, where its own is None."""
    return replace(divergence, temperature=sampler.temperature) if divergence.temperature is None else divergence


def _at(values: Tensor, where: Tensor | None) -> Tensor:
    return values if where is None else values[where]
