"""How far a student's next-token distribution is from a teacher's: exact values and exact gradients.

`token_divergence` reads logits; `chunked_divergence` reads hidden states and never holds `[N, V]` logits.
Both return nats. The gradient reaches the student alone. Who the teacher is, which tokens count and what
the sum is divided by is decided elsewhere (`opd.objective`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from opd.head import (
    Head,
)

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
"""`forward_kl` is KL(teacher || student), `reverse_kl` is KL(student || teacher), `jsd` lies between."""

CACHE_BYTES = 2 * 2**20
"""On a CPU, the rows of a tile of logits that are worked on at once: a few of this size fit in the cache."""


class WeightedDivergence(NamedTuple):
    """What a training step needs of a divergence: the sum that trains, and the values to log."""

    total: Tensor
    """Scalar: the sum of weights times values. The only part with a gradient."""
    per_token: Tensor
    """[N] nats."""
    clipped: Tensor
    """[N] share of the vocabulary's entries that `clip` cut; zeros without it."""


def chunked_divergence(
    student_hidden: Tensor,
    student_head: Head | Tensor,
    teacher_hidden: Tensor,
    teacher_head: Head | Tensor,
    kind: Kind,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    weights: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """The full-vocabulary divergence of `token_divergence`, from hidden states `[N, H]` and `[N, H']`.

    Without `weights`, per-token values `[N]`, and the backward pass projects again. With `weights` `[N]`
    (no gradient), the scalar `sum(weights * values)`: the gradients are taken while a tile is at hand,
    which costs no more products than the dense form; see `weighted_divergence` for values to log.

    A head is a weight `[V, H]` or a `Head`. Gradients reach the student's hidden states, weight and bias
    where they require them, never the teacher. Computed in float32, or in float64 if an input is.

    Args:
        beta: for `jsd` alone; 0 and 1 select the forward and the reverse KL themselves.
        temperature: divides the logits of both sides.
        chunk_size: tokens in a tile; by default as many as make a tile of `opd.head.TILE_BYTES`.
        clip: bound from above on each vocabulary entry's summand before the sum over the vocabulary
            (OPSD's point-wise clip). The value may then be negative.

    Raises:
        ConfigError: an unknown kind, or an option outside its range.
        DataError: shapes or vocabularies that do not match.
    """
    inputs = _checked(
        student_hidden, student_head, teacher_hidden, teacher_head, kind, beta, temperature, chunk_size, clip
    )
    if weights is not None:
        return _weighted(inputs, weights)[0]
    return _per_token(inputs)
