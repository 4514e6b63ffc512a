"""Intervals against published values, and the identities that they must keep."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import DataError
from opd.tracking.intervals import paired_difference, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # The examples of R. G. Newcombe, Two-sided confidence intervals for the single proportion, Stat. Med. 17 (1998).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_the_published_examples(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


COUNTS = [(successes, n) for n in (1, 2, 3, 10, 37, 300) for successes in range(n + 1)]


def test_wilson_is_where_the_score_test_no_longer_rejects():
    for successes, n in COUNTS:
        for bound in wilson(successes, n, z=1.96):
            # At the bound p, |rate - p| is exactly z standard errors of p.
            assert (successes / n - bound) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / n, abs=1e-12)


def test_wilson_is_exact_at_the_ends():
    for n in range(1, 200):
        assert wilson(0, n)[0] == 0.0
        assert wilson(n, n)[1] == 1.0


def test_wilson_of_failures_mirrors_wilson_of_successes():
    for successes, n in COUNTS:
        low, high = wilson(successes, n)
        assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(DataError, match=f"got {successes} of {n}"):
        wilson(successes, n)


def outcomes(both: int, gained: int, lost: int, neither: int) -> tuple[list[bool], list[bool]]:
    before = [True] * both + [False] * gained + [True] * lost + [False] * neither
    after = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return before, after


@pytest.mark.parametrize(
    ("counts", "change", "low", "high"),
    [
        # An example of Newcombe 1998 (2635-2650), method 10.
        ((36, 12, 2, 0), 0.2, 0.0569, 0.3404),
        # Airway data of Bentur et al. 2009, an example of Fagerland, Lydersen and Laake, Stat. Med. 33 (2014).
        ((1, 1, 7, 12), -0.2857, -0.507, -0.026),
    ],
)
def test_the_paired_interval_equals_the_published_examples(counts, change, low, high):
    assert paired_difference(*outcomes(*counts)) == pytest.approx((change, low, high), abs=5e-4)


tables = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(tables)
def test_swapping_before_and_after_mirrors_the_paired_interval(pairs):
    before, after = [x for x, _ in pairs], [y for _, y in pairs]
    change, low, high = paired_difference(before, after)
    assert paired_difference(after, before) == pytest.approx((-change, -high, -low), abs=1e-12)


@given(tables)
def test_the_paired_interval_holds_the_change_and_stays_in_range(pairs):
    change, low, high = paired_difference([x for x, _ in pairs], [y for _, y in pairs])
    assert -1 - 1e-12 <= low <= change <= high <= 1 + 1e-12


def test_pairing_narrows_the_interval_when_the_same_tasks_are_solved():
    # The same rates, 50% and 60% of 100, by tasks that agree and by tasks that do not.
    _, low, high = paired_difference(*outcomes(50, 10, 0, 40))
    _, unpaired_low, unpaired_high = paired_difference(*outcomes(30, 30, 20, 20))
    assert high - low < 0.7 * (unpaired_high - unpaired_low)


@pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
def test_a_paired_interval_needs_the_same_tasks_twice(before, after):
    with pytest.raises(DataError, match=f"got {len(before)} before and {len(after)} after"):
        paired_difference(before, after)
