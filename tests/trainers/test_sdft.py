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


def sampled(sample, stream):
    return [value for value, mask in zip(stream, sample.completion_mask, strict=True) if mask]


@pytest.mark.parametrize("skip", [0, 1, 3, 10_000])
def test_the_first_tokens_of_the_first_answer_are_not_distilled_and_all_else_is_opsd(make_chat, make_episode, skip):
    chat = make_chat()
    asked, answered = [{"role": "user", "content": "how?"}], [{"role": "user", "content": "and now?"}]
    group = group_of(make_episode(chat, (asked, "so it is", None), (answered, "done", None)))
    [plain] = Opsd(OpsdConfig(), chat).annotate(group)
    [sample] = Sdft(SdftConfig(skip=skip), chat).annotate(group)
    assert sample.teacher_view == plain.teacher_view
    assert sample.token_ids == plain.token_ids
    first = len(group.trajectories[0].turns[0].completion_ids)
    weights = sampled(sample, sample.distill_weight)
    assert 3 < first < len(weights)
    assert weights == [0.0 if n < min(skip, first) else 1.0 for n in range(len(weights))]


def test_a_later_answer_is_distilled_whole_also_where_it_begins_a_sequence_of_its_own(make_chat, make_episode):
    chat = make_chat("forgetful", on_rewrite="fork")
    turns = [([{"role": "user", "content": "how?"}], f"<think>so</think>{n}", None) for n in "ab"]
    first, second = Sdft(SdftConfig(skip=2), chat).annotate(group_of(make_episode(chat, *turns)))
    assert set(second.turn) == {1}
    assert sampled(first, first.distill_weight)[:3] == [0.0, 0.0, 1.0]
    assert set(sampled(second, second.distill_weight)) == {1.0}


def test_a_rate_alone_is_that_of_the_average_that_teaches_by_default():
    assert SdftConfig(teacher={"rate": 0.1}).teacher == TeacherConfig(weights="ema", rate=0.1)
    assert SdftConfig(teacher={}).teacher == SdftConfig().teacher
    assert SdftConfig(teacher={"weights": "live"}).teacher == TeacherConfig(weights="live")
    with pytest.raises(ValueError, match="is used by weights = ema or trust_region alone"):
        OpsdConfig(teacher={"rate": 0.1})


def test_an_average_teaches_by_the_forward_kl_and_each_sequence_counts_alike():
    config = SdftConfig()
    losses = Sdft.losses(config)
    assert losses.distill == Distill(divergence=Divergence("forward_kl"))
    assert losses.reduction == "sequence_mean"
    assert Sdft.teacher(config) == TeacherConfig(weights="ema", rate=0.02)
    assert Sdft.losses(SdftConfig(divergence={"kind": "reverse_kl"})).distill.divergence.kind == "reverse_kl"
