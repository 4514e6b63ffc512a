"""Identities of the divergences on logits, in float64 over enumerated vocabularies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from opd.errors import ConfigError, DataError
from opd.losses import Divergence
from opd.maths.divergence import chunked_divergence, stored_divergence, token_divergence, weighted_divergence
from opd.maths.formulas import formula_of, kinds, with_beta

V = 8
NOT = -torch.inf


def cases() -> list[tuple[str, float | None]]:
    """Every divergence of the table: as it is by itself, at other values of its beta, and at the ends that differ."""
    found: list[tuple[str, float | None]] = [(kind, None) for kind in kinds()]
    for kind in with_beta():
        found += [(kind, beta) for beta in (0.1, 0.3)]
        found += [(kind, end) for end in (0.0, 1.0) if formula_of(kind).at(end).name != kind]
    return found


KINDS = cases()
every_kind = pytest.mark.parametrize(("kind", "beta"), KINDS)


def pair(positions: int = 4, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student logits, which want a gradient, and teacher logits: [positions, V]."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, positions, V, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def gradient(values: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(values.sum(), student)[0]


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def exactly(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    assert_close(actual, expected, rtol=0, atol=atol)


# What each divergence of the table is, of probabilities of the student (p), of the teacher (q), and its beta.
REFERENCE: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": lambda p, q, beta: kl(q, p),
    "reverse_kl": lambda p, q, beta: kl(p, q),
    "jsd": lambda p, q, beta: beta * kl(q, beta * q + (1 - beta) * p) + (1 - beta) * kl(p, beta * q + (1 - beta) * p),
    "skew_kl": lambda p, q, beta: kl(q, beta * q + (1 - beta) * p),
    "mixed_kl": lambda p, q, beta: (1 - beta) * kl(q, p) + beta * kl(p, q),
}


def reference(divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """The divergence of logits by its formula in the table above, dense, for autograd to differentiate."""
    p, q = (side.div(divergence.temperature).softmax(-1) for side in (student, teacher))
    if divergence.top_k is not None:
        ids = (q if divergence.support == "teacher" else p.detach()).topk(divergence.top_k).indices
        p, q = (_kept(side, ids, tail=divergence.tail) for side in (p, q))
    return REFERENCE[divergence.formula.name](p, q, divergence.beta)


def _kept(side: Tensor, ids: Tensor, *, tail: bool) -> Tensor:
    kept = side.gather(-1, ids)
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1) if tail else kept / kept.sum(-1, keepdim=True)


def _stored(student: Tensor, head: Tensor, teacher: Tensor, divergence: Divergence, weights: Tensor) -> Tensor:
    top = (teacher / divergence.temperature).log_softmax(-1).topk(divergence.top_k)
    return stored_divergence(student, head, top.indices, top.values, divergence, weights=weights, chunk_size=3).total


FORMS: dict[str, Callable[..., Tensor]] = {
    "token": lambda student, head, teacher, divergence, weights: (
        token_divergence(student, teacher, divergence) @ weights
    ),
    "chunked": lambda student, head, teacher, divergence, weights: (
        chunked_divergence(student, head, teacher, head, divergence, chunk_size=3) @ weights
    ),
    "weighted": lambda student, head, teacher, divergence, weights: (
        weighted_divergence(student, head, teacher, head, divergence, weights=weights, chunk_size=3).total
    ),
    "stored": _stored,
}
"""The sum of weights times values, of logits [N, V] that pass as hidden states before the identity as a head."""
TEACHERS_TOP = [{"top_k": 3}, {"top_k": 3, "tail": False}]
"""What a store can hold."""
RESTRICTED = [{}, *TEACHERS_TOP, {"top_k": 3, "support": "student"}]


@pytest.mark.parametrize(
    ("form", "restrict"),
    [
        pytest.param(form, restrict, id=f"{form}-{restrict}")
        for form in FORMS
        for restrict in (RESTRICTED if form != "stored" else TEACHERS_TOP)
    ],
)
@every_kind
def test_every_divergence_in_every_form_has_the_value_and_gradient_of_its_formula(kind, beta, restrict, form):
    divergence = Divergence(kind, beta=beta, temperature=1.3, **restrict)
    student, teacher = pair()
    weights = torch.tensor([0.5, -1.0, 0.0, 2.0], dtype=torch.float64)
    found = FORMS[form](student, torch.eye(V, dtype=torch.float64), teacher, divergence, weights)
    expected = reference(divergence, student, teacher) @ weights
    exactly(found, expected, atol=1e-12)
    exactly(gradient(found, student), gradient(expected, student), atol=1e-12)


def test_every_divergence_of_the_table_has_a_reference():
    assert set(REFERENCE) == set(kinds())


def test_no_two_divergences_have_the_same_values():
    student, teacher = pair()
    values = [tuple(token_divergence(student, teacher, Divergence(kind)).tolist()) for kind in kinds()]
    assert len(set(values)) == len(values)


def test_forward_kl_is_teacher_over_student_and_reverse_the_other_way():
    student, teacher = pair()
    p, q = student.detach().softmax(-1), teacher.softmax(-1)
    exactly(token_divergence(student, teacher, Divergence("forward_kl")), kl(q, p))
    exactly(token_divergence(student, teacher, Divergence("reverse_kl")), kl(p, q))


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_weighs_the_teacher_by_beta_in_the_mixture_and_in_the_sum(beta):
    student, teacher = pair()
    p, q = student.detach().softmax(-1), teacher.softmax(-1)
    mix = beta * q + (1 - beta) * p
    exactly(
        token_divergence(student, teacher, Divergence("jsd", beta=beta)), beta * kl(q, mix) + (1 - beta) * kl(p, mix)
    )


def test_the_ends_of_jsd_are_the_two_kls():
    student, teacher = pair()
    for beta, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        end = token_divergence(student, teacher, Divergence("jsd", beta=beta))
        named = token_divergence(student, teacher, Divergence(kind))
        exactly(end, named, atol=0)
        exactly(gradient(end, student), gradient(named, student), atol=0)


@pytest.mark.parametrize("top_k", [None, 3])
def test_mixed_kl_is_beta_of_the_reverse_and_the_rest_of_the_forward_kl(top_k):
    student, teacher = pair()
    restrict = {"top_k": top_k, "tail": top_k is None}

    def of(kind, **beta):
        values = token_divergence(student, teacher, Divergence(kind, **beta, **restrict))
        return values, gradient(values, student)

    (mixed, slope), (forward, pulls), (reverse, pushes) = (of("mixed_kl", beta=0.3), of("forward_kl"), of("reverse_kl"))
    exactly(mixed, 0.7 * forward + 0.3 * reverse)
    exactly(slope, 0.7 * pulls + 0.3 * pushes)
    exactly(of("mixed_kl", beta=0.0)[0], forward, atol=0)
    exactly(of("mixed_kl", beta=1.0)[0], reverse, atol=0)


@pytest.mark.parametrize(("kind", "toward"), [("forward_kl", 0.0), ("reverse_kl", 1.0)])
def test_jsd_over_its_distance_from_an_end_tends_to_the_kl_with_an_error_in_proportion(kind, toward):
    student, teacher = pair(scale=0.7)
    limit = token_divergence(student, teacher, Divergence(kind))
    errors = []
    for distance in (1e-3, 1e-4, 1e-5):
        values = token_divergence(student, teacher, Divergence("jsd", beta=abs(toward - distance))) / distance
        errors.append(((values - limit).abs().max() / distance).item())
    assert errors[0] > 0.01
    assert errors == pytest.approx([errors[-1]] * 3, rel=0.1)


def test_jsd_is_symmetric_at_one_half():
    student, teacher = pair()
    exactly(
        token_divergence(student, teacher, Divergence("jsd")), token_divergence(teacher, student, Divergence("jsd"))
    )
    there, back = (
        token_divergence(*sides, Divergence("jsd", beta=0.3)) for sides in ((student, teacher), (teacher, student))
    )
    assert (there - back).abs().min() > 1e-3


@every_kind
@pytest.mark.parametrize("top_k", [None, 3])
def test_a_teacher_equal_to_the_student_gives_zero_value_and_gradient(kind, beta, top_k):
    student, _ = pair()
    values = token_divergence(student, student, Divergence(kind, beta=beta, top_k=top_k))
    exactly(values, torch.zeros_like(values), atol=1e-15)
    exactly(gradient(values, student), torch.zeros_like(student), atol=1e-15)


@every_kind
@pytest.mark.parametrize(
    "options", [*RESTRICTED, {"top_k": 3, "support": "student", "tail": False}, {"top_k": V}], ids=str
)
def test_gradients_are_those_of_finite_differences(kind, beta, options):
    student, teacher = pair()
    assert torch.autograd.gradcheck(
        lambda s: token_divergence(s, teacher, Divergence(kind, beta=beta, temperature=1.3, **options)),
        student,
    )


@every_kind
def test_the_teacher_gets_no_gradient(kind, beta):
    student, teacher = pair()
    token_divergence(student, teacher.requires_grad_(), Divergence(kind, beta=beta)).sum().backward()
    assert teacher.grad is None


@every_kind
def test_temperature_divides_both_sides(kind, beta):
    student, teacher = pair()
    exactly(
        token_divergence(student, teacher, Divergence(kind, beta=beta, temperature=1.7)),
        token_divergence(student / 1.7, teacher / 1.7, Divergence(kind, beta=beta)),
    )


@every_kind
def test_a_constant_added_to_the_logits_changes_nothing(kind, beta):
    student, teacher = pair()
    exactly(
        token_divergence(student + 100, teacher - 50, Divergence(kind, beta=beta)),
        token_divergence(student, teacher, Divergence(kind, beta=beta)),
        atol=1e-12,
    )


logits = st.lists(st.floats(-30, 30), min_size=V, max_size=V).map(lambda row: torch.tensor(row, dtype=torch.float64))


@settings(max_examples=settings.default.max_examples * 3 // 5)
@given(logits, logits, st.sampled_from(KINDS), st.integers(1, V), st.sampled_from(["teacher", "student"]))
def test_with_a_tail_it_is_never_negative_and_never_above_the_full_value(student, teacher, kind, k, support):
    name, beta = kind
    full = token_divergence(student, teacher, Divergence(name, beta=beta))
    kept = token_divergence(student, teacher, Divergence(name, beta=beta, top_k=k, support=support))
    assert 0 <= kept <= full + 1e-9


@settings(max_examples=settings.default.max_examples * 3 // 5)
@given(logits, logits, st.sampled_from(KINDS))
def test_in_float32_it_is_not_negative_either(student, teacher, kind):
    name, beta = kind
    assert token_divergence(student.float(), teacher.float(), Divergence(name, beta=beta)) >= 0


@every_kind
@pytest.mark.parametrize("support", ["teacher", "student"])
def test_top_k_with_a_tail_grows_to_the_full_value(kind, beta, support):
    student, teacher = pair()
    values = torch.stack(
        [
            token_divergence(student, teacher, Divergence(kind, beta=beta, top_k=k, support=support))
            for k in range(1, V + 1)
        ]
    )
    assert (values.diff(dim=0) >= -1e-12).all()
    # With one entry outside, the tail holds that entry alone.
    full = token_divergence(student, teacher, Divergence(kind, beta=beta))
    exactly(values[-1], full)
    exactly(values[-2], full)
    assert (values[0] < full).all()


def test_the_tail_is_one_bucket_with_all_the_rest():
    student, teacher = pair(positions=1)
    p, q = student.detach().softmax(-1)[0], teacher.softmax(-1)[0]
    for support, ids in (("teacher", q.topk(3).indices), ("student", p.topk(3).indices)):
        bucket = [torch.cat([side[ids], 1 - side[ids].sum(0, keepdim=True)]) for side in (q, p)]
        values = token_divergence(student, teacher, Divergence("forward_kl", top_k=3, support=support))
        exactly(values, kl(*bucket)[None])


def test_without_a_tail_both_sides_are_renormalised_on_the_support():
    student, teacher = pair(positions=1)
    p, q = student.detach().softmax(-1)[0], teacher.softmax(-1)[0]
    for support, ids in (("teacher", q.topk(3).indices), ("student", p.topk(3).indices)):
        kept = [side[ids] / side[ids].sum() for side in (q, p)]
        values = token_divergence(student, teacher, Divergence("forward_kl", top_k=3, support=support, tail=False))
        exactly(values, kl(*kept)[None])


def test_a_truncated_sum_without_a_tail_would_go_negative():
    # What peers call a top-k KL: the teacher is sure of what the student gives less than its top 1.
    student = torch.tensor([3.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    teacher = torch.tensor([1.0, 0.9, 0.9, 0.9], dtype=torch.float64)
    p, q = student.softmax(-1), teacher.softmax(-1)
    assert q[0] * (q[0] / p[0]).log() < 0
    assert token_divergence(student, teacher, Divergence("forward_kl", top_k=1)) > 0


@every_kind
@pytest.mark.parametrize("top_k", [None, 1, 3, V - 2, V - 1, V])
def test_entries_excluded_on_both_sides_add_nothing_to_value_or_gradient(kind, beta, top_k):
    student, teacher = pair()
    mask = torch.zeros(V, dtype=torch.float64)
    mask[[1, 6]] = NOT
    kept = mask.isfinite()
    values = token_divergence(student + mask, teacher + mask, Divergence(kind, beta=beta, top_k=top_k))
    without = token_divergence(
        student[:, kept],
        teacher[:, kept],
        Divergence(kind, beta=beta, top_k=None if top_k is None else min(top_k, V - 2)),
    )
    exactly(values, without, atol=1e-12)
    exactly(gradient(values, student), gradient(without, student), atol=1e-12)


def test_entries_that_only_the_teacher_excludes_are_finite_for_all_but_the_reverse_kl():
    student, teacher = pair()
    teacher[:, 3] = NOT
    p, q = student.detach().softmax(-1), teacher.softmax(-1)
    exactly(token_divergence(student, teacher, Divergence("forward_kl")), kl(q[:, q[0] > 0], p[:, q[0] > 0]))
    mix = (p + q) / 2
    expected = (kl(q[:, q[0] > 0], mix[:, q[0] > 0]) + kl(p, mix)) / 2
    exactly(token_divergence(student, teacher, Divergence("jsd")), expected)
    for kind in ("forward_kl", "jsd"):
        assert gradient(token_divergence(student, teacher, Divergence(kind)), student).isfinite().all()
    with pytest.raises(DataError, match="infinite at 4 of 4 positions"):
        token_divergence(student, teacher, Divergence("reverse_kl"))


def test_entries_that_only_the_student_excludes_make_the_forward_kl_infinite():
    student, teacher = pair()
    mask = torch.zeros(4, V, dtype=torch.float64)
    mask[2, 5] = NOT
    for kind in ("reverse_kl", "jsd"):
        assert gradient(token_divergence(student + mask, teacher, Divergence(kind)), student).isfinite().all()
    with pytest.raises(DataError, match="infinite at 1 of 4 positions"):
        token_divergence(student + mask, teacher, Divergence("forward_kl"))


def test_a_support_where_one_side_has_no_mass_is_refused():
    student, teacher = pair(positions=1)
    mask = torch.zeros(V, dtype=torch.float64)
    mask[teacher[0].topk(2).indices] = NOT
    with pytest.raises(DataError, match="no mass on the top 2 of the teacher"):
        token_divergence(student + mask, teacher, Divergence("jsd", top_k=2, tail=False))
    assert token_divergence(student + mask, teacher, Divergence("jsd", top_k=2)) > 0


@every_kind
def test_the_smallest_probabilities_that_there_are_give_next_to_no_value_and_gradient(kind, beta):
    """Float32 ends near exp(-103.97): below it a probability is 0, and so may be the mix of two that are not."""
    tiny = torch.cat([torch.arange(-104, -87.9, 0.25), torch.tensor([-120.0])])
    pairs = torch.cartesian_prod(tiny, tiny)
    student, teacher = (torch.stack([torch.zeros(len(pairs)), column], -1) for column in pairs.T)
    student.requires_grad_()
    values = token_divergence(student, teacher, Divergence(kind, beta=beta))
    assert values.max() < 1e-30
    assert gradient(values, student).abs().max() < 1e-30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_logits_are_computed_in_float32(dtype):
    student, teacher = (side.detach().to(dtype) for side in pair())
    values = token_divergence(student.requires_grad_(), teacher, Divergence("reverse_kl"))
    assert values.dtype == torch.float32
    exactly(values.double(), token_divergence(student.double(), teacher.double(), Divergence("reverse_kl")), atol=1e-5)
    assert gradient(values, student).dtype == dtype


def test_any_leading_shape_is_kept():
    student, teacher = (side.reshape(2, 2, V) for side in pair())
    assert token_divergence(student, teacher, Divergence("jsd")).shape == (2, 2)
    assert token_divergence(student[0, 0], teacher[0, 0], Divergence("jsd", top_k=3)).shape == ()
    assert token_divergence(student[:0], teacher[:0], Divergence("jsd", top_k=3)).shape == (0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "js"}, "divergence.kind = 'js' is unknown. Allowed: forward_kl, .*Did you mean \"jsd\"?"),
        ({"kind": "math:tau"}, "divergence.kind: 'math:tau' is a float and no divergence. Decorate"),
        ({"kind": "math:none"}, "divergence.kind: 'math:none': the module 'math' defines no 'none'"),
        (
            {"kind": "nowhere_at_all:kl"},
            "divergence.kind: 'nowhere_at_all:kl' names the module 'nowhere_at_all', which cannot be found",
        ),
        ({"beta": -0.1}, "divergence.beta = -0.1: must be between 0 and 1"),
        ({"beta": torch.nan}, "divergence.beta = nan"),
        ({"kind": "skew_kl", "beta": 1.0}, "divergence.beta = 1: skew_kl is 0 there whatever the student does"),
        ({"kind": "reverse_kl", "beta": 0.5}, "divergence.beta is used by kind = .* but kind = reverse_kl"),
        ({"temperature": 0}, "divergence.temperature = 0: must be positive"),
        ({"temperature": torch.inf}, "divergence.temperature = inf"),
        ({"top_k": 0}, "divergence.top_k = 0: must be at least 1"),
        ({"clip": 0.0}, "divergence.clip = 0.0: must be positive"),
        ({"clip": 0.05, "top_k": 3}, "divergence.clip = 0.05 with top_k = 3"),
        ({"top_k": 2, "support": "both"}, "divergence.support = 'both' is unknown"),
        ({"support": "student"}, "divergence.support is used with top_k alone"),
        ({"tail": False}, "divergence.tail is used with top_k alone"),
    ],
)
def test_a_divergence_that_cannot_be_is_refused_when_it_is_made(options, message):
    with pytest.raises(ConfigError, match=message):
        Divergence(**({"kind": "jsd"} | options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"divergence": Divergence("jsd", top_k=V + 1)}, ConfigError, "top_k = 9: must be at most the vocabulary's 8"),
        ({"divergence": Divergence("jsd", clip=0.1)}, ConfigError, "clip = 0.1 is for hidden states"),
        ({"divergence": Divergence("jsd", temperature=None)}, ConfigError, "the sampling temperature, .* say it"),
        ({"teacher_logits": torch.zeros(4, V + 1)}, DataError, "teacher logits .4, 9."),
    ],
)
def test_what_cannot_be_computed_is_refused(options, error, message):
    student, teacher = pair()
    arguments = {"student_logits": student, "teacher_logits": teacher, "divergence": Divergence("jsd")}
    with pytest.raises(error, match=message):
        token_divergence(**(arguments | options))


def test_a_store_with_another_top_k_than_the_divergence_is_refused():
    student, teacher = pair()
    weights, head = torch.ones(4, dtype=torch.float64), torch.eye(V, dtype=torch.float64)
    top = teacher.log_softmax(-1).topk(3)
    for divergence, message in (
        (Divergence("jsd", top_k=2), "the top 3 are stored, but divergence.top_k = 2"),
        (Divergence("jsd"), "the top 3 are stored, but divergence.top_k = None"),
        (Divergence("jsd", top_k=3, support="student"), "only the teacher's likeliest entries are stored"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            stored_divergence(student, head, top.indices, top.values, divergence, weights=weights)


LEFT_OUT = {
    "another kind keeps all but beta": ("reverse_kl", {}, Divergence("reverse_kl", top_k=100, support="student")),
    "beta alone": (None, {"beta": 0.1}, Divergence("jsd", beta=0.1, top_k=100, support="student")),
    "another kind with a beta of its own": ("mixed_kl", {}, Divergence("mixed_kl", top_k=100, support="student")),
    "the whole vocabulary": (None, {"top_k": None}, Divergence("jsd", beta=0.3)),
    "a clip takes the place of the top k": (None, {"clip": 0.1}, Divergence("jsd", beta=0.3, clip=0.1)),
}


@pytest.mark.parametrize(("kind", "given", "expected"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_is_left_out_is_the_defaults_where_it_can_stand_there(kind, given, expected):
    default = Divergence("jsd", beta=0.3, top_k=100, support="student")
    given = given if kind is None else {"kind": kind, **given}
    assert Divergence(**default.completed(given)) == expected


def test_a_top_k_takes_the_place_of_a_clip():
    default = Divergence("forward_kl", clip=0.05)
    assert Divergence(**default.completed({"top_k": 20})) == Divergence("forward_kl", top_k=20)
    assert Divergence(**default.completed({})) == default
