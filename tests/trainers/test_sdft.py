"""SDFT beside OPSD: the same view of the teacher, without the first tokens of an episode."""

from dataclasses import replace

import pytest

from opd.losses import Distill, Divergence
from opd.teachers.config import TeacherConfig
from opd.trainers.opsd import Opsd, OpsdConfig
from opd.trainers.sdft import Sdft, SdftConfig
from opd.types import TrajectoryGroup


def group_of(episode):
    return TrajectoryGroup(task=episode.task, trajectories=[replace(episode, privileged={"solution": "look twice"})])


@pytest.mark.parametrize("skip", [0, 1, 3, 10_000])
def test_the_first_sampled_tokens_of_a_sequence_are_not_distilled_and_all_else_is_opsd(make_chat, make_episode, skip):
    chat = make_chat()
    asked, answered = [{"role": "user", "content": "how?"}], [{"role": "user", "content": "and now?"}]
    group = group_of(make_episode(chat, (asked, "so it is", None), (answered, "done", None)))
    [plain] = Opsd(OpsdConfig(), chat).annotate(group)
    [sample] = Sdft(SdftConfig(skip=skip), chat).annotate(group)
    assert sample.teacher_view == plain.teacher_view
    assert sample.token_ids == plain.token_ids
    sampled = [weight for weight, mask in zip(sample.distill_weight, sample.completion_mask, strict=True) if mask]
    assert sampled == [0.0 if n < skip else 1.0 for n in range(len(sampled))]


def test_an_average_teaches_by_the_forward_kl_and_each_sequence_counts_alike():
    config = SdftConfig()
    losses = Sdft.losses(config)
    assert losses.distill == Distill(divergence=Divergence("forward_kl"))
    assert losses.reduction == "sequence_mean"
    assert Sdft.teacher(config) == TeacherConfig(weights="ema", rate=0.02)
    assert Sdft.losses(SdftConfig(divergence={"kind": "reverse_kl"})).distill.divergence.kind == "reverse_kl"
