"""The loss of a step does not depend on how its samples are cut into micro-batches."""

import random

import pytest
import torch

from opd.collate import collate, microbatches, normalise
from opd.config import TeacherConfig
from opd.losses import CrossEntropy, Distill, Losses
from opd.objective import objective
from opd.teacher import Teacher
from opd.types import Sample, TeacherView


def sample(draw, *, same_prompt=False):
    """Two turns of random ids behind prompts of random length, and a teacher that reads a longer prompt."""

    def ids(least, most):
        return [draw.randrange(200) for _ in range(draw.randint(least, most))]

    first, second, said, answer = ids(1, 9), ids(1, 4), ids(1, 6), ids(1, 6)
    longer = first if same_prompt else ids(5, 15)
    token_ids = first + said + second + answer
    mask = [0] * len(first) + [1] * len(said) + [0] * len(second) + [1] * len(answer)
    rows = [len(longer) - 1 + i for i in range(len(said))]
    rows += [len(longer) + len(said) + len(second) - 1 + i for i in range(len(answer))]
    return Sample(
        token_ids=token_ids,
        completion_mask=mask,
        turn=[0] * len(mask),
        sampler_logprobs=[0.0 if m else float("nan") for m in mask],
        distill_weight=[draw.uniform(0.5, 2) * m for m in mask],
        ce_weight=[1.0 * m for m in mask],
        teacher_view=TeacherView(token_ids=longer + said + second + answer, rows=rows),
    )


def loss_and_gradients(model, teacher, samples, losses, parts):
    """Of the whole step, its samples cut into these parts."""
    scaled = normalise(samples, losses, lambda sums: sums)
    model.zero_grad()
    total = 0.0
    for part in parts:
        batch = collate([scaled[i] for i in part], 0)
        result = objective(model, batch, losses, teacher.teach(batch) if losses.distill else None)
        result.loss.backward()
        total += result.loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


LOSSES = {
    "distill": Losses(distill=Distill(kind="forward_kl", temperature=1.0)),
    "jsd, sequence mean": Losses(distill=Distill(kind="jsd", temperature=0.7, beta=0.3), reduction="sequence_mean"),
    "reverse and cross-entropy": Losses(distill=Distill(kind="reverse_kl", temperature=1.0), ce=CrossEntropy(coef=0.3)),
    "shared denominator": Losses(
        distill=Distill(kind="forward_kl", temperature=1.0, clip=0.05), ce=CrossEntropy(), shared=True
    ),
}


@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("tied", [False, True])
def test_one_batch_of_eight_is_two_of_four_and_four_of_two(make_model, losses, tied):
    draw = random.Random(1)
    samples = [sample(draw) for _ in range(8)]
    model = make_model(dtype=torch.float64, tie_word_embeddings=tied)
    teacher = Teacher(TeacherConfig(weights="frozen", rate=None), model)
    with torch.no_grad():
        for parameter in model.parameters():  # so that the frozen teacher and the student differ
            parameter.add_(0.02 * torch.randn(parameter.shape, dtype=parameter.dtype))
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
    assert result.divergence.abs().max().item() <= 1e-12


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
    kept = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    batch = collate([sample(draw)], 0)
    before = teacher.teach(batch).hidden
    assert not before.requires_grad
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    teacher.update()
    assert all(torch.equal(weight, kept[name]) for name, weight in teacher.state_dict().items())
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
    torch.testing.assert_close(teacher.state_dict()[name], expected)


def test_an_averaged_teacher_moves_at_a_rate_that_bfloat16_would_lose(make_model):
    model = make_model(dtype=torch.bfloat16)
    teacher = Teacher(TeacherConfig(weights="ema", rate=0.01), model)
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    start = teacher.state_dict()[name].clone()
    with torch.no_grad():
        parameter.mul_(1.0625)
    for _ in range(3):
        teacher.update()
    moved = (teacher.state_dict()[name] - start).abs()
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
    assert teacher.state_dict() == {}
