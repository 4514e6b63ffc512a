"""Drawing tokens from logits: the numbers that come with a draw, and how often each id is drawn."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.engines.base import Sampling
from opd.engines.transformers import sample, truncate

LOGITS = torch.tensor([[2.0, 0.5, 1.0, -1.0, 0.0]])


def grid(draws):
    """Numbers spread evenly over [0, 1)."""
    return [(n + 0.5) / draws for n in range(draws)]


def frequencies(logits, sampling, uniforms):
    ids, _ = sample(logits.expand(len(uniforms), -1), uniforms, sampling)
    return torch.bincount(torch.tensor(ids), minlength=logits.shape[-1]).double() / len(uniforms)


def test_each_id_takes_up_its_probability_of_the_unit_interval():
    for temperature in (0.5, 1.0, 2.0):
        seen = frequencies(LOGITS, Sampling(temperature=temperature), grid(20_000))
        torch.testing.assert_close(seen, (LOGITS[0].double() / temperature).softmax(-1), rtol=0, atol=1e-4)


def test_random_draws_pass_a_chi_square_test():
    generator = torch.Generator().manual_seed(0)
    uniforms = torch.rand(20_000, generator=generator, dtype=torch.float64).tolist()
    seen = frequencies(LOGITS, Sampling(temperature=1.0), uniforms)
    expected = LOGITS[0].double().softmax(-1)
    statistic = float(((seen - expected) ** 2 / expected).sum() * len(uniforms))
    assert statistic < 18.47  # the 99.9th percentile for 4 degrees of freedom


def test_a_logprob_is_that_of_the_tempered_distribution():
    ids, logprobs = sample(LOGITS.expand(50, -1), grid(50), Sampling(temperature=0.7))
    expected = (LOGITS[0].double() / 0.7).log_softmax(-1)
    assert logprobs == pytest.approx([expected[i].item() for i in ids], abs=1e-6)


def test_greedy_takes_the_likeliest_with_its_logprob_at_temperature_one():
    ids, logprobs = sample(LOGITS, [0.99], Sampling(temperature=0.0))
    assert ids == [0]
    assert logprobs == pytest.approx([LOGITS[0].log_softmax(-1)[0].item()])


def test_top_k_draws_among_the_k_likeliest_and_renormalises():
    seen = frequencies(LOGITS, Sampling(temperature=1.0, top_k=2), grid(20_000))
    kept = torch.tensor([2.0, -math.inf, 1.0, -math.inf, -math.inf], dtype=torch.float64)
    torch.testing.assert_close(seen, kept.softmax(-1), rtol=0, atol=1e-4)
    ids, logprobs = sample(LOGITS.expand(50, -1), grid(50), Sampling(temperature=1.0, top_k=2))
    assert set(ids) == {0, 2}
    assert logprobs == pytest.approx([kept.log_softmax(-1)[i].item() for i in ids], abs=1e-6)


def test_the_nucleus_is_the_smallest_set_that_holds_top_p():
    # Probabilities 0.56, 0.21, 0.13, ... : two ids hold 0.77, three 0.90.
    probs = LOGITS[0].double().softmax(-1)
    for top_p, size in ((0.1, 1), (0.7, 2), (0.76, 2), (0.85, 3), (0.9999, 5)):
        kept = truncate(LOGITS, top_p=top_p, top_k=0)[0].isfinite()
        assert int(kept.sum()) == size
        held = probs[kept].sum()
        assert held >= top_p
        assert held - probs[kept].min() < top_p
    ids, logprobs = sample(LOGITS.expand(50, -1), grid(50), Sampling(temperature=1.0, top_p=0.7))
    assert set(ids) == {0, 2}
    kept = probs / (probs[0] + probs[2])
    assert logprobs == pytest.approx([kept[i].log().item() for i in ids], abs=1e-6)


def test_the_nucleus_is_taken_at_the_sampling_temperature():
    hot = sample(LOGITS.expand(500, -1), grid(500), Sampling(temperature=5.0, top_p=0.7))[0]
    assert len(set(hot)) > 2


def test_no_truncation_leaves_the_logits_alone():
    assert truncate(LOGITS, top_p=1.0, top_k=0) is LOGITS
    assert truncate(LOGITS, top_p=1.0, top_k=5) is LOGITS
    assert truncate(LOGITS, top_p=1.0, top_k=99) is LOGITS


def test_a_row_draws_from_its_own_logits_and_number():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    uniforms = grid(6)
    together = sample(logits, uniforms, Sampling(temperature=1.0, top_p=0.9))
    alone = [sample(logits[i : i + 1], uniforms[i : i + 1], Sampling(temperature=1.0, top_p=0.9)) for i in range(6)]
    assert together == ([i for ids, _ in alone for i in ids], [p for _, ps in alone for p in ps])


def test_rare_ids_of_a_large_vocabulary_are_drawn_as_often_as_they_should_be():
    # The first id holds almost all; each of the others 2e-8, less than the spacing of float32 below 1.
    vocabulary = 50_000
    logits = torch.zeros(1, vocabulary)
    logits[0, 0] = math.log((1 - (vocabulary - 1) * 2e-8) / 2e-8)
    inside = [1 - (vocabulary - 1) * 2e-8 * (1 - n / 1000) + 1e-9 for n in range(1, 1000)]
    ids, _ = sample(logits.expand(len(inside), -1), inside, Sampling(temperature=1.0))
    assert ids == pytest.approx([1 + (vocabulary - 1) * n / 1000 for n in range(1, 1000)], abs=5)


@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.5, 1 - 2**-53, 1 - 2**-24, 2**-60]),
    st.sampled_from([1.0, 0.5, 1e-9]),
    st.integers(0, 3),
)
def test_whatever_the_number_the_id_is_possible_and_its_logprob_finite(row, uniform, top_p, top_k):
    logits = torch.tensor([row])
    [token], [logprob] = sample(logits, [uniform], Sampling(temperature=1.0, top_p=top_p, top_k=top_k))
    assert truncate(logits, top_p=top_p, top_k=top_k)[0, token] > -math.inf
    assert math.isfinite(logprob)


def test_an_id_of_probability_zero_is_never_drawn_at_either_end():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]])
    for uniform, token in ((0.0, 1), (0.5 - 1e-9, 1), (0.5, 3), (1 - 2**-53, 3)):
        assert sample(logits, [uniform], Sampling(temperature=1.0))[0] == [token]
