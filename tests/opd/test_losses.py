"""A name that is added to a type alone, without a formula, is refused by name wherever somebody branches on it.

Not covered: that mypy refuses it, too (`make types` would have to run on a changed copy of the package).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Literal, get_args

import pytest
import torch

from opd import losses
from opd.errors import ConfigError
from opd.losses import Correction, Divergence, Losses, Policy, SampledDistill
from opd.maths import advantage, divergence, estimators
from opd.maths.advantage import group_advantage, state_baseline
from opd.maths.divergence import chunked_divergence, stored_divergence, token_divergence, weighted_divergence
from opd.maths.estimators import estimate, estimator_loss
from opd.maths.formulas import kinds
from opd.maths.policy import importance_weights, policy_loss

NEW = "new"
N, V, H = 3, 7, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def grown(monkeypatch):
    """Every type has one more name, as after an edit of the type alone."""
    for module in (losses, divergence, estimators, advantage):
        for name in ("Support", "Form", "Baseline", "Level", "Reduction", "Mode", "Scale"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Literal[(*get_args(getattr(module, name)), NEW)])
    for name in ("Estimator", "EstimatorLoss"):
        monkeypatch.setattr(estimators, name, Literal[(*get_args(getattr(estimators, name)), NEW)])


def logits():
    return normal(N, V, seed=0), normal(N, V, seed=1)


def grown_support():
    """A divergence as it would be if its own check knew the name."""
    made = Divergence("jsd", top_k=2)
    object.__setattr__(made, "support", NEW)
    return made


NAMED = {
    "divergence.support": lambda: Divergence("jsd", top_k=2, support=NEW),
    "form of the sampled divergence": lambda: SampledDistill(form=NEW),
    "baseline": lambda: SampledDistill(baseline=NEW),
    "ratio level": lambda: Policy(level=NEW),
    "reduction": lambda: Losses(reduction=NEW),
    "correction mode": lambda: Correction(mode=NEW),
    "correction level": lambda: Correction(level=NEW),
}


@pytest.mark.parametrize(("setting", "make"), NAMED.items(), ids=NAMED)
def test_what_a_method_asks_for_is_refused_where_it_is_unknown(setting, make):
    with pytest.raises(ConfigError, match=rf"{setting} = 'new' is unknown\. Allowed: "):
        make()


def unheard_of(**options):
    """A divergence of a kind that there is no formula for, as it would be if it were not checked when it is made."""
    made = Divergence("jsd", **options)
    object.__setattr__(made, "kind", NEW)
    return made


def hidden():
    return normal(N, H, seed=0), normal(V, H, seed=1), normal(N, H, seed=2), normal(V, H, seed=3)


def stored():
    top = torch.arange(3).repeat(N, 1), torch.full((N, 3), -1.5)
    return stored_divergence(normal(N, H), normal(V, H), *top, unheard_of(top_k=3), weights=torch.ones(N))


PATHS = {
    "made": lambda: Divergence(NEW),
    "token": lambda: token_divergence(*logits(), unheard_of()),
    "token, top k": lambda: token_divergence(*logits(), unheard_of(top_k=2)),
    "token, end of jsd": lambda: token_divergence(*logits(), unheard_of(beta=0.0)),
    "chunked": lambda: chunked_divergence(*hidden(), unheard_of()),
    "chunked, top k": lambda: chunked_divergence(*hidden(), unheard_of(top_k=2)),
    "weighted": lambda: weighted_divergence(*hidden(), unheard_of(), weights=torch.ones(N)),
    "weighted, clip": lambda: weighted_divergence(*hidden(), unheard_of(clip=0.1), weights=torch.ones(N)),
    "stored": stored,
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_divergence_without_a_formula_is_refused_on_every_path(path):
    with pytest.raises(ConfigError, match=rf"divergence\.kind = 'new' is unknown\. Allowed: {', '.join(kinds())}"):
        path()


def correction(**changed):
    return SimpleNamespace(**({"mode": "truncate", "level": "token", "low": 0.5, "high": 2.0} | changed))


BRANCHES = {
    "divergence.support": lambda: token_divergence(*logits(), grown_support()),
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
    with pytest.raises(ConfigError, match=rf"{setting.strip()} = 'new' is unknown"):
        call()


def test_every_name_of_a_type_has_a_formula(monkeypatch):
    monkeypatch.undo()
    types = (losses.Support, losses.Form, losses.Baseline, losses.Level, losses.Mode)
    known = (losses.SUPPORTS, losses.FORMS, losses.BASELINES, losses.LEVELS, losses.MODES)
    assert [get_args(names) for names in types] == list(known)
    assert get_args(losses.Reduction) == losses.REDUCTIONS
    assert get_args(advantage.Scale) == advantage.SCALES
    assert get_args(estimators.Estimator) == estimators.ESTIMATORS
