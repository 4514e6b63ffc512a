"""The table of divergences: what may be added to it, from where, and that none of this needs torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opd.errors import ConfigError, DataError
from opd.launch.checks.loading import config_from
from opd.losses import Divergence
from opd.maths import formulas
from opd.maths.divergence import token_divergence
from opd.maths.formulas import formula, kinds, times_log_ratio, with_beta
from opd.trainers.loop import registry

OWN = '''
from opd.maths.formulas import formula, times_log_ratio

@formula(beta=0.2)
def own_skew(student, teacher, p, q, beta):
    """KL(teacher || beta * teacher + (1 - beta) * student)."""
    mix = p.lerp(q, beta)
    return times_log_ratio(q, teacher, mix.log()), p.mul(q).mul_(beta - 1).div_(mix).masked_fill_(mix == 0, 0)

def undecorated(student, teacher, p, q):
    return -q, -q
'''
PAGE = (Path(__file__).parents[2] / "docs" / "divergences.md").read_text(encoding="utf-8")
OWN_PACKAGE = Path(__file__).parents[2] / "examples" / "own_package"
RUN = {"method": "opsd", "model": "tiny:lookup", "env": "opd/Lookup-v0"}


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """What a test adds to the table is gone after it."""
    monkeypatch.setattr(formulas, "_TABLE", dict(formulas._TABLE))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Somebody's module with a divergence of theirs."""
    (tmp_path / "their_formulas.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "their_formulas"
    sys.modules.pop("their_formulas", None)


def test_a_divergence_that_stands_elsewhere_is_named_where_it_stands(module):
    student = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 6, dtype=torch.float64)
    divergence = Divergence(f"{module}:own_skew")
    assert divergence.beta == 0.2
    values = token_divergence(student, teacher, divergence)
    p, q = student.softmax(-1), teacher.softmax(-1)
    expected = (q * (q / (0.2 * q + 0.8 * p)).log()).sum(-1)
    torch.testing.assert_close(values, expected)
    (ours,), (theirs,) = (torch.autograd.grad(x.sum(), student) for x in (values, expected))
    torch.testing.assert_close(ours, theirs)
    # Its module is imported now: its own name will do.
    assert Divergence("own_skew").formula is divergence.formula
    with pytest.raises(ConfigError, match=r"is a function and no divergence\. Decorate"):
        Divergence(f"{module}:undecorated")


def test_the_settings_of_a_run_take_a_divergence_that_stands_elsewhere(module):
    own = {"divergence": {"kind": f"{module}:own_skew", "beta": 0.3}}
    config = config_from(RUN | {"opsd": own}, check_machine=False)
    assert config.section.divergence == Divergence(f"{module}:own_skew", beta=0.3, clip=0.05)
    assert config_from(config.dump(), check_machine=False) == config


def test_every_divergence_has_a_line_of_documentation():
    assert [kind for kind in kinds() if f"\n| `{kind}` | " not in PAGE] == []


def test_what_the_page_shows_runs_and_adds_the_divergence_that_it_says():
    names = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    check_is_both_kls(Divergence("my_divergence"))


def test_the_divergence_of_the_example_has_the_value_and_gradient_that_it_says(monkeypatch):
    monkeypatch.syspath_prepend(str(OWN_PACKAGE))
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    try:
        check_is_both_kls(Divergence("nudge:symmetric_kl"))
    finally:
        sys.modules.pop("nudge", None)


def check_is_both_kls(divergence):
    """It is the sum of both KLs, in value and, as autograd has it of the dense formula, in gradient."""
    student, teacher = torch.randn(2, 5, 9, dtype=torch.float64)
    student.requires_grad_()
    ours, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    expected = ((ours.exp() - theirs.exp()) * (ours - theirs)).sum(-1)
    found = token_divergence(student, teacher, divergence)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(values.sum(), student)[0] for values in (found, expected)]
    torch.testing.assert_close(*slopes)


def test_the_table_says_who_has_a_beta_and_what_stands_at_its_ends():
    assert with_beta() == ["jsd", "mixed_kl", "skew_kl"]
    for kind in ("jsd", "mixed_kl"):
        names = [Divergence(kind, beta=beta).formula.name for beta in (0, 0.5, 1)]
        assert names == ["forward_kl", kind, "reverse_kl"]


def forward_kl(student, teacher, p, q):
    return times_log_ratio(q, teacher, student), -q


def test_a_name_that_is_taken_and_a_function_of_other_arguments_are_refused():
    with pytest.raises(ConfigError, match=r"there is a divergence forward_kl already, in opd\.maths\.formulas; rename"):
        formula()(forward_kl)
    with pytest.raises(ConfigError, match=r"takes \(student, teacher\), not \(student, teacher, p, q\)$"):
        formula()(lambda student, teacher: None)
    with pytest.raises(ConfigError, match=r"takes \(student, teacher, p, q\), not \(student, teacher, p, q, beta\)"):
        formula(beta=0.1)(lambda student, teacher, p, q: None)
    with pytest.raises(ConfigError, match="beta = 2: must be between 0 and 1"):
        formula(beta=2)(lambda student, teacher, p, q, beta: None)
    with pytest.raises(ConfigError, match=r"takes \(teacher, student, q, p\), not"):
        formula()(lambda teacher, student, q, p: None)
    with pytest.raises(ConfigError, match=r"has ends = \('forward_kl', None\): two formulas"):
        formula(beta=0.1, ends=("forward_kl", None))(lambda student, teacher, p, q, beta: None)
    with pytest.raises(ConfigError, match="has ends, but no beta"):
        formula(ends=(formulas.forward_kl, None))(lambda student, teacher, p, q: None)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda s, t, p, q: None, "it returned NoneType"),
        (lambda s, t, p, q: -q, r"it returned \[2, 5\] of torch.float64"),
        (lambda s, t, p, q: (-q.sum(-1), -q), r"it returned \(\[2\] of torch.float64, \[2, 5\] of"),
        (lambda s, t, p, q: (-q.half(), -q), r"it returned \(\[2, 5\] of torch.float16"),
        (lambda s, t, p, q: (-q, q), "must return two new tensors"),
        (lambda s, t, p, q: (-q, q.detach()), "must return two new tensors"),
        (lambda s, t, p, q: (p.view_as(p), -q), "must return two new tensors"),
        (lambda s, t, p, q: (x := -q, x), "must return two new tensors"),
        (lambda s, t, p, q: (x := -q, x.view_as(x)), "must return two new tensors"),
        (lambda s, t, p, q: (p.mul_(s), -q), "the divergence astray writes into its arguments"),
        (lambda s, t, p, q: (q * (t.log() - s), -q), "the divergence astray gives nan for log-probs that are none"),
        (lambda s, t, p, q: (q * (t - s), -q * t.log()), "the divergence astray gives nan"),
    ],
)
def test_a_divergence_that_returns_anything_but_two_new_tensors_is_named(returned, said):
    @formula()
    def astray(student, teacher, p, q):
        return returned(student, teacher, p, q)

    logits = torch.randn(2, 5, dtype=torch.float64)
    with pytest.raises(DataError, match=f"the divergence astray must return .*{said}|{said}"):
        token_divergence(logits, logits.flip(0), Divergence("astray"))


def test_a_nan_of_the_logits_and_no_token_at_all_are_not_a_formulas_fault():
    @formula()
    def own(student, teacher, p, q):
        return times_log_ratio(q, teacher, student), -q

    broken = torch.full((2, 5), torch.nan)
    assert token_divergence(broken, torch.zeros(2, 5), Divergence("own")).isnan().all()
    assert token_divergence(broken[:0], broken[:0], Divergence("own")).shape == (0,)


@pytest.mark.parametrize(
    "made",
    [
        "from opd.losses import Divergence; Divergence('jds')",
        f"from opd.launch.checks.loading import config_from; config_from({RUN | {'opsd': {'divergence': 'jds'}}!r})",
    ],
    ids=["in Python", "in a file"],
)
def test_an_unknown_divergence_is_refused_before_torch_is_imported(made):
    code = f"""
import sys
try:
    {made}
except ValueError as error:
    print(type(error).__name__, error)
assert 'torch' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ConfigError" in done.stdout
    assert f"divergence.kind = 'jds' is unknown. Allowed: {', '.join(kinds())}, or package.module:name" in done.stdout
    assert 'Did you mean "jsd"?' in done.stdout
