"""The loss of a step does not depend on how its samples are cut into micro-batches."""

import math
import random

import pytest
import torch

from opd.losses import Correction, CrossEntropy, Distill, Divergence, Losses, Policy, SampledDistill, Sampler
from opd.maths.advantage import distillation_advantage
from opd.maths.divergence import token_divergence
from opd.maths.variance import gradient_variance
from opd.objective.collate import collate, microbatches, normalise
from opd.objective.objective import objective
from opd.teachers.config import TeacherConfig
from opd.teachers.teacher import Teacher
from opd.types import Sample, TeacherView


def sample(draw, *, same_prompt=False, seen=True, moved=False):
    """Two turns of random ids behind prompts of random length, and a teacher that reads a longer prompt.

    A sample that is not `seen` has no teacher; one that has `moved` was drawn by an older student.
    """

    def ids(least, most):
        return [draw.randrange(200) for _ in range(draw.randint(least, most))]

    first, second, said, answer = ids(1, 9), ids(1, 4), ids(1, 6), ids(1, 6)
    longer = first if same_prompt else ids(5, 15)
    token_ids = first + said + second + answer
    mask = [0] * len(first) + [1] * len(said) + [0] * len(second) + [1] * len(answer)
    rows = [len(longer) - 1 + i for i in range(len(said))]
    rows += [len(longer) + len(said) + len(second) - 1 + i for i in range(len(answer))]
    view = TeacherView(token_ids=longer + said + second + answer, rows=rows)
    return Sample(
        token_ids=token_ids,
        completion_mask=mask,
        turn=[0] * (len(first) + len(said)) + [1] * (len(second) + len(answer)),
        sampler_logprobs=[draw.uniform(-7, -3) if m else math.nan for m in mask],
        policy_weight=[1.0 * m for m in mask],
        distill_weight=[draw.uniform(0.5, 2) * m * seen for m in mask],
        ce_weight=[1.0 * m for m in mask],
        advantage=[draw.uniform(-2, 2) * m for m in mask],
        old_logprobs=[draw.uniform(-7, -3) if m else math.nan for m in mask] if moved else None,
        teacher_view=view if seen else None,
    )


SAMPLER = Sampler()


def loss_and_gradients(model, teacher, samples, losses, parts, sampler=SAMPLER):
    """Of the whole step, its samples cut into these parts."""
    scaled = normalise(samples, losses, lambda sums: sums)
    model.zero_grad()
    total = 0.0
    for part in parts:
        batch = collate([scaled[i] for i in part], 0)
        taught = teacher.teach(batch) if losses.distill and batch.teacher_ids is not None else None
        result = objective(model, batch, losses, taught, sampler)
        result.loss.backward()
        total += result.loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


LOSSES = {
    "distill": Losses(distill=Distill(divergence=Divergence("forward_kl"))),
    "jsd, sequence mean": Losses(
        distill=Distill(divergence=Divergence("jsd", temperature=0.7, beta=0.3)), reduction="sequence_mean"
    ),
    "reverse and cross-entropy": Losses(
        distill=Distill(divergence=Divergence("reverse_kl")), ce=CrossEntropy(coef=0.3)
    ),
    "shared denominator": Losses(
        distill=Distill(divergence=Divergence("forward_kl", clip=0.05)), ce=CrossEntropy(), shared=True
    ),
    "top k, bounded ratio": Losses(
        distill=Distill(divergence=Divergence("jsd", top_k=20, support="student"), max_ratio=1.5)
    ),
    "policy": Losses(policy=Policy()),
    "policy by sequence, entropy": Losses(
        policy=Policy(clip_low=0.1, clip_high=0.3, level="sequence", entropy=0.1, coef=0.7),
        reduction="sequence_sum",
        length=7.0,
    ),
    "routed": Losses(policy=Policy(), distill=Distill(divergence=Divergence("jsd")), shared=True),
    "sampled": Losses(distill=SampledDistill(clip=3.0)),
    "sampled, full baseline": Losses(distill=SampledDistill(baseline="full", max_ratio=1.2)),
    "sampled, top k": Losses(distill=SampledDistill(baseline="top_k", top_k=10, renormalise=True), policy=Policy()),
    "k2": Losses(distill=SampledDistill(form="k2", coef=0.5)),
    "k3": Losses(distill=SampledDistill(form="k3")),
    "weighted k3": Losses(distill=SampledDistill(form="weighted_k3", max_ratio=2.0), policy=Policy()),
}
SAMPLERS = {
    "as trained": Sampler(),
    "truncated": Sampler(temperature=0.7, correction=Correction(high=1.5)),
    "masked by sequence": Sampler(correction=Correction(mode="mask", level="sequence", low=1e-3, high=1e3)),
}


def dense_loss(model, teacher, samples, losses, sampler):
    """The step's loss one sequence and one token at a time, from full logits and the formulas as they are printed."""
    total = 0.0
    for s in normalise(samples, losses, lambda sums: sums):
        batch = collate([s], 0)
        student = model.logits(model(batch.input_ids, batch.rows))
        taught = teacher.teach(batch) if s.teacher_view else None
        theirs = None if taught is None else taught.hidden @ taught.head.weight.T
        ids, tokens = batch.targets, range(len(batch.targets))
        own = (student / sampler.temperature).log_softmax(-1)
        logprobs = [own[t, ids[t]] for t in tokens]
        old = [p.detach() for p in logprobs] if s.old_logprobs is None else batch.old_logprobs.double().unbind()
        trust = [1.0 for _ in tokens]
        if rule := sampler.correction:
            gaps = [(old[t] - batch.sampler_logprobs[t].double()).item() for t in tokens]
            ratios = [math.exp(sum(gaps))] * len(gaps) if rule.level == "sequence" else [math.exp(g) for g in gaps]
            trust = [min(r, rule.high) if rule.mode == "truncate" else r * (rule.low <= r <= rule.high) for r in ratios]
        mean_gap = sum((p.detach() - o for p, o in zip(logprobs, old, strict=True)), start=0.0) / len(logprobs)
        for t in tokens:
            ratio = (logprobs[t] - old[t]).exp()
            weight = batch.policy_weight[t].double() * trust[t]
            if losses.policy:
                rule, advantage = losses.policy, batch.advantage[t].double()
                if rule.level == "sequence":
                    step = (mean_gap + logprobs[t] - logprobs[t].detach()).exp()
                else:
                    step = ratio
                bounded = step.clamp(1 - rule.clip_low, 1 + rule.clip_high)
                total = total - weight * torch.minimum(step * advantage, bounded * advantage)
                total = total + weight * rule.entropy * (own[t].exp() * own[t]).sum()
            weight = batch.distill_weight[t].double() * trust[t]
            if isinstance(losses.distill, Distill) and theirs is not None:
                rule = losses.distill
                bounded = 1.0 if rule.max_ratio is None else ratio.detach().clamp(max=rule.max_ratio)
                if rule.divergence.clip is None:
                    value = token_divergence(student[t], theirs[t], rule.divergence)
                else:
                    q, p = theirs[t].log_softmax(-1), student[t].log_softmax(-1)
                    value = (q.exp() * (q - p)).clamp(max=rule.divergence.clip).sum()
                total = total + weight * bounded * value
            if isinstance(losses.distill, SampledDistill) and theirs is not None:
                rule, scaled = losses.distill, theirs[t] / sampler.temperature
                gap = logprobs[t] - scaled.log_softmax(-1)[ids[t]]
                bounded = ratio if rule.max_ratio is None else ratio.clamp(max=rule.max_ratio)
                if rule.form == "policy_gradient":
                    advantage = distillation_advantage(
                        student[t] / sampler.temperature,
                        scaled,
                        ids[t],
                        baseline=rule.baseline,
                        top_k=rule.top_k,
                        renormalise=rule.renormalise,
                        clip=rule.clip,
                    )
                    value = -bounded.detach() * advantage * logprobs[t]
                else:
                    value = gap**2 / 2 if rule.form == "k2" else (-gap).exp() - 1 + gap
                    value = value * bounded if rule.form == "weighted_k3" else value
                total = total + weight * value
            if losses.ce:
                total = total - batch.ce_weight[t].double() * student[t].log_softmax(-1)[ids[t]]
    return total


def models(make_model, **options):
    """A student, and a frozen teacher that differs from it."""
    model = make_model(dtype=torch.float64, **options)
    teacher = Teacher(TeacherConfig(weights="frozen", rate=None), model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model, teacher


@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("moved", [False, True])
def test_the_loss_and_its_gradients_are_those_of_the_formulas_token_by_token(make_model, losses, sampler, moved):
    draw = random.Random(7)
    samples = [sample(draw, seen=n != 1, moved=moved) for n in range(4)]
    model, teacher = models(make_model)
    ours, gradients = loss_and_gradients(model, teacher, samples, losses, [range(4)], sampler)
    model.zero_grad()
    dense = dense_loss(model, teacher, samples, losses, sampler)
    dense.backward()
    assert ours == pytest.approx(dense.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        # The streams of a batch are float32: their rounding is what differs.
        scale = parameter.grad.abs().max().clamp(min=1e-12)
        torch.testing.assert_close(gradients[name] / scale, parameter.grad / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("tied", [False, True])
def test_one_batch_of_eight_is_two_of_four_and_four_of_two(make_model, losses, tied):
    draw = random.Random(1)
    samples = [sample(draw, seen=n % 3 != 1, moved=True) for n in range(8)]
    model, teacher = models(make_model, tie_word_embeddings=tied)
    whole, gradients = loss_and_gradients(model, teacher, samples, losses, [range(8)])
    assert whole != 0
    assert gradients
    for parts in ([range(4), range(4, 8)], [range(i, i + 2) for i in range(0, 8, 2)], microbatches(samples, 64)):
        loss, others = loss_and_gradients(model, teacher, samples, losses, parts)
        assert loss == pytest.approx(whole, rel=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-10, atol=1e-14)


def test_the_same_prompt_and_weights_on_both_sides_leave_nothing_to_learn(make_model):
    draw = random.Random(2)
    samples = [sample(draw, same_prompt=True) for _ in range(4)]
    model = make_model(dtype=torch.float64)
    teacher = Teacher(TeacherConfig(weights="live", rate=None), model)
    batch = collate(samples, 0)
    result = objective(model, batch, LOSSES["distill"], teacher.teach(batch))
    assert result.facts["nats"].abs().max().item() <= 1e-12


def test_another_sampler_is_measured_where_no_loss_asks_for_log_probs(make_model):
    draw = random.Random(2)
    model, teacher = models(make_model)
    batch = collate([sample(draw) for _ in range(2)], 0)
    taught = teacher.teach(batch)
    told = objective(model, batch, LOSSES["distill"], taught, Sampler(measured=True))
    silent = objective(model, batch, LOSSES["distill"], taught, Sampler())
    own = model.logits(model(batch.input_ids, batch.rows)).log_softmax(-1)[range(len(batch.targets)), batch.targets]
    torch.testing.assert_close(told.facts["sampler_gap"], (own - batch.sampler_logprobs).detach(), atol=1e-6, rtol=0)
    assert told.loss.item() == silent.loss.item()
    assert "sampler_gap" not in silent.facts
    assert "sampler_ratio" not in told.facts


def test_a_token_mean_counts_tokens_and_a_sequence_mean_counts_sequences():
    draw = random.Random(3)
    samples = [sample(draw) for _ in range(3)]
    tokens = [sum(s.completion_mask) for s in samples]
    ce = CrossEntropy()
    by_token = normalise(samples, Losses(ce=ce), lambda sums: sums)
    by_sequence = normalise(samples, Losses(ce=ce, reduction="sequence_mean"), lambda sums: sums)
    assert [max(s.ce_weight) for s in by_token] == pytest.approx([1 / sum(tokens)] * 3)
    assert [max(s.ce_weight) for s in by_sequence] == pytest.approx([1 / (3 * n) for n in tokens])


def test_denominators_are_those_of_all_ranks():
    draw = random.Random(4)
    [one] = normalise([sample(draw)], Losses(ce=CrossEntropy()), lambda sums: [total + 90 for total in sums])
    tokens = sum(one.completion_mask)
    assert max(one.ce_weight) == pytest.approx(1 / (tokens + 90))


def test_no_gradient_reaches_a_frozen_teacher_and_it_stays_as_it_was(make_model):
    draw = random.Random(5)
    model = make_model(dtype=torch.float64)
    teacher = Teacher(TeacherConfig(weights="frozen", rate=None), model)
    kept = {name: weight.clone() for name, weight in teacher.own.by_name.items()}
    batch = collate([sample(draw)], 0)
    before = teacher.teach(batch).hidden
    assert not before.requires_grad
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    teacher.update()
    assert all(torch.equal(weight, kept[name]) for name, weight in teacher.own.by_name.items())
    assert torch.equal(teacher.teach(batch).hidden, before)


def test_an_averaged_teacher_is_the_closed_form_of_its_average(make_model):
    model = make_model(dtype=torch.float32)
    teacher = Teacher(TeacherConfig(weights="ema", rate=0.25), model)
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    expected = parameter.detach().clone()
    for _ in range(5):
        with torch.no_grad():
            parameter.add_(0.1)
        teacher.update()
        expected += 0.25 * (parameter.detach() - expected)
    torch.testing.assert_close(teacher.own.by_name[name], expected)


def test_an_averaged_teacher_moves_at_a_rate_that_bfloat16_would_lose(make_model):
    model = make_model(dtype=torch.bfloat16)
    teacher = Teacher(TeacherConfig(weights="ema", rate=0.01), model)
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    start = teacher.own.by_name[name].clone()
    with torch.no_grad():
        parameter.mul_(1.0625)
    for _ in range(3):
        teacher.update()
    moved = (teacher.own.by_name[name] - start).abs()
    assert (moved[start.abs() > 0.1] > 0).all()


def test_a_live_teacher_follows_the_student(make_model):
    model = make_model()
    teacher = Teacher(TeacherConfig(weights="live", rate=None), model)
    batch = collate([sample(random.Random(6))], 0)
    before = teacher.teach(batch).hidden
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert not torch.allclose(teacher.teach(batch).hidden, before)
    assert teacher.own.by_name == {}


def test_a_sequence_in_which_nothing_was_sampled_adds_nothing_and_keeps_the_graph(make_model):
    draw = random.Random(8)
    samples = [sample(draw) for _ in range(2)]
    empty = Sample(
        token_ids=[5, 6],
        completion_mask=[0, 0],
        turn=[0, 0],
        sampler_logprobs=[math.nan] * 2,
        policy_weight=[0.0] * 2,
        distill_weight=[0.0] * 2,
        ce_weight=[0.0] * 2,
        advantage=[0.0] * 2,
        teacher_view=TeacherView(token_ids=[1, 5, 6], rows=[]),
    )
    model, teacher = models(make_model)
    for losses in LOSSES.values():
        alone, _ = loss_and_gradients(model, teacher, samples, losses, [range(2)])
        beside, gradients = loss_and_gradients(model, teacher, [*samples, empty], losses, [range(2), [2]])
        assert beside == pytest.approx(alone, rel=1e-12)
        assert all(gradient.isfinite().all() for gradient in gradients.values())
    only, gradients = loss_and_gradients(model, teacher, [empty], LOSSES["routed"], [[0]])
    assert only == 0
    assert gradients  # a rank with nothing to train still takes part
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


def test_the_variance_meter_measures_what_the_teacher_sees(make_model):
    draw = random.Random(9)
    samples = [sample(draw), sample(draw, seen=False)]
    model, teacher = models(make_model)
    batch = collate(samples, 0)
    for losses in (LOSSES["distill"], LOSSES["sampled, top k"]):
        facts = objective(model, batch, losses, teacher.teach(batch), meter=True).facts
        seen = torch.zeros(len(batch.targets), dtype=torch.bool).index_fill_(0, batch.taught, True)
        for name in ("variance_plain", "variance_baselined", "variance_least"):
            assert torch.equal(facts[name].isnan(), ~seen)
        assert (facts["variance_least"] <= facts["variance_plain"] + 1e-12)[seen].all()
    hidden = model(batch.input_ids, batch.rows)[batch.taught]
    taught = teacher.teach(batch)
    by_hand = gradient_variance(model.logits(hidden), taught.hidden @ taught.head.weight.T, "full")
    facts = objective(model, batch, LOSSES["distill"], taught, meter=True).facts
    torch.testing.assert_close(facts["variance_baselined"][batch.taught], by_hand.baselined)
