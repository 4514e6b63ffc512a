"""Confidence intervals for success rates: one rate, and the change of a rate on the same tasks.

Both are score intervals: they stay inside their range and keep their coverage for few tasks and for rates
near 0 and 1, where the textbook interval (plus or minus 1.96 standard errors) has width zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from opd.errors import DataError


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The score interval (low, high) of a success rate, in [0, 1]; z = 1.96 is 95% confidence.

    Raises DataError unless 0 <= successes <= n and n >= 1.
    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if n < 1 or not 0 <= successes <= n:
        raise DataError(f"a success rate needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    rate = successes / n
    middle = rate + z * z / (2 * n)
    reach = z * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    # The bounds at 0 and n are exactly 0 and 1; rounding would leave them a hair inside or outside.
    low = 0.0 if successes == 0 else (middle - reach) / scale
    high = 1.0 if successes == n else (middle + reach) / scale
    return low, high


def paired_difference(before: Sequence[bool], after: Sequence[bool], z: float = 1.96) -> tuple[float, float, float]:
    """The change (after - before) of the success rate on the same tasks, and its interval: (change, low, high).

    Entry i of both is task i, solved or not. Tasks that were solved both times, or neither, narrow the
    interval: this is what pairing buys over two separate intervals. All three lie in [-1, 1].

    Raises DataError when the two are empty or of different length.
    Source: R. G. Newcombe, Improved confidence intervals for the difference between binomial proportions
    based on paired data, Statistics in Medicine 17 (1998) 2635-2650, method 10: the two Wilson intervals,
    joined by their correlation phi, which is shrunk by a continuity correction when it is positive.
    """
    n = len(before)
    if n == 0 or len(after) != n:
        raise DataError(f"a paired difference needs the same tasks twice, got {n} before and {len(after)} after")
    pairs = [(bool(x), bool(y)) for x, y in zip(before, after, strict=True)]
    both, gained = pairs.count((True, True)), pairs.count((False, True))
    lost, neither = pairs.count((True, False)), pairs.count((False, False))

    rate_after, rate_before = (both + gained) / n, (both + lost) / n
    low_after, high_after = wilson(both + gained, n, z)
    low_before, high_before = wilson(both + lost, n, z)
    phi = _correlation(both, gained, lost, neither)

    change = (gained - lost) / n
    down = _joined_length(rate_after - low_after, high_before - rate_before, phi)
    up = _joined_length(high_after - rate_after, rate_before - low_before, phi)
    return change, change - down, change + up


def _correlation(both: int, gained: int, lost: int, neither: int) -> float:
    """Phi of the 2 x 2 table, shrunk towards 0 by half a pair when positive; 0 when a margin is empty."""
    margins = (both + gained) * (both + lost) * (neither + gained) * (neither + lost)
    if margins == 0:
        return 0.0
    product = float(both * neither - gained * lost)
    if product > 0:
        product = max(product - (both + gained + lost + neither) / 2, 0.0)
    return product / math.sqrt(margins)


def _joined_length(a: float, b: float, phi: float) -> float:
    """The length of the difference of two deviations with correlation phi."""
    return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))
