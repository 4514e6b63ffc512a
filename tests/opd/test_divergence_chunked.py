"""The chunked functions against the dense ones, in float64: values, gradients, and the awkward cases."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from opd.errors import ConfigError, DataError
from opd.losses import Divergence
from opd.maths.divergence import chunked_divergence, token_divergence, weighted_divergence
from opd.maths.formulas import formula_of, kinds, with_beta
from opd.maths.head import Head, Projector
from opd.maths.logprobs import chunked_entropy, chunked_logprobs, chunked_scores


def cases() -> list[tuple[str, float | None]]:
    """Every divergence of the table: as it is by itself, at other values of its beta, and at the ends that differ."""
    found: list[tuple[str, float | None]] = [(kind, None) for kind in kinds()]
    for kind in with_beta():
        found += [(kind, beta) for beta in (0.1, 0.3)]
        found += [(kind, end) for end in (0.0, 1.0) if formula_of(kind).at(end).name != kind]
    return found


KINDS = cases()
every_kind = pytest.mark.parametrize(("kind", "beta"), KINDS)
every_chunk = pytest.mark.parametrize("chunk_size", [1, 3, 7, None])

N, H, V = 7, 5, 11


def normal(*shape: int, seed: int, grad: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


class Case:
    """Hidden states and heads of a student (H wide) and of a teacher (4 wide)."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.hidden = normal(N, H, seed=0, grad=True, dtype=dtype)
        self.weight = normal(V, H, seed=1, grad=True, dtype=dtype)
        self.bias = normal(V, seed=2, grad=True, dtype=dtype)
        self.teacher_hidden = normal(N, 4, seed=3, dtype=dtype)
        self.teacher_weight = normal(V, 4, seed=4, dtype=dtype)
        self.weights = normal(N, seed=5, dtype=dtype)
        self.ids = torch.arange(N) % V

    @property
    def student(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    @property
    def teacher(self) -> tuple[Tensor, Tensor]:
        return self.teacher_hidden, self.teacher_weight

    @property
    def logits(self) -> Tensor:
        return self.hidden @ self.weight.T

    @property
    def teacher_logits(self) -> Tensor:
        return self.teacher_hidden @ self.teacher_weight.T


def exactly(actual: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]) -> None:
    assert_close(actual, expected, rtol=0, atol=1e-12)


@every_kind
@every_chunk
def test_chunked_values_and_gradients_are_the_dense_ones(kind, beta, chunk_size):
    case = Case()
    dense = token_divergence(case.logits, case.teacher_logits, Divergence(kind, beta=beta, temperature=1.3))
    chunked = chunked_divergence(
        *case.student, *case.teacher, Divergence(kind, beta=beta, temperature=1.3), chunk_size=chunk_size
    )
    exactly(chunked, dense)
    exactly(
        torch.autograd.grad((chunked * case.weights).sum(), case.student),
        torch.autograd.grad((dense * case.weights).sum(), case.student),
    )


@every_kind
@every_chunk
def test_the_weighted_sum_has_the_gradients_of_the_weighted_per_token_values(kind, beta, chunk_size):
    case = Case()
    arguments = (*case.student, *case.teacher, Divergence(kind, beta=beta, temperature=0.7))
    values = chunked_divergence(*arguments, chunk_size=chunk_size)
    total = chunked_divergence(*arguments, weights=case.weights, chunk_size=chunk_size)
    exactly(total, values @ case.weights)
    # An upstream factor, as loss scaling or a coefficient gives.
    exactly(
        torch.autograd.grad(2.5 * total, case.student),
        torch.autograd.grad(2.5 * (values @ case.weights), case.student),
    )


@every_kind
def test_chunked_divergence_passes_gradcheck(kind, beta):
    case = Case()
    head = Head(case.weight, bias=case.bias, softcap=2.0, scale=0.8)

    def values(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = Head(weight, bias=bias, softcap=2.0, scale=0.8)
        return chunked_divergence(
            hidden, head, *case.teacher, Divergence(kind, beta=beta, temperature=1.1), chunk_size=3
        )

    assert torch.autograd.gradcheck(values, (case.hidden, head.weight, head.bias))


@every_kind
def test_chunked_divergence_with_a_clip_passes_gradcheck(kind, beta):
    case = Case()

    def values(hidden: Tensor, weight: Tensor) -> Tensor:
        return chunked_divergence(hidden, weight, *case.teacher, Divergence(kind, beta=beta, clip=0.05), chunk_size=2)

    assert torch.autograd.gradcheck(values, (case.hidden, case.weight))


def test_a_head_is_applied_as_it_says():
    case = Case()
    student = 3.0 * torch.tanh(0.8 * (case.logits + case.bias) / 3.0)
    teacher = 0.5 * case.teacher_logits
    chunked = chunked_divergence(
        case.hidden,
        Head(case.weight, bias=case.bias, softcap=3.0, scale=0.8),
        case.teacher_hidden,
        Head(case.teacher_weight, scale=0.5),
        Divergence("reverse_kl", temperature=1.7),
    )
    exactly(chunked, token_divergence(student, teacher, Divergence("reverse_kl", temperature=1.7)))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)))
def test_gradients_reach_exactly_what_requires_them(needs):
    case = Case()
    inputs = [t.requires_grad_(need) for t, need in zip((case.hidden, case.weight, case.bias), needs, strict=True)]
    total = chunked_divergence(
        case.hidden, Head(case.weight, bias=case.bias), *case.teacher, Divergence("jsd"), weights=case.weights
    )
    assert total.requires_grad == any(needs)
    if any(needs):
        total.backward()
    assert [t.grad is not None for t in inputs] == list(needs)


def test_the_teacher_never_gets_a_gradient():
    case = Case()
    teacher = [t.requires_grad_() for t in case.teacher]
    chunked_divergence(*case.student, *teacher, Divergence("reverse_kl")).sum().backward()
    chunked_divergence(*case.student, *teacher, Divergence("jsd"), weights=case.weights).backward()
    assert [t.grad for t in teacher] == [None, None]


def test_a_live_teacher_on_the_same_head_is_a_constant():
    case = Case()
    teacher_hidden = case.hidden + 0.1
    total = chunked_divergence(
        case.hidden, case.weight, teacher_hidden, case.weight, Divergence("reverse_kl"), weights=case.weights
    )
    frozen = (case.hidden + 0.1).detach() @ case.weight.detach().T
    dense = token_divergence(case.logits, frozen, Divergence("reverse_kl")) @ case.weights
    exactly(torch.autograd.grad(total, case.student), torch.autograd.grad(dense, case.student))


@every_kind
def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(kind, beta):
    case = Case()
    total = chunked_divergence(*case.student, *case.student, Divergence(kind, beta=beta), weights=case.weights)
    gradients = torch.autograd.grad(total, case.student)
    exactly((total, *gradients), tuple(torch.zeros_like(t) for t in (total, *gradients)))


def test_a_head_tied_to_the_embedding_gets_both_gradients():
    case = Case()
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    chunked = chunked_divergence(
        case.weight[ids], case.weight, *case.teacher, Divergence("forward_kl"), weights=case.weights
    )
    dense = (
        token_divergence(case.weight[ids] @ case.weight.T, case.teacher_logits, Divergence("forward_kl")) @ case.weights
    )
    exactly(torch.autograd.grad(chunked, case.weight), torch.autograd.grad(dense, case.weight))


def test_no_tokens_give_zero_with_a_live_graph():
    case = Case()
    no_hidden = case.hidden[:0]
    total = chunked_divergence(
        no_hidden,
        case.weight,
        case.teacher_hidden[:0],
        case.teacher_weight,
        Divergence("jsd"),
        weights=case.weights[:0],
    ) + chunked_logprobs(no_hidden, case.weight, case.ids[:0], weights=case.weights[:0])
    total.backward()
    assert total.item() == 0
    exactly(case.weight.grad, torch.zeros_like(case.weight))
    exactly(case.hidden.grad, torch.zeros_like(case.hidden))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_stood_in_the_memory_of_a_heads_gradient_is_not_added_to_it(monkeypatch, dtype):
    case = Case(dtype)

    def gradients():
        total = chunked_divergence(*case.student, *case.teacher, Divergence("jsd"), weights=case.weights, chunk_size=3)
        return torch.autograd.grad(total, case.student)

    expected, empty = gradients(), torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: empty(*args, **options).fill_(torch.nan))
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_tokens_of_weight_zero_change_nothing():
    case = Case()
    weights = case.weights * torch.tensor([1, 0, 0, 1, 0, 1, 0])
    holes = chunked_divergence(*case.student, *case.teacher, Divergence("jsd"), weights=weights, chunk_size=2)
    kept = weights.nonzero().squeeze(-1)
    alone = chunked_divergence(
        case.hidden[kept],
        case.weight,
        case.teacher_hidden[kept],
        case.teacher_weight,
        Divergence("jsd"),
        weights=weights[kept],
    )
    exactly(holes, alone)
    exactly(torch.autograd.grad(holes, case.student), torch.autograd.grad(alone, case.student))


def test_without_gradients_the_values_are_the_same():
    case = Case()
    total = chunked_divergence(*case.student, *case.teacher, Divergence("jsd"), weights=case.weights)
    with torch.no_grad():
        plain = chunked_divergence(*case.student, *case.teacher, Divergence("jsd"), weights=case.weights)
        values = chunked_divergence(*case.student, *case.teacher, Divergence("jsd"))
    assert not plain.requires_grad
    exactly(plain, total.detach())
    exactly(values @ case.weights, plain)


def test_the_weighted_form_logs_the_values_without_a_graph():
    case = Case()
    both = weighted_divergence(*case.student, *case.teacher, Divergence("jsd"), weights=case.weights)
    assert not both.per_token.requires_grad
    exactly(both.per_token @ case.weights, both.total.detach())
    exactly(both.clipped, torch.zeros(N, dtype=torch.float64))


def test_a_weighted_sum_cannot_be_back_propagated_twice():
    case = Case()
    total = chunked_divergence(*case.student, *case.teacher, Divergence("jsd"), weights=case.weights)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="back-propagated once"):
        total.backward()


def test_the_clip_bounds_each_entry_before_the_sum_and_is_counted():
    case = Case()
    p, q = case.teacher_logits.softmax(-1), case.logits.detach().softmax(-1)
    summands = p * (p.log() - q.log())
    both = weighted_divergence(*case.student, *case.teacher, Divergence("forward_kl", clip=0.05), weights=case.weights)
    exactly(both.per_token, summands.clamp(max=0.05).sum(-1))
    exactly(both.clipped, (summands > 0.05).double().mean(-1))
    assert 0 < both.clipped.mean() < 1
    assert both.per_token.min() < 0  # the clip may turn a divergence negative, and that must be seen


def test_a_clipped_entry_keeps_only_its_push_down():
    # METHODS 1a: the gradient on logit v is p_student(v) * M - p_teacher(v) where v is not clipped.
    case = Case()
    identity = torch.eye(V, dtype=torch.float64)
    logits = case.logits.detach().requires_grad_()
    chunked_divergence(
        logits,
        identity,
        case.teacher_logits,
        identity,
        Divergence("forward_kl", clip=0.05),
        weights=torch.ones(N).double(),
    ).backward()
    p, q = case.teacher_logits.softmax(-1), logits.detach().softmax(-1)
    kept = p * (p.log() - q.log()) <= 0.05
    exactly(logits.grad, q * (p * kept).sum(-1, keepdim=True) - p * kept)


@every_chunk
def test_chunked_logprobs_are_the_dense_ones(chunk_size):
    case = Case()
    dense = (case.logits / 1.3).log_softmax(-1)[torch.arange(N), case.ids]
    values = chunked_logprobs(*case.student, case.ids, temperature=1.3, chunk_size=chunk_size)
    total = chunked_logprobs(*case.student, case.ids, temperature=1.3, chunk_size=chunk_size, weights=case.weights)
    exactly(values, dense)
    exactly(total, dense @ case.weights)
    expected = torch.autograd.grad(dense @ case.weights, case.student)
    exactly(torch.autograd.grad(values @ case.weights, case.student), expected)
    exactly(torch.autograd.grad(total, case.student), expected)


@every_kind
@pytest.mark.parametrize("options", [{"tail": True}, {"tail": False}], ids=str)
@pytest.mark.parametrize("support", ["teacher", "student"])
def test_top_k_from_hidden_states_is_the_dense_one(kind, beta, options, support):
    case = Case()
    divergence = Divergence(kind, beta=beta, temperature=1.3, top_k=3, support=support, **options)
    dense = token_divergence(case.logits, case.teacher_logits, divergence)
    expected = torch.autograd.grad(dense @ case.weights, case.student)
    values = chunked_divergence(*case.student, *case.teacher, divergence, chunk_size=3)
    total = chunked_divergence(*case.student, *case.teacher, divergence, chunk_size=3, weights=case.weights)
    exactly(values, dense)
    exactly(total, dense @ case.weights)
    exactly(torch.autograd.grad(values @ case.weights, case.student), expected)
    exactly(torch.autograd.grad(total, case.student), expected)


def test_the_mass_that_the_top_k_hold_is_logged_where_it_is_less():
    case = Case()
    both = weighted_divergence(
        *case.student, *case.teacher, Divergence("jsd", top_k=3, support="student"), weights=case.weights, chunk_size=3
    )
    p, q = case.logits.detach().softmax(-1), case.teacher_logits.softmax(-1)
    ids = p.topk(3).indices
    exactly(both.kept, torch.minimum(p.gather(-1, ids).sum(-1), q.gather(-1, ids).sum(-1)))
    exactly(both.teacher_entropy, torch.distributions.Categorical(probs=q).entropy())
    exactly(both.student_entropy, torch.distributions.Categorical(probs=p).entropy())
    whole = weighted_divergence(*case.student, *case.teacher, Divergence("jsd"), weights=case.weights)
    exactly(whole.kept, torch.ones(N, dtype=torch.float64))


def test_chunked_logprobs_pass_gradcheck():
    case = Case()
    assert torch.autograd.gradcheck(
        lambda h, w, b: chunked_logprobs(h, Head(w, bias=b, softcap=3.0), case.ids, chunk_size=3),
        (case.hidden, case.weight, case.bias),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(dtype, monkeypatch):
    monkeypatch.setattr("opd.maths.head.CAST_ROWS", 4)
    narrow, wide = Case(dtype), Case(dtype)
    wide.hidden, wide.weight = (t.detach().double().requires_grad_() for t in wide.student)
    weights = narrow.weights.float()
    total = chunked_divergence(
        *narrow.student, *narrow.teacher, Divergence("reverse_kl"), weights=weights, chunk_size=2
    )
    exact = chunked_divergence(
        *wide.student, *(t.double() for t in wide.teacher), Divergence("reverse_kl"), weights=weights.double()
    )
    assert total.dtype == torch.float32
    assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(total, narrow.student), torch.autograd.grad(exact, wide.student), strict=True
    ):
        assert ours.dtype == dtype
        assert_close(ours.double(), theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_entries_masked_on_both_sides_add_nothing():
    case = Case()
    mask = torch.zeros(V, dtype=torch.float64)
    mask[[2, V - 1]] = -torch.inf
    keep = mask.isfinite()
    for kind, beta in KINDS:
        total = chunked_divergence(
            case.hidden,
            Head(case.weight, bias=mask),
            case.teacher_hidden,
            Head(case.teacher_weight, bias=mask),
            Divergence(kind, beta=beta),
            weights=case.weights,
        )
        alone = chunked_divergence(
            case.hidden, case.weight[keep], case.teacher_hidden, case.teacher_weight[keep], Divergence(kind, beta=beta)
        )
        exactly(total, alone @ case.weights)
        exactly(torch.autograd.grad(total, case.student), torch.autograd.grad(alone @ case.weights, case.student))


def test_an_infinite_divergence_is_refused():
    case = Case()
    mask = torch.zeros(V, dtype=torch.float64)
    mask[2] = -torch.inf
    teacher = Head(case.teacher_weight, bias=mask)
    with pytest.raises(DataError, match="infinite at 7 of 7 positions"):
        chunked_divergence(*case.student, case.teacher_hidden, teacher, Divergence("reverse_kl"))
    with pytest.raises(DataError, match="infinite at 7 of 7 positions"):
        chunked_divergence(*case.student, case.teacher_hidden, teacher, Divergence("reverse_kl"), weights=case.weights)
    assert chunked_divergence(*case.student, case.teacher_hidden, teacher, Divergence("forward_kl")).isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"divergence": Divergence("jsd", temperature=None)}, ConfigError, "temperature = None"),
        ({"chunk_size": 0}, ConfigError, "chunk_size = 0"),
        (
            {"divergence": Divergence("jsd", top_k=V + 1)},
            ConfigError,
            "top_k = 12: must be at most the vocabulary's 11",
        ),
        ({"teacher_hidden": normal(N - 1, 4, seed=3)}, DataError, "7 student tokens, but 6"),
        ({"teacher_head": normal(V + 1, 4, seed=4)}, DataError, "vocabularies differ: student 11, teacher 12"),
        ({"student_head": normal(V, H + 1, seed=4)}, DataError, "hidden states .7, 5. for a head's weight .11, 6."),
        ({"weights": torch.ones(N - 1)}, DataError, "weights .6. for 7 tokens"),
        ({"weights": torch.ones(N, requires_grad=True)}, DataError, "weights get no gradient"),
    ],
)
def test_what_cannot_be_computed_is_refused(change, error, message):
    case = Case()
    arguments = {
        "student_hidden": case.hidden,
        "student_head": case.weight,
        "teacher_hidden": case.teacher_hidden,
        "teacher_head": case.teacher_weight,
        "divergence": Divergence("forward_kl"),
    }
    with pytest.raises(error, match=message):
        chunked_divergence(**(arguments | change))


def test_token_ids_outside_the_vocabulary_are_refused():
    case = Case()
    with pytest.raises(DataError, match="from 5 to 11: a vocabulary of 11"):
        chunked_logprobs(*case.student, case.ids + 5)
    with pytest.raises(DataError, match=r"\[6\] token ids for 7 hidden states"):
        chunked_logprobs(*case.student, case.ids[:6])


def test_entropies_of_both_sides_are_logged():
    case = Case()
    mask = torch.zeros(V, dtype=torch.float64)
    mask[4] = -torch.inf
    both = weighted_divergence(
        case.hidden,
        Head(case.weight, bias=mask),
        case.teacher_hidden,
        Head(case.teacher_weight, bias=mask),
        Divergence("forward_kl", temperature=1.3),
        weights=case.weights,
        chunk_size=3,
    )
    for logged, logits in (
        (both.student_entropy, case.logits.detach()),
        (both.teacher_entropy, case.teacher_logits),
    ):
        exactly(logged, torch.distributions.Categorical(logits=logits[:, mask.isfinite()] / 1.3).entropy())


def test_without_gradients_no_gradient_is_computed(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr("opd.maths.head.Projector.pull_back", refuse)
    case = Case()
    with torch.no_grad():
        chunked_divergence(*case.student, *case.teacher, Divergence("jsd"), weights=case.weights)
    frozen = (case.hidden.detach(), case.weight.detach())
    chunked_divergence(*frozen, *case.teacher, Divergence("jsd"), weights=case.weights)
    with pytest.raises(AssertionError, match="a gradient was computed"):
        chunked_divergence(*case.student, *case.teacher, Divergence("jsd"), weights=case.weights)


def test_a_head_that_is_none_is_refused():
    with pytest.raises(DataError, match=r"got shape \[0\] \(gather a sharded one\)"):
        Head(torch.empty(0))
    with pytest.raises(ConfigError, match=r"softcap = 0\.0: must be positive"):
        Head(torch.empty(V, H), softcap=0.0)


def test_a_head_in_float16_loses_no_small_entry_of_a_gradient(monkeypatch):
    """A GPU rounds a tile's gradient to the type of its head, and float16 has nothing below 6e-8."""
    case = Case(torch.float16)
    weights = case.weights.float() * 1e-7
    sides = (*case.student, *case.teacher)
    plain = torch.autograd.grad(
        chunked_divergence(*sides, Divergence("jsd"), weights=weights), case.student, torch.tensor(1e7)
    )
    handed = []

    def rounding(self: Projector, gradient: Tensor, *rest: object) -> None:
        handed.append(gradient.half().float())
        pull_back(self, handed[-1], *rest)

    pull_back = Projector.pull_back
    monkeypatch.setattr(Projector, "pull_back", rounding)
    total = chunked_divergence(*sides, Divergence("jsd"), weights=weights, chunk_size=3)
    rounded = torch.autograd.grad(total, case.student, torch.tensor(1e7))
    assert_close(rounded, plain, rtol=0.01, atol=1e-3)
    assert 0.01 < max(gradient.abs().max() for gradient in handed) < 1000


@pytest.mark.parametrize("weights", [torch.zeros(N), torch.full((N,), 1e-36), torch.full((N,), 3e38)])
def test_a_head_in_float16_takes_any_weights(weights):
    case = Case(torch.float16)
    total = chunked_divergence(*case.student, *case.teacher, Divergence("jsd"), weights=weights)
    gradients = torch.autograd.grad(total, case.student, torch.tensor(1 / float(weights.max() or 1)))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_gradient_of_the_entropy_is_the_dense_one():
    case = Case()
    for chunk_size in (1, 3, None):
        total = chunked_entropy(*case.student, weights=case.weights, temperature=1.3, chunk_size=chunk_size)
        logprobs = (case.logits / 1.3).log_softmax(-1)
        dense = -(logprobs.exp() * logprobs).sum(-1) @ case.weights
        exactly(total, dense)
        inputs = (case.hidden, case.weight)
        exactly(torch.autograd.grad(total, inputs), torch.autograd.grad(dense, inputs))


def test_an_entry_that_is_excluded_adds_nothing_to_the_entropy():
    bias = torch.zeros(V, dtype=torch.float64)
    bias[2] = -torch.inf
    case = Case()
    total = chunked_entropy(case.hidden, Head(case.weight, bias=bias), weights=case.weights)
    (gradient,) = torch.autograd.grad(total, case.weight)
    assert total.isfinite()
    assert gradient.isfinite().all()
    assert gradient[2].abs().max() == 0


def test_scores_are_the_log_probs_with_the_entropies_beside_them():
    case = Case()
    scored = chunked_scores(*case.student, case.ids, temperature=0.8, chunk_size=3)
    dense = (case.logits / 0.8).log_softmax(-1)
    exactly(scored.logprobs, dense[torch.arange(N), case.ids])
    exactly(scored.entropy, -(dense.exp() * dense).sum(-1).detach())
    assert not scored.entropy.requires_grad
    gradient = torch.autograd.grad(scored.logprobs.sum(), case.hidden)
    exactly(gradient, torch.autograd.grad(dense[torch.arange(N), case.ids].sum(), case.hidden))
