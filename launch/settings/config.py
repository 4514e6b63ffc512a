"""The settings of a run: one typed, strict tree.

A `config.py` in each room of `opd/` holds the sections that all runs share, each method's file its own; here they are
joined. This is data alone: `opd.launch.checks.loading` reads it from YAML and the command line, and checks it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, SerializeAsAny, model_validator
from pydantic.fields import FieldInfo

from opd import secrets
from opd.addressing import installed, is_address
from opd.backends import deepspeed_json
from opd.backends.config import EvalConfig, TrainConfig
from opd.config import PathText, Strict
from opd.episodes.config import EnvSetting, RolloutConfig
from opd.errors import ConfigError
from opd.launch.settings.parse import bad_value, parse
from opd.launch.settings.problems import Problem, did_you_mean, is_within, nearest_key
from opd.launch.settings.reader import to_yaml
from opd.launch.settings.schema import Setting, describe, walk
from opd.models.config import ChatConfig, ModelSetting
from opd.objective.config import WeightingConfig
from opd.tracking.config import TrackingConfig
from opd.trainers.loop.registry import MethodSpec, find_method, methods
from opd.trainers.loop.stage import Inputs, Stage
from opd.variables import Place


def _read_deepspeed(value: Any) -> Any:
    """Replace a path by the object it names: a run's config.yaml says all that the run depends on."""
    return value if value is None else deepspeed_json.read(value)


DeepSpeedSetting = Annotated[dict[str, Any] | None, BeforeValidator(_read_deepspeed)]

_MAY_DIFFER = (
    "out",
    "env.probe",
    "eval",
    "tracking",
    "rollout.vllm",
    "train.steps",
    "train.save_every",
    "train.save_minutes",
    "train.max_hours",
    "train.stop_grace",
    "train.give_up_after",
    "lightning_opd.mismatch",  # what its own message says to set
    "train.keep_last",
    "train.keep_best",
    "train.threads",
)
"""The settings that a resumed run may change: none that its weights depend on."""


class Config(Strict):
    """All settings of a run. In YAML the section of the method stands under the method's own name."""

    method: str = Field(
        description="How the model learns: a name from `opd methods`, or `my_package.my_module:MyMethod`."
    )
    section: SerializeAsAny[Strict] = Field(description="The method's own settings; in YAML, under its name.")
    seed: int = Field(0, ge=0, description="Tasks, draws and initial values follow from it.")
    out: PathText | None = Field(
        None, description="The run's folder; by default runs/METHOD-ENV-MODEL, numbered where earlier runs are."
    )
    model: ModelSetting
    chat: ChatConfig = Field(default_factory=ChatConfig)
    env: EnvSetting
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    weighting: WeightingConfig = Field(default_factory=lambda: WeightingConfig())
    eval: EvalConfig = Field(default_factory=EvalConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    backend: Literal["local", "deepspeed"] = Field(
        "local",
        description="What trains: `local` is one process, plain torch; `deepspeed` is one or many, ZeRO 0 to 3.",
    )
    deepspeed: DeepSpeedSetting = Field(
        None,
        description="backend = deepspeed: your DeepSpeed JSON, as a path, as one of the files that come along "
        "(zero2, zero3, zero3_offload), or the object itself. Batch sizes and accumulation are auto or absent.",
    )

    _written: dict[Place, str] = PrivateAttr(default_factory=dict)
    """The texts with variables of the environment, by place, as the file has them; the settings hold the values."""

    @model_validator(mode="before")
    @classmethod
    def _take_the_methods_section(cls, data: Any) -> Any:
        """Accept the method's section under the method's name, or its absence."""
        if not isinstance(data, dict) or "section" in data or not isinstance(data.get("method"), str):
            return data
        spec = find_method(data["method"])
        own = data.get(spec.name, {})
        section = own if isinstance(own, Strict) else spec.config.model_validate(own)
        return {key: value for key, value in data.items() if key != spec.name} | {"section": section}

    @property
    def spec(self) -> MethodSpec:
        """The method; `spec.name` is the key of its section."""
        return find_method(self.method)

    @property
    def stages(self) -> Sequence[Stage]:
        """The stages of the method."""
        return self.spec.stages(self.section)

    @property
    def inputs(self) -> Inputs:
        """What the method reads ahead of training, by the keys of its own section."""
        return self.spec.inputs(self.section)

    @property
    def stage_steps(self) -> list[int]:
        """The steps of each stage."""
        return [stage.steps(self.train) for stage in self.stages]

    @property
    def fingerprint(self) -> str:
        """Changes with every setting that a run's weights depend on; not with secrets, nor with variables' values."""
        flat = _flat(secrets.without_secrets(self.dump()))
        fixed = {k: v for k, v in flat.items() if not any(is_within(k, free) for free in _MAY_DIFFER)}
        return sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]

    def dump(self) -> dict[str, Any]:
        """Return all settings as plain data, defaults included; `opd.launch.checks.loading` reads them back.

        Variables of the environment stand there by name. Secrets that a file has written out stand there too: only the
        run's own `config.yaml` is written from this.
        """
        dumped = self.model_dump(mode="json")
        named = {self.spec.name if key == "section" else key: value for key, value in dumped.items()}
        for place, text in self._written.items():
            _put(named, place, text)
        return named

    def shown(self) -> dict[str, Any]:
        """Return what `dump` does with `***` for each secret: what may be written anywhere."""
        shown: dict[str, Any] = secrets.redacted(secrets.without_secrets(self.dump()))
        return shown

    @property
    def plain_secrets(self) -> list[str]:
        """The keys whose values are secrets that are written out."""
        return secrets.know_settings(self.dump())

    def to_yaml(self) -> str:
        """Return all settings as a file would hold them, secrets and all."""
        return to_yaml(self.dump())

    def with_variables(self, written: Mapping[Place, str]) -> Config:
        """Return the same settings, which are written with these texts in place of the values that variables gave."""
        made = self.model_copy()
        made._written = dict(written)
        return made

    def at(self, folder: Path) -> Config:
        """Return the same settings with the folder of the run filled in."""
        return self.model_copy(update={"out": str(folder)})

    def on_the_day(self, day: str) -> Config:
        """Return the same settings with the day that templates are told filled in, where none is set."""
        return self if self.chat.date else self.model_copy(update={"chat": self.chat.model_copy(update={"date": day})})

    def differs_for_resume(self, saved: Mapping[str, Any]) -> list[str]:
        """Return the keys whose values forbid to resume a run that was saved under the settings `saved` (a `dump`)."""
        longer = self.train.lr_schedule == "constant" and len(self.stages) == 1
        return self.differs(saved, may=[key for key in _MAY_DIFFER if key != "train.steps" or longer])

    def differs(self, saved: Mapping[str, Any], *, may: Sequence[str] = _MAY_DIFFER) -> list[str]:
        """Return the keys that differ from the settings `saved` (a `dump`), but for those that `may`."""
        ours, theirs = _flat(self.dump()), _flat(saved)
        changed = [key for key in [*ours, *(k for k in theirs if k not in ours)] if ours.get(key) != theirs.get(key)]
        if changed:  # secrets are left out of what is saved, and may be others now
            shown, saved_shown = _flat(self.shown()), _flat(secrets.redacted(secrets.without_secrets(saved)))
            changed = [key for key in changed if shown.get(key) != saved_shown.get(key)]
        return [key for key in changed if not any(is_within(key, prefix) for prefix in may)]


def all_settings() -> dict[str, Setting]:
    """Return every setting that a file may hold, by its key: the shared ones and those of every method."""
    settings = [setting for setting in walk(Config) if not is_within(setting.key, "section")]
    for name, spec in methods().items():
        settings += [describe(name, FieldInfo(annotation=spec.config, default=None)), *walk(spec.config, f"{name}.")]
    by_key = {setting.key: setting for setting in settings}
    allowed = f"{', '.join(methods())}, or my_package.my_module:MyMethod"
    by_key["method"] = replace(by_key["method"], allowed=allowed, choices=tuple(methods()))
    return by_key


def without_other_methods(settings: Mapping[str, Setting], section: str | None) -> dict[str, Setting]:
    """Return the settings that may stand beside a section: those of other methods are left out, if it is a method's."""
    foreign = set(methods()) - {section} if section in methods() else set()
    return {key: setting for key, setting in settings.items() if key.partition(".")[0] not in foreign}


def explain(key: str) -> list[Setting]:
    """Return a setting, or a section and what it holds. Raises ConfigError naming the nearest for an unknown key."""
    settings = all_settings()
    if key not in settings:
        near = nearest_key(key, without_other_methods(settings, key.partition(".")[0]))
        raise ConfigError(f"{key} is unknown.{did_you_mean(near)} Without a key, all are listed.")
    return [setting for name, setting in settings.items() if is_within(name, key)]


def parse_sections(
    data: Mapping[str, Any], written: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], list[Problem]]:
    """Return the valid top-level settings, typed, and the problems of the others; `written` is what messages show."""
    method, own, problems = _method_of(data)
    known = methods()  # after the above, which may import one
    foreign = [name for name in data if name in known and own is not None and name != own]
    if own is not None and data.get(own) is None:
        data = {**data, own: {}}  # its section may be left out, but not what its section requires
    types: dict[str, Any] = {name: Annotated[f.annotation, f] for name, f in Config.model_fields.items()}
    del types["section"]
    types |= {name: spec.config for name, spec in known.items() if own is None or name == own}
    settings = without_other_methods(all_settings(), own)
    values, found = parse({k: v for k, v in data.items() if k not in foreign}, types, settings, written)
    problems += found
    if "method" in values and own is None and not is_address(method):
        problems.append(bad_value(settings["method"], method))
    for name in foreign:
        text = f"{name} is the section of another method, but method = {method}. Remove it, or set method: {name}."
        problems.append(Problem((name, "method"), text))
    return values, problems


def _method_of(data: Mapping[str, Any]) -> tuple[str, str | None, list[Problem]]:
    """Return the method that a file names, the key of its section, and what is wrong with an address."""
    method = str(data.get("method"))
    if method in methods():
        return method, method, []
    if not is_address(method) and method not in installed("opd.methods"):
        return method, None, []
    try:
        return method, find_method(method).name, []
    except ConfigError as error:
        return method, None, [Problem(("method",), str(error))]


def _put(data: Any, place: Place, text: str) -> None:
    """Put a text where it stood; a setting that is something else by now (a file's content) keeps its value."""
    *above, last = place
    for part in above:
        data = data[part]
    if isinstance(data[last], str):
        data[last] = text


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
