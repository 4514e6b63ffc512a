"""From a file or plain data to a `Config`, or to every problem of it at once: those of the text and of the machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from opd.episodes.config import EnvSetting, RolloutConfig
from opd.errors import ConfigError
from opd.launch.checks.combinations import check_combinations
from opd.launch.checks.engines import check_engine_args, check_rollout
from opd.launch.checks.envs import check_env
from opd.launch.checks.methods import check_files, check_teachers
from opd.launch.checks.models import check_model
from opd.launch.checks.outside import with_origins
from opd.launch.checks.tracking import check_tracking
from opd.launch.checks.weights import check_served, check_weights
from opd.launch.settings.config import Config, all_settings, parse_sections
from opd.launch.settings.overrides import merge
from opd.launch.settings.parse import parse
from opd.launch.settings.problems import Problem, report
from opd.launch.settings.reader import holds_run, read_settings
from opd.launch.settings.references import look_at, with_values, written
from opd.models.config import ChatConfig, ModelConfig, ModelSetting
from opd.variables import Place


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None, *, check_machine: bool = True) -> Config:
    """Read a YAML file, or the `config.yaml` of a run's folder, and lay `overrides` (by dotted key) over it.

    Raises ConfigError with a line for each problem; see `config_from`.
    """
    path = Path(path)
    overrides = overrides or {}
    if holds_run(path):
        overrides = {"out": str(path), **overrides}  # wherever the folder was moved to
        path = path / "config.yaml"
    data = merge(read_settings(path), overrides)
    try:
        return config_from(data, source=str(path), overridden=overrides, check_machine=check_machine)
    except ConfigError as error:
        raise with_origins(error, path.parent) from error


def config_from(
    data: Mapping[str, Any],
    *,
    source: str = "config",
    overridden: Iterable[str] = (),
    check_machine: bool = True,
) -> Config:
    """Make settings from plain data, as a YAML file would hold them.

    Args:
        source: what messages call the place that the data came from.
        overridden: the keys that came from the command line; messages say so.
        check_machine: also check that the model, the environment and wandb are there.

    Raises ConfigError with a line for each problem: unknown, missing and impossible settings, and, with
    `check_machine`, what this machine lacks.
    """
    live, places = _with_values(data, source, overridden)
    sections, problems = parse_sections(live, data)
    if check_machine:
        problems += _machine_problems(sections)
    if not problems:
        config = Config(**sections).with_variables(places)
        problems = check_combinations(config) + check_weights(config, read=check_machine)
        problems += check_teachers(config) + check_files(config) if check_machine else []
    if problems:
        raise ConfigError(report(problems, source, list(overridden)))
    return config


def _with_values(
    data: Mapping[str, Any], source: str, overridden: Iterable[str]
) -> tuple[dict[str, Any], dict[Place, str]]:
    """Return settings with the values of their variables, and the texts that these replaced.

    Raises ConfigError, with a line for each, for variables that are not set, and for those that cannot stand where they
    do.
    """
    try:
        problems = look_at(data)
        places, misplaced = written(data, all_settings())
        if problems := problems + misplaced:
            raise ConfigError(report(problems, source, list(overridden)))
        return with_values(dict(data)), places
    except RecursionError:  # a list that holds itself: who reads the setting says so
        return dict(data), {}


def model_to_serve(target: str, overrides: Mapping[str, Any]) -> tuple[ModelConfig, RolloutConfig]:
    """Return what `opd serve` serves, and how: a model by name, or the sections `model` and `rollout` of a run's file.

    What the file's run does with vLLM is not checked. Raises ConfigError with a line for each problem.
    """
    path = Path(target)
    path = path / "config.yaml" if holds_run(path) else path
    types = {"model": ModelSetting, "rollout": RolloutConfig}
    data: dict[str, Any] = {"model": target}
    if path.suffix in (".yaml", ".yml"):
        data = {name: value for name, value in read_settings(path).items() if name in types}
    data = merge(data, overrides)
    live, _ = _with_values(data, target, overrides)
    values, problems = parse(live, types, all_settings(), data)
    if "model" in values:
        problems += check_model(values["model"])
        problems += check_served(values["model"], values.get("rollout", RolloutConfig()))
    if "rollout" in values:
        problems += check_engine_args(values["rollout"])
    if problems:
        raise ConfigError(report(problems, str(path) if path.suffix else "opd serve", list(overrides)))
    return values["model"], values.get("rollout", RolloutConfig())


def sections_of(target: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return what says how a model's text is made: `model`, `rollout`, `chat` and `env`, of a file or a model's name.

    Raises ConfigError with a line for each problem.
    """
    path = Path(target)
    path = path / "config.yaml" if holds_run(path) else path
    types = {"model": ModelSetting, "rollout": RolloutConfig, "chat": ChatConfig, "env": EnvSetting}
    data: dict[str, Any] = {"model": target}
    if path.suffix in (".yaml", ".yml"):
        data = {name: value for name, value in read_settings(path).items() if name in types}
    data = merge(data, overrides)
    if "env" not in data:
        del types["env"]
    live, _ = _with_values(data, target, overrides)
    values, problems = parse(live, types, all_settings(), data)
    if "model" in values:  # its weights are not looked at
        problems += [p for p in check_model(values["model"]) if "has no weights" not in p.text]
    if problems:
        raise ConfigError(report(problems, str(path) if path.suffix else "opd check", list(overrides)))
    return values


def _machine_problems(sections: Mapping[str, Any]) -> list[Problem]:
    """Return the problems that each section has on this machine, of those sections that could be parsed."""
    checks: dict[str, Callable[[Any], list[Problem]]] = {
        "model": check_model,
        "env": check_env,
        "rollout": check_rollout,
        "tracking": check_tracking,
    }
    return [problem for name, check in checks.items() if name in sections for problem in check(sections[name])]
