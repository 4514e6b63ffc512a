"""SDPO: who is taught, the step's denominator, and its equations in float64."""

from dataclasses import replace

import pytest
import torch

from opd.objective.collate import collate, normalise
from opd.objective.objective import objective
from opd.teachers.config import TeacherConfig
from opd.teachers.teacher import Teacher
from opd.trainers.sdpo import Sdpo, SdpoConfig


def test_every_episode_with_something_to_show_is_taught_and_the_others_count_for_nothing(make_chat, make_group):
    chat = make_chat()
    method = Sdpo(SdpoConfig(), chat)
    samples = [s for outcomes in ("RW", "RR", "WW", "R") for s in method.annotate(make_group(chat, outcomes))]
    assert [s.route for s in samples] == ["untaught", "distill", "distill", "distill", *["untaught"] * 3]
    scaled = normalise(samples, method.losses(method.config), lambda sums: sums)
    taught = [s for s in scaled if s.teacher_view]
    tokens = sum(len(s.rows) for s in taught)
    assert [set(s.distill_weight) - {0.0} for s in taught] == [{1 / tokens}] * 3
    assert sum(sum(s.distill_weight) for s in scaled) == pytest.approx(1.0)
    assert [s.zero_signal for s in samples] == [s.route == "untaught" for s in samples]


def setup(make_chat, make_model, make_group, **config):
    chat, model = make_chat(), make_model(dtype=torch.float64)
    teacher = Teacher(TeacherConfig(weights="frozen"), model)
    with torch.no_grad():
        for n, p in enumerate(model.parameters()):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n), dtype=p.dtype)
    method = Sdpo(SdpoConfig(**config), chat)
    draw, samples = torch.Generator().manual_seed(3), []
    for sample in method.annotate(make_group(chat, "RWRW")):
        own, _ = sides(model, model, replace(sample, teacher_view=None))
        near = taken(own, sample).detach() + 0.4 * torch.randn(len(sample.rows), generator=draw)
        samples.append(replace(sample, old_logprobs=sample.spread(near.tolist())))
    return method, model, teacher, samples


def sides(model, initial, s):
    """Log-probs of student and teacher at the sampled tokens: [N, V] each."""
    own = model.model(input_ids=torch.tensor([s.token_ids])).logits[0][s.rows].log_softmax(-1)
    if s.teacher_view is None:
        return own, None
    with torch.no_grad():
        logits = initial.model(input_ids=torch.tensor([s.teacher_view.token_ids])).logits[0][s.teacher_view.rows]
    return own, logits.log_softmax(-1)


def taken(logprobs, s):
    return logprobs.gather(-1, torch.tensor(s.completion_ids)[:, None]).squeeze(-1)


def jsd(own, theirs):
    mix = ((own.exp() + theirs.exp()) / 2).log()
    return ((own.exp() * (own - mix)).sum(-1) + (theirs.exp() * (theirs - mix)).sum(-1)) / 2


def with_tail(own, theirs, k):
    """Both sides on the student's likeliest k entries, and the rest as one more (equation 11)."""
    ids = own.detach().topk(k).indices
    return [
        torch.cat([x.gather(-1, ids), (1 - x.exp().gather(-1, ids).sum(-1, keepdim=True)).log()], -1)
        for x in (own, theirs)
    ]


def renormalised(own, theirs, k):
    ids = own.detach().topk(k).indices
    return [x.gather(-1, ids).log_softmax(-1) for x in (own, theirs)]


def reverse(own, theirs):
    return (own.exp() * (own - theirs)).sum(-1)


FORMS = {
    "full": ({"divergence": {"top_k": None}}, lambda own, theirs, s: jsd(own, theirs)),
    "top k with tail": ({"divergence": {"top_k": 9}}, lambda own, theirs, s: jsd(*with_tail(own, theirs, 9))),
    "top k renormalised": (
        {"divergence": {"top_k": 9, "tail": False}},
        lambda own, theirs, s: jsd(*renormalised(own, theirs, 9)),
    ),
    "reverse, top k": (
        {"divergence": {"kind": "reverse_kl", "top_k": 9}},
        lambda own, theirs, s: reverse(*with_tail(own, theirs, 9)),
    ),
    "sampled": (
        {"form": "sampled"},
        lambda own, theirs, s: (taken(own, s) - taken(theirs, s)).detach() * taken(own, s),
    ),
    "sampled, less the full baseline": (
        {"form": "sampled", "baseline": "full"},
        lambda own, theirs, s: (taken(own, s) - taken(theirs, s) - reverse(own, theirs)).detach() * taken(own, s),
    ),
    "sampled, less the top-k baseline": (
        {"form": "sampled", "baseline": "top_k", "baseline_top_k": 9},
        lambda own, theirs, s: (
            (taken(own, s) - taken(theirs, s) - reverse(*renormalised(own, theirs, 9))).detach() * taken(own, s)
        ),
    ),
}


@pytest.mark.parametrize("share", [0.0, 0.9])
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_the_papers_in_each_of_its_forms(make_chat, make_model, make_group, form, share):
    """The mean over taught tokens of (ratio at most 2) times the divergence; with a share, equation 3."""
    settings, divergence = FORMS[form]
    method, model, teacher, samples = setup(make_chat, make_model, make_group, policy_share=share, **settings)
    batch = collate(normalise(samples, method.losses(method.config), lambda sums: sums), 0)
    result = objective(model, batch, method.losses(method.config), teacher.teach(batch))
    result.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    initial, values, surrogate = make_model(dtype=torch.float64), [], []
    for s in samples:
        own, theirs = sides(model, initial, s)
        ratio = (taken(own, s) - torch.tensor([x for x in s.old_logprobs if x == x])).exp()
        values.append(divergence(own, theirs, s) * ratio.detach().clamp(max=2))
        advantage = (1 if s.success else -1) * 0.5 / (0.57735026919 + 1e-6)  # of two right and two wrong episodes
        surrogate.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
    expected = (1 - share) * torch.cat(values).mean() + share * torch.cat(surrogate).mean()
    expected.backward()
    if form != "sampled" and "less" not in form:
        assert result.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-7)


def test_settings_of_a_policy_gradient_without_a_share_are_refused():
    with pytest.raises(ValueError, match=r"policy\s+is used with policy_share alone; set policy_share"):
        SdpoConfig(policy={"scale": "none"})


def test_a_share_of_the_policy_gradient_also_trains_what_nobody_teaches(make_chat, make_group):
    chat = make_chat()
    method = Sdpo(SdpoConfig(policy_share=0.9, policy={"scale": "none"}), chat)
    right, wrong = method.annotate(make_group(chat, "RW"))
    assert (right.route, max(right.advantage), set(right.policy_weight)) == ("untaught", 0.5, {0.0, 1.0})
    assert (wrong.route, min(wrong.advantage), set(wrong.policy_weight)) == ("distill", -0.5, {0.0, 1.0})
