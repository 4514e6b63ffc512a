"""Who teaches: live, frozen and averaged weights, with full fine-tuning and with adapters.

What holds for the step's loss (frozen in the objective, the average's closed form) is in `test_objective.py`.
"""

import copy

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM

from opd.errors import CheckpointError, ModelError
from opd.losses import Distill, Divergence, Losses
from opd.models.causal import CausalModel
from opd.objective.collate import Batch
from opd.objective.objective import objective
from opd.teachers.config import TeacherConfig
from opd.teachers.teacher import Teacher

LIVE = TeacherConfig(weights="live", rate=None)
FROZEN = TeacherConfig(weights="frozen", rate=None)
LOSSES = Losses(distill=Distill(divergence=Divergence("forward_kl")))


def ema(rate):
    return TeacherConfig(weights="ema", rate=rate)


def trust_region(rate):
    return TeacherConfig(weights="trust_region", rate=rate)


def batch_of(model, *, seed=0):
    """Three sequences whose last four tokens are sampled; the teacher reads other prompts."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    own, views = (torch.randint(0, vocabulary, (3, n), generator=generator) for n in (9, 13))
    views[:, -4:] = own[:, -4:]
    rows, teacher_rows = (torch.cat([torch.arange(4) + n * w + w - 5 for n in range(3)]) for w in (9, 13))
    weights = torch.full((12,), 1 / 12)
    return Batch(
        input_ids=own,
        rows=rows,
        targets=own[:, -4:].flatten(),
        sampler_logprobs=torch.zeros(12),
        policy_weight=torch.zeros(12),
        distill_weight=weights,
        ce_weight=torch.zeros(12),
        advantage=torch.zeros(12),
        lengths=[4, 4, 4],
        teacher_ids=views,
        teacher_rows=teacher_rows,
        taught=None,
    )


def disturb(model, seed=1):
    """An optimiser step, as far as a teacher can tell."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(0.05 * noise.to(parameter.dtype))


def logits(teacher, batch):
    taught = teacher.teach(batch)
    head = taught.head
    assert head.bias is None
    return taught.hidden @ head.weight.T


def plain_logits(model, batch):
    """What the model itself says at the teacher's rows."""
    with torch.no_grad():
        return model.model(input_ids=batch.teacher_ids).logits.flatten(0, 1)[batch.teacher_rows]


KINDS = [pytest.param({}, id="untied"), pytest.param({"tie_word_embeddings": True}, id="tied"), {"lora": True}]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("config", [LIVE, FROZEN, ema(0.1), trust_region(0.3)], ids=lambda config: config.weights)
def test_before_training_every_teacher_is_the_student(make_model, options, config):
    model = make_model(**options)
    batch = batch_of(model)
    torch.testing.assert_close(logits(Teacher(config, model), batch), plain_logits(model, batch))


@pytest.mark.parametrize("options", KINDS)
def test_a_live_teacher_is_the_student_as_it_is_now(make_model, options):
    model = make_model(**options)
    teacher, batch = Teacher(LIVE, model), batch_of(model)
    before = plain_logits(model, batch)
    disturb(model)
    assert not torch.allclose(plain_logits(model, batch), before, atol=1e-2)
    torch.testing.assert_close(logits(teacher, batch), plain_logits(model, batch))


@pytest.mark.parametrize("options", KINDS)
def test_a_frozen_teacher_stays_the_model_that_was_passed_in(make_model, options):
    model = make_model(**options)
    teacher, batch = Teacher(FROZEN, model), batch_of(model)
    before = plain_logits(model, batch)
    for step in range(3):
        disturb(model, step)
        teacher.update()
    assert torch.equal(logits(teacher, batch), logits(Teacher(FROZEN, make_model(**options)), batch))
    torch.testing.assert_close(logits(teacher, batch), before)


def test_a_frozen_teacher_of_adapters_is_the_base_model_and_holds_no_more_than_the_adapters(make_model):
    model, base = make_model(lora=True), make_model()
    teacher, batch = Teacher(FROZEN, model), batch_of(model)
    disturb(model)
    with model.model.disable_adapter():
        off = plain_logits(model, batch)
    torch.testing.assert_close(logits(teacher, batch), off)
    torch.testing.assert_close(off, plain_logits(base, batch))
    assert all("lora_" in name for name in teacher.own.by_name)
    assert sum(w.numel() for w in teacher.own.by_name.values()) < 0.2 * sum(p.numel() for p in base.parameters())


@pytest.mark.parametrize("options", KINDS)
def test_an_averaged_teacher_scores_with_the_average_of_the_weights(make_model, options):
    model = make_model(**options)
    teacher, batch = Teacher(ema(0.25), model), batch_of(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    average = {name: p.detach().double() for name, p in trained.items()}
    for step in range(4):
        disturb(model, step)
        teacher.update()
        average = {name: 0.75 * average[name] + 0.25 * p.detach().double() for name, p in trained.items()}
    for name, weight in teacher.own.by_name.items():
        torch.testing.assert_close(weight.double(), average[name], rtol=1e-5, atol=1e-6)
    theirs = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name in average:
                p.copy_(average[name])
    torch.testing.assert_close(logits(teacher, batch), plain_logits(theirs, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", KINDS)
def test_a_trust_region_is_the_product_of_powers_of_the_initial_and_the_live_distribution(make_model, options):
    model = make_model(dtype=torch.float64, **options)
    teacher, batch = Teacher(trust_region(0.3), model), batch_of(model)
    initial = plain_logits(model, batch).log_softmax(-1)
    for step in range(2):
        disturb(model, step)
        teacher.update()
        live = plain_logits(model, batch).log_softmax(-1)
        product = (0.7 * initial + 0.3 * live).exp()
        expected = product / product.sum(-1, keepdim=True)
        torch.testing.assert_close(logits(teacher, batch).softmax(-1), expected, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(expected, live.exp(), atol=1e-2)


def test_a_trust_region_of_rate_one_is_the_live_student(make_model):
    model = make_model()
    teacher, batch = Teacher(trust_region(1.0), model), batch_of(model)
    disturb(model)
    torch.testing.assert_close(logits(teacher, batch).softmax(-1), plain_logits(model, batch).softmax(-1))


def test_a_trust_region_of_adapters_needs_no_second_head(make_model):
    model = make_model(lora=True)
    teacher = Teacher(trust_region(0.3), model)
    disturb(model)
    taught = teacher.teach(batch_of(model))
    assert taught.hidden.shape[1] == taught.head.weight.shape[1] == model.config.hidden_size


def test_a_trust_region_mixes_biases_and_keeps_the_heads_scale():
    torch.manual_seed(0)
    model = CohereForCausalLM(
        CohereConfig(
            vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, logit_scale=0.5, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.lm_head.bias = torch.nn.Parameter(torch.randn(50))
    model = CausalModel(model).eval()
    teacher, batch = Teacher(trust_region(0.3), model), batch_of(model)
    initial = plain_logits(model, batch)
    disturb(model)
    taught = teacher.teach(batch)
    found = taught.head.scale * (taught.hidden @ taught.head.weight.T + taught.head.bias)
    torch.testing.assert_close(found, 0.7 * initial + 0.3 * plain_logits(model, batch))


def test_a_trust_region_of_a_model_that_bends_its_logits_is_refused(make_model):
    model = make_model()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match=r"trust_region mixes logits.*use ema"):
        Teacher(trust_region(0.3), model)


def test_an_average_of_rate_one_follows_the_student(make_model):
    model = make_model()
    teacher, batch = Teacher(ema(1.0), model), batch_of(model)
    disturb(model)
    teacher.update()
    torch.testing.assert_close(logits(teacher, batch), plain_logits(model, batch))


def synced(every):
    return TeacherConfig(weights="synced", every=every)


@pytest.mark.parametrize("options", KINDS)
def test_a_synced_teacher_is_the_student_of_every_third_update_and_stands_still_between(make_model, options):
    model = make_model(**options)
    teacher, batch = Teacher(synced(3), model), batch_of(model)
    seen = [plain_logits(model, batch)]
    for step in range(7):
        disturb(model, step)
        teacher.update()
        seen.append(plain_logits(model, batch))
        torch.testing.assert_close(logits(teacher, batch), seen[(step + 1) // 3 * 3])
    assert not torch.allclose(seen[3], seen[6], atol=1e-2)


def test_a_synced_teacher_without_a_rhythm_or_a_rhythm_without_it_is_refused():
    with pytest.raises(ValueError, match=r"every\n  is missing: weights = synced needs it"):
        TeacherConfig(weights="synced")
    with pytest.raises(ValueError, match=r"every\n  is used by weights = synced alone"):
        TeacherConfig(weights="frozen", every=3)


def test_an_average_of_16_bit_weights_is_kept_in_32_and_arrives_after_many_small_moves(make_model):
    model = make_model(dtype=torch.bfloat16)
    teacher = Teacher(ema(0.01), model)
    assert {w.dtype for w in teacher.own.by_name.values()} == {torch.float32}
    disturb(model)
    for _ in range(1000):  # in bfloat16 each of these moves would round to nothing
        teacher.update()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(teacher.own.by_name[name], parameter.detach().float(), rtol=1e-3, atol=1e-4)
    taught = teacher.teach(batch_of(model))
    assert taught.hidden.dtype == taught.head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("config", [LIVE, FROZEN, ema(0.1), trust_region(0.3)], ids=lambda config: config.weights)
def test_the_gradient_is_that_of_a_teacher_that_is_only_numbers(make_model, options, config):
    model = make_model(dtype=torch.float64, **options)
    teacher, batch = Teacher(config, model), batch_of(model)
    disturb(model)
    taught = teacher.teach(batch)
    assert not taught.hidden.requires_grad
    assert not taught.head.weight.requires_grad
    objective(model, batch, LOSSES, taught).loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == {name for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    p = logits(teacher, batch).log_softmax(-1)
    student = model.model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.rows].log_softmax(-1)
    ((p.exp() * (p - student)).sum(-1) * batch.distill_weight).sum().backward()
    for name, gradient in ours.items():
        expected = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("options", KINDS)
def test_recomputed_activations_give_the_same_gradients(make_model, options):
    gradients, recomputed = [], []
    for checkpointing in (False, True):
        model = make_model(checkpointing=checkpointing, **options)
        teacher, batch = Teacher(FROZEN, model), batch_of(model)
        disturb(model)
        calls = []
        layer = next(m for name, m in model.named_modules() if name.endswith("layers.0.self_attn"))
        layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        taught = teacher.teach(batch)
        objective(model, batch, LOSSES, taught).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        recomputed.append(sum(calls))
    assert recomputed == [1, 2]
    assert set(gradients[0]) == set(gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_recomputing_switches_no_dropout_on(make_model):
    model = make_model(checkpointing=True, attention_dropout=0.5)
    batch = batch_of(model)
    first, second = (model(batch.input_ids, batch.rows) for _ in range(2))
    assert torch.equal(first, second)
    assert not any(m.training for m in model.modules() if not getattr(m, "gradient_checkpointing", False))


def test_the_students_own_weights_are_in_their_place_after_the_teacher_spoke(make_model):
    model = make_model(tie_word_embeddings=True)
    teacher, batch = Teacher(FROZEN, model), batch_of(model)
    disturb(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    own = plain_logits(model, batch)
    teacher.teach(batch)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(plain_logits(model, batch), own)


def test_a_batch_without_views_is_refused(make_model):
    model = make_model()
    batch = batch_of(model)
    with pytest.raises(ValueError, match="no teacher's view"):
        Teacher(LIVE, model).teach(Batch(**{**vars_of(batch), "teacher_ids": None, "teacher_rows": None}))


def vars_of(batch):
    return {name: getattr(batch, name) for name in Batch.__slots__}


def test_a_saved_average_goes_on_where_it_stopped(make_model):
    model = make_model()
    teacher, batch = Teacher(ema(0.3), model), batch_of(model)
    disturb(model)
    teacher.update()
    saved = {name: w.clone() for name, w in teacher.own.by_name.items()}
    other = Teacher(ema(0.3), model)
    assert not torch.equal(logits(other, batch), logits(teacher, batch))
    other.own.load_state_dict(saved)
    assert torch.equal(logits(other, batch), logits(teacher, batch))
    other.update()
    assert all(torch.equal(w, saved[name]) for name, w in teacher.own.by_name.items())  # a copy, not the saved one


def test_the_state_of_another_kind_of_teacher_is_refused(make_model):
    frozen = Teacher(FROZEN, make_model())
    with pytest.raises(CheckpointError, match=r"holds 0 weights, this run's \(frozen\) \d+"):
        frozen.own.load_state_dict(Teacher(LIVE, make_model()).own.by_name)
