"""Samples to padded tensors: what is at which row, and how a step is cut."""

import math
import random
from dataclasses import replace

import pytest
import torch

from opd.errors import DataError
from opd.losses import CrossEntropy, Distill, Divergence, Losses
from opd.objective.collate import check_fed, collate, microbatches, normalise
from opd.types import Sample, TeacherView


def sample(prompt, completion, *, view=None, policy=0.0, advantage=0.0, distill=1.0, ce=0.0):
    """One turn: `prompt` ids, then `completion` ids; the teacher reads `view` in place of the prompt."""
    mask = [0] * len(prompt) + [1] * len(completion)
    return Sample(
        token_ids=prompt + completion,
        completion_mask=mask,
        turn=[0] * len(mask),
        sampler_logprobs=[-0.5 * i if m else math.nan for i, m in enumerate(mask)],
        policy_weight=[policy * m for m in mask],
        distill_weight=[distill * m for m in mask],
        ce_weight=[ce * m for m in mask],
        advantage=[advantage * m for m in mask],
        teacher_view=None
        if view is None
        else TeacherView(token_ids=view + completion, rows=[len(view) - 1 + i for i in range(len(completion))]),
    )


def test_a_batch_holds_the_sampled_tokens_of_its_sequences_on_one_flat_axis():
    batch = collate([sample([1, 2, 3], [7], view=[4]), sample([1], [8, 9], view=[5, 6, 5, 6])], pad_id=0)
    assert batch.input_ids.tolist() == [[1, 2, 3, 7], [1, 8, 9, 0]]
    assert batch.targets.tolist() == [7, 8, 9]
    assert batch.rows.tolist() == [2, 4, 5]
    assert batch.teacher_ids.tolist() == [[4, 7, 0, 0, 0, 0], [5, 6, 5, 6, 8, 9]]
    assert batch.teacher_rows.tolist() == [0, 9, 10]
    assert batch.sampler_logprobs.tolist() == [-1.5, -0.5, -1.0]
    assert batch.distill_weight.tolist() == [1, 1, 1]
    assert batch.lengths == [1, 2]


def test_the_row_before_each_target_is_the_one_that_predicts_it():
    batch = collate([sample([1, 2, 3], [7], view=[4]), sample([1], [8, 9], view=[5, 6, 5, 6])], pad_id=0)
    assert batch.input_ids.flatten()[batch.rows + 1].tolist() == batch.targets.tolist()
    assert batch.teacher_ids.flatten()[batch.teacher_rows + 1].tolist() == batch.targets.tolist()


def test_a_padding_id_that_is_also_an_end_of_turn_changes_no_row():
    one, two = sample([1, 2, 3], [7], view=[4]), sample([1], [7], view=[5])
    for pad in (0, 7):
        batch = collate([one, two], pad)
        assert batch.targets.tolist() == [7, 7]
        assert batch.rows.tolist() == [2, 4]


def test_without_views_there_is_no_teachers_side():
    batch = collate([sample([1], [2], ce=1.0)], pad_id=0)
    assert batch.teacher_ids is None
    assert batch.teacher_rows is None
    assert batch.ce_weight.tolist() == [1.0]


def test_a_sequence_in_which_nothing_was_sampled_adds_no_row():
    batch = collate([sample([1, 2], []), sample([1], [5])], pad_id=0)
    assert (batch.rows.tolist(), batch.targets.tolist(), batch.lengths) == ([2], [5], [0, 1])


def test_where_the_teacher_sees_only_some_samples_its_rows_say_which_tokens_they_are_of():
    samples = [sample([1], [2, 3]), sample([1], [4], view=[5, 6]), sample([1], [7]), sample([1], [8, 9], view=[5])]
    batch = collate(samples, pad_id=0)
    assert batch.taught.tolist() == [2, 4, 5]
    assert batch.teacher_ids.tolist() == [[5, 6, 4], [5, 8, 9]]
    assert batch.teacher_rows.tolist() == [1, 3, 4]
    assert batch.targets[batch.taught].tolist() == [4, 8, 9]
    assert collate(samples[1:2], pad_id=0).taught is None


def test_streams_that_were_computed_for_some_samples_only_are_refused():
    known = replace(sample([1], [2]), old_logprobs=[math.nan, -1.0])
    assert collate([known, known], pad_id=0).old_logprobs.tolist() == [-1.0, -1.0]
    with pytest.raises(ValueError, match="with and without old_logprobs"):
        collate([known, sample([1], [2])], pad_id=0)


def test_a_sequence_sum_divides_by_a_constant_and_by_the_number_of_sequences():
    samples = [sample([1], [2] * 3, view=[3]), sample([1], [2], view=[3])]
    scaled = normalise(samples, Losses(distill=DISTILL, reduction="sequence_sum", length=10.0), local)
    assert [s.distill_weight[1] for s in scaled] == pytest.approx([1 / 20, 1 / 20])


def test_views_count_where_they_are_and_not_where_there_are_none():
    without, within = sample([1] * 6, [2] * 4), sample([1] * 6, [2] * 4, view=[1] * 26)
    assert len(microbatches([without] * 4, 40)) == 1
    assert len(microbatches([within, *[without] * 3], 70)) == 1
    assert len(microbatches([within, *[without] * 3], 69)) == 2


def test_an_empty_micro_batch_is_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        collate([], pad_id=0)


def test_moving_a_batch_keeps_its_values():
    batch = collate([sample([1], [2], view=[3])], pad_id=0)
    moved = batch.to(torch.device("cpu"))
    assert moved.lengths == [1]
    assert torch.equal(moved.teacher_ids, batch.teacher_ids)


# -- cutting by a budget ------------------------------------------------------------------------------


def padded(samples, part):
    own = max(len(samples[i].token_ids) for i in part)
    views = max(len(samples[i].teacher_view.token_ids) if samples[i].teacher_view else 0 for i in part)
    return len(part) * (own + views)


@pytest.mark.parametrize("seed", range(5))
def test_micro_batches_hold_every_sample_once_and_stay_within_the_budget(seed):
    draw = random.Random(seed)
    samples = [sample([1] * draw.randint(1, 20), [2], view=[3] * draw.randint(1, 30)) for _ in range(40)]
    parts = microbatches(samples, 120)
    assert sorted(i for part in parts for i in part) == list(range(40))
    assert all(padded(samples, part) <= 120 for part in parts)
    assert len(parts) < 20


def test_sequences_of_like_length_share_a_micro_batch():
    samples = [sample([1] * n, [2]) for n in (9, 1, 9, 1, 9, 1)]
    assert microbatches(samples, 30) == [[0, 2, 4], [1, 3, 5]]


def test_a_short_sequence_with_a_long_view_is_counted_at_its_padded_width():
    # Cut after the second, since its wide view would widen the first.
    samples = [sample([1] * 9, [2], view=[3]), sample([1], [2], view=[3] * 20)]
    assert microbatches(samples, 12 + 31) == [[0], [1]]
    assert microbatches(samples, 2 * (10 + 21)) == [[0, 1]]


def test_a_sample_beyond_the_budget_goes_alone():
    samples = [sample([1] * 50, [2]), sample([1], [2]), sample([1], [2])]
    assert microbatches(samples, 10) == [[0], [1, 2]]


def test_no_samples_make_no_micro_batches():
    assert microbatches([], 100) == []


# -- denominators -------------------------------------------------------------------------------------

DISTILL, CE = Distill(divergence=Divergence("forward_kl")), CrossEntropy()


def local(sums):
    return sums


def total(samples, stream):
    return math.fsum(w for s in samples for w in getattr(s, stream))


def test_equal_weights_add_up_to_the_coefficient_whatever_the_reduction():
    samples = [sample([1], [2] * n, view=[3], ce=1.0) for n in (1, 4, 7)]
    for reduction in ("token_mean", "sequence_mean"):
        losses = Losses(distill=DISTILL, ce=CrossEntropy(coef=0.3), reduction=reduction)
        scaled = normalise(samples, losses, local)
        assert total(scaled, "distill_weight") == pytest.approx(1.0)
        assert total(scaled, "ce_weight") == pytest.approx(0.3)


def test_tokens_and_sequences_of_weight_zero_are_not_counted():
    samples = [sample([1], [2] * 3, view=[3], distill=0.0), sample([1], [2] * 2, view=[3], distill=0.5)]
    for reduction, expected in (("token_mean", [0.25, 0.25]), ("sequence_mean", [0.25, 0.25])):
        scaled = normalise(samples, Losses(distill=DISTILL, reduction=reduction), local)
        assert scaled[0].distill_weight == [0.0] * 4
        assert scaled[1].distill_weight[1:] == expected


def test_a_shared_denominator_counts_all_components():
    samples = [sample([1], [2] * 3, view=[3]), sample([1], [2] * 2, view=[3], distill=0.0, ce=1.0)]
    scaled = normalise(samples, Losses(distill=DISTILL, ce=CE, shared=True), local)
    assert scaled[0].distill_weight[1:] == pytest.approx([1 / 5] * 3)
    assert scaled[1].ce_weight[1:] == pytest.approx([1 / 5] * 2)
    apart = normalise(samples, Losses(distill=DISTILL, ce=CE), local)
    assert apart[0].distill_weight[1:] == pytest.approx([1 / 3] * 3)
    assert apart[1].ce_weight[1:] == pytest.approx([1 / 2] * 2)


def test_the_ratio_of_weights_survives():
    one = Sample(
        token_ids=[1, 2, 3],
        completion_mask=[0, 1, 1],
        turn=[0] * 3,
        sampler_logprobs=[math.nan, 0.0, 0.0],
        policy_weight=[0.0] * 3,
        distill_weight=[0.0, 3.0, -1.0],
        ce_weight=[0.0] * 3,
        advantage=[0.0] * 3,
        teacher_view=TeacherView(token_ids=[4, 2, 3], rows=[0, 1]),
    )
    [scaled] = normalise([one], Losses(distill=DISTILL), local)
    assert scaled.distill_weight == [0.0, 1.5, -0.5]


def test_denominators_are_taken_over_all_ranks():
    samples = [sample([1], [2] * 3, view=[3])]
    seen = []

    def all_sum(sums):
        seen.append(sums)
        return [10 * s for s in sums]

    [scaled] = normalise(samples, Losses(distill=DISTILL), all_sum)
    assert seen == [[0.0, 3.0, 0.0]]
    assert scaled.distill_weight[1:] == pytest.approx([1 / 30] * 3)


def test_a_rank_without_samples_still_takes_part_in_the_sum():
    seen = []
    assert normalise([], Losses(distill=DISTILL), lambda sums: seen.append(sums) or sums) == []
    assert seen == [[0.0, 0.0, 0.0]]


def test_a_distilled_token_that_no_teacher_sees_is_an_error():
    unseen = sample([1], [2])
    with pytest.raises(DataError, match="Mine makes samples whose distill_weight is non-zero, but no teacher sees"):
        check_fed([unseen], Losses(distill=DISTILL), of="Mine")
    known = replace(unseen, teacher_logprobs=[math.nan, -1.0])
    check_fed([known], Losses(distill=DISTILL), of="Mine")
    assert normalise([known], Losses(distill=DISTILL), local)[0].distill_weight == [0.0, 1.0]
