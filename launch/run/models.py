"""The models of a run: by which name each is loaded, where it is held, and what must fit before any is trained."""

from __future__ import annotations

from opd.backends import deepspeed_json
from opd.errors import ConfigError
from opd.launch.checks.weights import settings_of
from opd.launch.settings.config import Config
from opd.losses import Distill
from opd.models.config import ModelConfig
from opd.models.identity import check_same_tokenizer
from opd.models.loading import Loaded, load, load_tokenizer
from opd.ranks.ranks import Ranks


def named_model(config: Config, ranks: Ranks, name: str) -> ModelConfig:
    """Return the model's settings under another name (`tiny:` is built), in the type that DeepSpeed was told."""
    model = settings_of(config, name)
    if name.startswith("tiny:"):
        ranks.from_first(lambda: _built_folder(name))  # on one rank first: the others of its machine find it there
        name = _built_folder(name)
    dtype = deepspeed_json.dtype(config.deepspeed) if config.deepspeed else None
    return model.model_copy(update={"name": name, "dtype": dtype or model.dtype})


def _built_folder(name: str) -> str:
    from opd.launch.tiny.build import build_tiny

    return str(build_tiny(name.removeprefix("tiny:")))


def load_held(config: Config, ranks: Ranks, model: ModelConfig) -> Loaded:
    """Load a model where it is to be held: with ZeRO-3 in the CPU's memory, until DeepSpeed has cut it into slices."""
    return ranks.agree(lambda: load(model, device="cpu" if is_in_slices(config) else None))


def is_in_slices(config: Config) -> bool:
    """True: no rank holds a whole model (ZeRO-3). False: every rank does."""
    return config.deepspeed is not None and deepspeed_json.stage(config.deepspeed) == 3


def check_tokenizers(student: ModelConfig, teacher: ModelConfig) -> None:
    """Raise ModelError if the tokenizers differ; no weights are read."""
    check_same_tokenizer(load_tokenizer(student), load_tokenizer(teacher), names=(student.name, teacher.name))


def check_top_k(config: Config, vocabulary: int) -> None:
    """Check top_k of every stage now: a bad last stage would waste the earlier ones. Raises ConfigError."""
    for stage in config.stages:
        distill = stage.losses.distill
        if isinstance(distill, Distill):
            name, top_k = "divergence.top_k", distill.divergence.top_k
        else:
            name, top_k = "baseline_top_k", distill.top_k if distill else None
        if top_k is not None and top_k > vocabulary:
            raise ConfigError(
                f"{config.spec.name}.{name} = {top_k} is more than the {vocabulary} entries of the model's vocabulary"
            )
