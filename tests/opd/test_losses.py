"""A name that is added to a type alone, without a formula, is refused by name wherever somebody branches on it.

Not covered: that mypy refuses it, too (`make types` would have to run on a changed copy of the package).
"""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Literal, get_args

import pytest
import torch

from opd import losses
from opd.errors import ConfigError
from opd.losses import Correction, Distill, Losses, Policy, SampledDistill
from opd.maths import advantage, divergence, estimators
from opd.maths.advantage import group_advantage, state_baseline
from opd.maths.divergence import chunked_divergence, stored_divergence, token_divergence, weighted_divergence
from opd.maths.estimators import estimate, estimator_loss
from opd.maths.policy import importance_weights, policy_loss

NEW = "skew_kl"
KINDS = "Allowed: forward_kl, reverse_kl, jsd, mixed_kl"
N, V, H = 3, 7, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def grown(monkeypatch):
    """Every type has one more name, as after an edit of the type alone."""
    for module in (losses, divergence, estimators, advantage):
        for name in ("Divergence", "Kind", "Support", "Form", "Baseline", "Level", "Reduction", "Mode", "Scale"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Literal[(*get_args(getattr(module, name)), NEW)])
    for name in ("Estimator", "EstimatorLoss"):
        monkeypatch.setattr(estimators, name, Literal[(*get_args(getattr(estimators, name)), NEW)])


def logits():
    return normal(N, V, seed=0), normal(N, V, seed=1)


def hidden():
    return normal(N, H, seed=0), normal(V, H, seed=1), normal(N, H, seed=2), normal(V, H, seed=3)


def stored(kind):
    ids = torch.arange(3).repeat(N, 1)
    return stored_divergence(normal(N, H), normal(V, H), ids, torch.full((N, 3), -1.5), kind, weights=torch.ones(N))


PATHS = {
    "token": lambda: token_divergence(*logits(), NEW),
    "token, top k": lambda: token_divergence(*logits(), NEW, top_k=2),
    "token, end of jsd": lambda: token_divergence(*logits(), NEW, beta=0.0),
    "chunked": lambda: chunked_divergence(*hidden(), NEW),
    "chunked, top k": lambda: chunked_divergence(*hidden(), NEW, top_k=2),
    "weighted": lambda: weighted_divergence(*hidden(), NEW, weights=torch.ones(N)),
    "weighted, clip": lambda: weighted_divergence(*hidden(), NEW, weights=torch.ones(N), clip=0.1),
    "stored": lambda: stored(NEW),
    "component": lambda: Distill(kind=NEW, temperature=1.0),
    # Whoever makes a rule without asking `of`.
    "rule": lambda: divergence._Rule(NEW, 0.5, None, None, "teacher", True)(*(x.log_softmax(-1) for x in logits())),
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_divergence_without_a_formula_is_refused_on_every_path(path):
    with pytest.raises(ConfigError, match=rf"divergence kind = 'skew_kl' is unknown\. {KINDS}"):
        path()


def test_no_two_divergences_have_the_same_values():
    values = [tuple(token_divergence(*logits(), kind, beta=0.3).tolist()) for kind in losses.DIVERGENCES]
    assert len(set(values)) == len(losses.DIVERGENCES) == 4


NAMED = {
    "support": lambda: Distill(kind="jsd", temperature=1.0, support=NEW),
    "form of the sampled divergence": lambda: SampledDistill(form=NEW),
    "baseline": lambda: SampledDistill(baseline=NEW),
    "ratio level": lambda: Policy(level=NEW),
    "reduction": lambda: Losses(reduction=NEW),
    "correction mode": lambda: Correction(mode=NEW),
    "correction level": lambda: Correction(level=NEW),
}


@pytest.mark.parametrize(("setting", "make"), NAMED.items(), ids=NAMED)
def test_what_a_method_asks_for_is_refused_where_it_is_unknown(setting, make):
    with pytest.raises(ConfigError, match=rf"{setting} = 'skew_kl' is unknown\. Allowed: "):
        make()


def correction(**changed):
    return SimpleNamespace(**({"mode": "truncate", "level": "token", "low": 0.5, "high": 2.0} | changed))


BRANCHES = {
    "support": lambda: token_divergence(*logits(), "jsd", top_k=2, support=NEW),
    "ratio level": lambda: policy_loss(normal(N), normal(N), level=NEW),
    "correction level": lambda: importance_weights(normal(N), normal(N), correction(level=NEW)),
    "correction mode": lambda: importance_weights(normal(N), normal(N), correction(mode=NEW)),
    "baseline": lambda: state_baseline(*logits(), NEW),
    "advantage scale": lambda: group_advantage([0.0, 1.0], scale=NEW),
    "estimator": lambda: estimate(normal(N), normal(N), NEW),
    "estimator ": lambda: estimator_loss(normal(N), normal(N), NEW),
}


@pytest.mark.parametrize(("setting", "call"), BRANCHES.items(), ids=BRANCHES)
def test_no_branch_takes_a_name_that_is_not_its_own(setting, call):
    with pytest.raises(ConfigError, match=rf"{setting.strip()} = 'skew_kl' is unknown"):
        call()


def test_an_unknown_divergence_is_refused_before_torch_is_imported():
    code = (
        "import sys\nfrom opd.losses import Distill\n"
        f"try: Distill(kind={NEW!r}, temperature=1.0)\n"
        "except ValueError as error: print(error)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"divergence kind = 'skew_kl' is unknown. {KINDS}" in done.stdout


def test_every_name_of_a_type_has_a_formula(monkeypatch):
    monkeypatch.undo()
    types = (losses.Divergence, losses.Support, losses.Form, losses.Baseline, losses.Level, losses.Mode)
    known = (losses.DIVERGENCES, losses.SUPPORTS, losses.FORMS, losses.BASELINES, losses.LEVELS, losses.MODES)
    assert [get_args(names) for names in types] == list(known)
    assert get_args(losses.Reduction) == losses.REDUCTIONS
    assert get_args(advantage.Scale) == advantage.SCALES
    assert get_args(estimators.Estimator) == estimators.ESTIMATORS
