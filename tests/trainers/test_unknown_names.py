"""A setting of a method whose type grew by a name that nothing computes: refused by name, never taken for another."""

from types import SimpleNamespace
from typing import get_args

import pytest

from opd.engines.config import VllmConfig
from opd.episodes.config import RolloutConfig
from opd.errors import ConfigError
from opd.objective.config import PassRateWeighting, WeightingConfig
from opd.ranks.ranks import Ranks
from opd.teachers.config import TeacherConfig
from opd.trainers.loop import reading
from opd.trainers.loop.reading import check_sampler
from opd.trainers.loop.registry import methods
from opd.trainers.loop.weighting import weigh
from opd.trainers.opd import OpdConfig
from opd.trainers.opsd import OpsdConfig
from opd.trainers.parts.forms import FormConfig
from opd.trainers.parts.policy import PolicyConfig
from opd.trainers.sd_zero.method import Distilling, SdZeroConfig
from opd.trainers.skill_sd.method import SkillSdConfig

OTHER = TeacherConfig(weights="external", model="other")


def grown(settings, **names):
    """The settings as they would be if their types knew the names."""
    return settings.model_copy(update=names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"form": "new"}, "form = 'new' is unknown. Allowed: exact, sampled"),
        ({"form": "sampled", "baseline": "new"}, "baseline = 'new' is unknown. Allowed: full, top_k, optimal"),
    ],
)
def test_a_form_that_nothing_computes_is_refused(names, message):
    with pytest.raises(ConfigError, match=message):
        grown(FormConfig(), **names).loss()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("opsd", grown(OpsdConfig(), reduction="new"), "reduction = 'new' is unknown. Allowed: token_mean"),
        ("opd", grown(OpdConfig(teacher=OTHER), form="new"), "form = 'new' is unknown. Allowed: exact, sampled"),
        ("skill_sd", grown(SkillSdConfig(), estimator="new"), "form of the sampled divergence = 'new' is unknown"),
        ("skill_sd", grown(SkillSdConfig(), policy=grown(PolicyConfig(), ratio="new")), "ratio level = 'new'"),
    ],
)
def test_a_method_with_such_a_name_has_no_losses(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        methods()[name].stages(settings)


def test_a_variant_of_sd_zero_is_not_taken_for_that_of_the_code():
    with pytest.raises(ConfigError, match=r"sd_zero\.variant = 'new' is unknown\. Allowed: paper, code"):
        Distilling.losses(grown(SdZeroConfig(), variant="new"))


def test_a_type_of_the_engine_that_is_not_known_is_not_taken_for_the_models():
    rollout = grown(RolloutConfig(engine="vllm"), vllm=grown(VllmConfig(), dtype="float8"))
    with pytest.raises(
        ConfigError, match=r"rollout\.vllm\.dtype = 'float8' is unknown\. Allowed: auto, float32, bfloat16"
    ):
        check_sampler(SimpleNamespace(backend=SimpleNamespace(ranks=Ranks())), [], rollout)
    assert reading._TYPES.keys() == set(get_args(VllmConfig.model_fields["dtype"].annotation))


def test_a_weighting_is_not_laid_on_tokens_that_it_does_not_name():
    weighting = WeightingConfig(pass_rate=PassRateWeighting())
    weighting = grown(weighting, pass_rate=grown(PassRateWeighting(), on="new"))
    with pytest.raises(ConfigError, match=r"weighting\.pass_rate\.on = 'new' is unknown\. Allowed: distilled, all"):
        weigh([], weighting, {}, lambda sums: sums)
