"""The kernel of the divergence against the plain formulas in float64, in Triton's interpreter, which needs no GPU.

Not covered here: what a compiler and a GPU make of it (`test_divergence_gpu.py`). Triton reads TRITON_INTERPRET when
it is imported, and a GPU's tests of the same process must not be interpreted: so these run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from opd.errors import ConfigError
from opd.losses import Divergence
from opd.maths import divergence_tiles, formulas
from opd.maths.divergence import WeightedDivergence, chunked_divergence, weighted_divergence
from opd.maths.head import Head, Projection

pytest.importorskip("triton", reason="no Triton: opd.maths.kernels is not tested")

# The interpreter computes with numpy, which warns where a GPU says inf or nan.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the last test of this file starts")

EVERY_KIND = [("forward_kl", None), ("reverse_kl", None), ("jsd", 0.3), ("mixed_kl", 0.3)]
every_kind = pytest.mark.parametrize(("kind", "beta"), EVERY_KIND)
every_clip = pytest.mark.parametrize("clip", [None, 0.02])

N, V, BLOCK = 4, 37, 16


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] of both sides, of no common level, and weights [N], one of them 0."""
    student, teacher = 2 * normal(N, V, seed=0) + 30, 2 * normal(N, V, seed=1) - 20
    for side in (student, teacher):
        side[1, [0, 5, V - 1]] = -torch.inf  # nothing, in the first block and in the last
        side[2, 3:] = -torch.inf  # and in whole blocks
    student[3, 7] = -400.0  # its probability is 0 in float32, its logarithm is not infinite
    return student, teacher, torch.tensor([0.7, -1.0, 0.0, 2.0])


@pytest.fixture
def kernel(monkeypatch):
    """In blocks of which V is no multiple, and in the place where a GPU would have it."""
    from opd.maths import kernels

    monkeypatch.setattr(kernels, "BLOCK", BLOCK)
    monkeypatch.setattr(divergence_tiles, "_kernel", lambda logits: kernels.divergence_rows)
    return kernels.divergence_rows


@pytest.fixture
def unheard_of(monkeypatch):
    """A divergence that is in the table for as long as a test runs, and of which the kernel knows nothing."""
    monkeypatch.setattr(formulas, "_TABLE", dict(formulas._TABLE))

    @formulas.formula()
    def unheard_of(student, teacher, p, q):
        return formulas.times_log_ratio(q, teacher, student), -q

    return Divergence("unheard_of")


@inside
@every_kind
@every_clip
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16, None])
def test_the_kernel_gives_the_float64_values_and_gradients(kernel, kind, beta, clip, narrow):
    student, teacher, weights = rows()
    rule = Divergence(kind, beta=beta, clip=clip)
    exact = divergence_tiles._full_rows(rule, student.double(), teacher.double(), weights.double()[:, None])
    columns = torch.zeros(4, N)
    arguments = (None, torch.float32) if narrow is None else (weights, narrow)
    gradient = kernel(rule, student, teacher, *arguments, *columns)
    expected = [exact.values, exact.clipped if clip else torch.zeros(N), exact.student_entropy, exact.teacher_entropy]
    assert_close(columns.double(), torch.stack([column.double() for column in expected]), rtol=1e-5, atol=1e-5)
    assert exact.clipped is None or 0 < exact.clipped.mean() < 1
    if narrow is not None:
        assert gradient.dtype == narrow
        assert gradient.data_ptr() == student.data_ptr()
        # Logits near 30 have an error of 2e-6 themselves.
        rounding = 1e-5 if narrow == torch.float32 else torch.finfo(narrow).eps
        assert_close(gradient.double(), exact.gradient, rtol=rounding, atol=1e-5)
        assert (gradient[exact.gradient == 0] == 0).all()


@inside
@every_kind
def test_a_weight_for_all_tokens_may_be_one_number_in_memory(kernel, kind, beta):
    student, teacher, _ = rows()
    one = torch.tensor(0.5)
    columns = torch.zeros(4, N)
    arguments = (Divergence(kind, beta=beta), student.clone(), teacher)
    expanded = kernel(*arguments, one.expand(N), torch.float32, *columns).clone()
    arguments = (Divergence(kind, beta=beta), student.clone(), teacher)
    assert_close(expanded, kernel(*arguments, torch.full((N,), 0.5), torch.float32, *columns), rtol=0, atol=0)


@inside
@every_kind
@every_clip
def test_equal_sides_give_neither_value_nor_gradient(kernel, kind, beta, clip):
    student = normal(N, V, seed=0)
    columns = torch.zeros(4, N)
    rule = Divergence(kind, beta=beta, clip=clip)
    gradient = kernel(rule, student, student.clone(), torch.ones(N), torch.float32, *columns)
    assert columns[0].abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


@inside
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "mixed_kl"])
def test_what_is_not_finite_is_seen(kernel, kind):
    student, teacher = normal(N, V, seed=0), normal(N, V, seed=1)
    student[0, 3] = torch.nan
    teacher[1, 20] = torch.nan
    student[2, 4] = -torch.inf
    teacher[3, 4] = -torch.inf
    columns = torch.zeros(4, N)
    gradient = kernel(Divergence(kind), student, teacher, torch.ones(N), torch.float32, *columns)
    assert columns[0, :2].isnan().all()
    assert gradient[:2].isnan().any(-1).all()
    assert columns[0].isinf().tolist() == [
        *(False, False),
        kind in ("forward_kl", "mixed_kl"),
        kind in ("reverse_kl", "mixed_kl"),
    ]


@inside
@every_kind
@every_clip
def test_the_smallest_probabilities_that_there_are_give_next_to_no_value_and_gradient(kernel, kind, beta, clip):
    tiny = torch.tensor([-88.0, -95.0, -103.0, -103.5, -104.0, -120.0])
    pairs = torch.cartesian_prod(tiny, tiny)
    student, teacher = (torch.stack([torch.zeros(len(pairs)), column], -1) for column in pairs.T)
    columns = torch.zeros(4, len(pairs))
    rule = Divergence(kind, beta=beta, clip=clip)
    gradient = kernel(rule, student.contiguous(), teacher.contiguous(), torch.ones(len(pairs)), torch.float32, *columns)
    assert columns[0].abs().max() < 1e-30
    assert gradient.abs().max() < 1e-30


@inside
@every_kind
@every_clip
@pytest.mark.parametrize("chunk_size", [3, None])
def test_all_of_it_is_what_the_plain_rows_give(kernel, monkeypatch, kind, beta, clip, chunk_size):
    """Tiles of which the last is smaller, columns that begin at any token, a temperature, both forms."""
    hidden, weight = normal(7, 5, seed=0).requires_grad_(), normal(V, 5, seed=1).requires_grad_()
    bias = normal(V, seed=2).requires_grad_()
    teacher_hidden, teacher_weight, weights = normal(7, 4, seed=3), normal(V, 4, seed=4), normal(7, seed=5)
    sides = (hidden, Head(weight, bias=bias, softcap=9.0, scale=0.8), teacher_hidden, teacher_weight)
    rule = Divergence(kind, beta=beta, clip=clip, temperature=1.3)

    def run() -> tuple[Tensor, ...]:
        found: WeightedDivergence = weighted_divergence(*sides, rule, weights=weights, chunk_size=chunk_size)
        values = chunked_divergence(*sides, rule, chunk_size=chunk_size)
        inputs = (hidden, weight, bias)
        return *(x.detach() for x in (*found, values)), *(
            gradient for total in (found.total, values @ weights) for gradient in torch.autograd.grad(total, inputs)
        )

    ours = run()
    monkeypatch.setattr(divergence_tiles, "_kernel", lambda logits: None)
    assert_close(ours, run(), rtol=1e-4, atol=1e-5)


@inside
def test_a_narrow_gradient_in_the_place_of_the_logits_is_what_the_products_take(kernel, monkeypatch):
    """As on a GPU, where an operand may have 16 bits; a CPU's product is of float32 then, which rounds nothing."""
    hidden, weight = normal(7, 5, seed=0).requires_grad_(), normal(V, 5, seed=1).requires_grad_()
    sides = (hidden, weight, normal(7, 4, seed=3), normal(V, 4, seed=4))

    def run() -> tuple[Tensor, ...]:
        total = chunked_divergence(*sides, Divergence("reverse_kl"), weights=normal(7, seed=5), chunk_size=3)
        return total.detach(), *torch.autograd.grad(total, (hidden, weight))

    plain = run()
    monkeypatch.setattr(Projection, "narrow", torch.bfloat16)
    narrow = run()
    assert_close(narrow, plain, rtol=0.01, atol=0.01)
    assert not torch.equal(narrow[1], plain[1])


@inside
def test_a_kind_without_a_branch_is_no_other_kind(kernel, monkeypatch, unheard_of):
    """Not even where the launcher is told that the kernel knows it."""
    from opd.maths import kernels

    monkeypatch.setattr(kernels, "KINDS", (*kernels.KINDS, "unheard_of"))
    student, teacher, weights = rows()
    with pytest.raises(Exception, match="no formula for this divergence"):
        kernel(unheard_of, student, teacher, weights, torch.float32, *torch.zeros(4, N))


@inside
@pytest.mark.parametrize("kind", ["jsd", "mixed_kl"])
def test_a_kind_that_the_kernel_does_not_know_is_computed_without_it(kernel, monkeypatch, kind):
    from opd.maths import kernels

    sides = (normal(7, 5, seed=0), normal(V, 5, seed=1), normal(7, 4, seed=3), normal(V, 4, seed=4))
    expected = chunked_divergence(*sides, Divergence(kind))
    monkeypatch.setattr(kernels, "KINDS", ("forward_kl", "reverse_kl"))
    with pytest.raises(ConfigError, match=rf"kernel = '{kind}' is unknown\. Allowed: forward_kl, reverse_kl"):
        kernel(Divergence(kind), *rows()[:2], None, torch.float32, *torch.zeros(4, N))
    assert_close(chunked_divergence(*sides, Divergence(kind)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="needs neither a GPU nor the interpreter")
def test_the_launcher_refuses_a_kind_that_it_does_not_know(unheard_of):
    from opd.maths.kernels import KINDS, divergence_rows

    assert set(KINDS) <= set(formulas.kinds())
    assert set(KINDS) == {kind for kind, _ in EVERY_KIND}
    known = ", ".join(KINDS)
    with pytest.raises(ConfigError, match=rf"kernel = 'unheard_of' is unknown\. Allowed: {known}"):
        divergence_rows(unheard_of, *rows()[:2], None, torch.float32, *torch.zeros(4, N))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process")
def test_in_the_interpreter_of_triton():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", __file__]
    # What pytest-xdist tells its workers is not meant for this process.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
