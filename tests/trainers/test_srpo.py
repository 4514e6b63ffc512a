"""SRPO's routing table, its equation in float64, and what it becomes where nothing is routed or nothing weighed."""

import math
from dataclasses import replace

import pytest
import torch

from opd.objective.collate import collate, normalise
from opd.objective.objective import objective
from opd.teachers.config import TeacherConfig
from opd.teachers.teacher import Teacher
from opd.trainers.grpo import Grpo, GrpoConfig
from opd.trainers.srpo import Srpo, SrpoConfig

R, Z = math.sqrt(0.5) / (1 + 1e-6 / math.sqrt(0.5)), 0.0  # advantages of a right and a wrong episode in "RW"; of equals
ROUTES = {
    # outcomes: (route, advantage) of each episode that the environment did not break
    "R": [("policy", Z)],
    "W": [("policy", Z)],
    "RR": [("policy", Z), ("policy", Z)],
    "WW": [("policy", Z), ("policy", Z)],
    "RW": [("policy", R), ("distill", None)],
    "WR": [("distill", None), ("policy", R)],
    "WF": [("policy", Z)],
    "FWR": [("distill", None), ("policy", R)],
}


@pytest.mark.parametrize("outcomes", ROUTES)
def test_the_routing_table(make_chat, make_group, outcomes):
    chat = make_chat()
    samples = Srpo(SrpoConfig(), chat).annotate(make_group(chat, outcomes))
    assert [s.route for s in samples] == [route for route, _ in ROUTES[outcomes]]
    for sample, (route, advantage) in zip(samples, ROUTES[outcomes], strict=True):
        sampled = [float(m) for m in sample.completion_mask]
        nothing = [0.0] * len(sampled)
        if route == "policy":
            assert (sample.policy_weight, sample.distill_weight, sample.teacher_view) == (sampled, nothing, None)
            assert sample.advantage == pytest.approx([m * advantage for m in sampled])
            assert sample.zero_signal == (advantage == 0)
        else:
            assert (sample.policy_weight, sample.distill_weight) == (nothing, sampled)
            assert "R says" in chat.tokenizer.decode(sample.teacher_view.token_ids)
            assert sample.teacher_view.shows == ("demonstration",)


def test_advantages_compare_the_whole_group_with_what_is_distilled_in_it(make_chat, make_group):
    chat = make_chat()
    group = make_group(chat, "RWRW", rewards=[1.0, 0.0, 0.6, 0.0])
    first, _, third, _ = Srpo(SrpoConfig(policy={"scale": "none"}), chat).annotate(group)
    assert [max(s.advantage) for s in (first, third)] == pytest.approx([0.6, 0.2])


def test_right_and_wrong_can_follow_from_the_reward(make_chat, make_group):
    chat = make_chat()
    group = make_group(chat, "WWW", rewards=[0.5, 0.49, 0.9])
    samples = Srpo(SrpoConfig(right_from=0.5), chat).annotate(group)
    assert [s.route for s in samples] == ["policy", "distill", "policy"]


def test_a_wrong_episode_with_feedback_but_no_right_sibling_is_left_to_its_reward(make_chat, make_episode, make_group):
    chat = make_chat()
    said = make_episode(chat, ([{"role": "user", "content": "the task"}], "no", "it is not no"))
    group = replace(make_group(chat, "W"), trajectories=[said])
    [sample] = Srpo(SrpoConfig(), chat).annotate(group)
    assert (sample.route, sample.zero_signal) == ("policy", True)


def test_a_wrong_episode_whose_teacher_would_read_too_much_is_left_to_its_reward(make_chat, make_group):
    chat = make_chat()
    right, wrong = Srpo(SrpoConfig(max_teacher_tokens=20), chat).annotate(make_group(chat, "RW"))
    assert (right.route, wrong.route) == ("policy", "too_long")
    assert set(wrong.policy_weight) == {0.0, 1.0}
    assert min(wrong.advantage) == pytest.approx(-R)


def scored(samples, teacher):
    """The samples with the entropy of the teacher's whole distribution, as the loop asks for it."""
    known = []
    for s in samples:
        if s.teacher_view is None:
            known.append(s)
            continue
        taught = teacher.teach(collate([s], 0))
        logprobs = (taught.hidden @ taught.head.weight.T).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        known.append(replace(s, teacher_entropy=s.spread(entropy.tolist())))
    return known


def setup(make_chat, make_model, make_group, *outcomes, **config):
    """A method, a student that has moved since the rollouts and the initial teacher, and samples of some groups."""
    chat = make_chat()
    teacher = Teacher(TeacherConfig(weights="frozen"), model := make_model(dtype=torch.float64))
    with torch.no_grad():
        for n, p in enumerate(model.parameters()):
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(n), dtype=p.dtype)
    method = Srpo(SrpoConfig(**config), chat)
    samples = [s for o in outcomes for s in method.annotate(make_group(chat, o))]
    draw = torch.Generator().manual_seed(3)
    samples = [  # log-probs of the old policy, near the student's own, so that some ratios are clipped
        replace(s, old_logprobs=s.spread((own + 0.4 * torch.randn(len(own), generator=draw)).tolist()))
        for s in samples
        for own in [logprobs_of(model, s).detach()]
    ]
    return method, model, teacher, scored(samples, teacher)


def logits_of(model, ids, rows):
    return model.model(input_ids=torch.tensor([ids])).logits[0][rows]


def logprobs_of(model, s):
    own = logits_of(model, s.token_ids, s.rows).log_softmax(-1)
    return own.gather(-1, torch.tensor(s.completion_ids)[:, None]).squeeze(-1)


def trained(method, model, teacher, samples):
    """The loss of the step, and its gradients, by the code under test."""
    scaled = normalise(method.weigh(samples, lambda sums: sums), method.losses(method.config), lambda sums: sums)
    model.zero_grad()
    batch = collate(scaled, 0)
    result = objective(
        model, batch, method.losses(method.config), teacher.teach(batch) if batch.teacher_ids is not None else None
    )
    result.loss.backward()
    return result.loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("beta", [1.0, 0.0, 2.5])
def test_the_loss_is_the_papers_equation(make_chat, make_model, make_group, beta):
    """L = [sum over GRPO tokens of the surrogate + sum over SDPO tokens of w * JSD] / (tokens of both), w of mean 1."""
    method, model, teacher, samples = setup(
        make_chat, make_model, make_group, "RWW", "WWRR", "WW", entropy_beta=beta, divergence={"top_k": None}
    )
    loss, gradients = trained(method, model, teacher, samples)
    old = teacher.own.by_name
    initial = make_model(dtype=torch.float64)
    assert all(torch.equal(p, old[name]) for name, p in initial.named_parameters())

    model.zero_grad()
    surrogate, divergences, entropies = [], [], []
    for s in samples:
        own = logits_of(model, s.token_ids, s.rows).log_softmax(-1)
        ratio = (logprobs_of(model, s) - torch.tensor([x for x in s.old_logprobs if x == x])).exp()
        if s.route == "policy":
            advantage = s.advantage[s.rows[0] + 1]
            surrogate.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage))
            continue
        with torch.no_grad():
            theirs = logits_of(initial, s.teacher_view.token_ids, s.teacher_view.rows).log_softmax(-1)
        mix = (0.5 * own.exp() + 0.5 * theirs.exp()).log()
        kl = [(x.exp() * (x - mix)).sum(-1) for x in (own, theirs)]
        divergences.append((kl[0] + kl[1]) / 2 * ratio.detach().clamp(max=2))
        entropies.append(-(theirs.exp() * theirs).sum(-1))
    surrogate, divergences, entropies = (torch.cat(x) for x in (surrogate, divergences, entropies))
    weights = (-beta * entropies).exp() / (-beta * entropies).exp().mean()
    expected = (surrogate.sum() + (weights * divergences).sum()) / (len(surrogate) + len(divergences))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-7)


def test_beta_zero_gives_uniform_weights_and_asks_the_teacher_only_once(make_chat, make_model, make_group):
    method, _, _, samples = setup(make_chat, make_model, make_group, "RWW", entropy_beta=0.0)
    assert not method.needs_scores(method.config)
    assert method.weigh(samples, lambda sums: sums) == samples
    weighed, _, _, _ = setup(make_chat, make_model, make_group, "RWW")
    assert weighed.needs_scores(weighed.config)
    one, two = [
        [w for s in m.weigh(samples, lambda sums: sums) for w in s.distill_weight if w] for m in (method, weighed)
    ]
    assert set(one) == {1.0}
    assert len(set(two)) > 1
    assert sum(two) / len(two) == pytest.approx(1.0)


def test_the_weights_are_those_of_all_ranks_together(make_chat, make_model, make_group):
    """Two ranks, the second of which has only successes, and then one that has something to distil as well."""
    for outcomes in (("RWW", "RR"), ("RWW", "WRWW")):
        method, _, _, samples = setup(make_chat, make_model, make_group, *outcomes)
        whole = method.weigh(samples, lambda sums: sums)
        cut = len(outcomes[0])
        parts, told = (samples[:cut], samples[cut:]), []
        for part in parts:
            method.weigh(part, lambda sums, told=told: told.append(sums) or sums)
        together = [sum(column) for column in zip(*told, strict=True)]
        ranks = [s for part in parts for s in method.weigh(part, lambda sums, total=together: total)]
        own, expected = ([w for s in some for w in s.distill_weight] for some in (ranks, whole))
        assert own == pytest.approx(expected)
        assert len(set(expected)) > 2


def test_without_a_routed_sample_it_is_the_clipped_policy_gradient_to_the_bit(make_chat, make_model, make_group):
    def both(rewards, outcomes):
        _, model, teacher, _ = setup(make_chat, make_model, make_group)
        chat = make_chat()
        group = make_group(chat, outcomes, rewards=rewards)
        results = []
        for one in (Srpo(SrpoConfig(), chat), Grpo(GrpoConfig(clip_high=0.28), chat)):
            samples = one.annotate(group)
            old = [replace(s, old_logprobs=s.spread([-5.0 + 0.1 * n for n in range(len(s.rows))])) for s in samples]
            results.append(trained(one, model, teacher, scored(old, teacher)))
        return results

    for rewards, outcomes in (([0.1, 0.4, 0.2], "WWW"), ([1.0, 0.7, 0.9], "RRR")):
        (loss, gradients), (plain, expected) = both(rewards, outcomes)
        assert loss == plain != 0
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)
        assert any(g.any() for g in gradients.values())
    (loss, _), (plain, _) = both([1.0, 0.0, 0.0], "RWW")
    assert loss != plain
