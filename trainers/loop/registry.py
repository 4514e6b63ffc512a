"""Which methods there are. A method registers itself, with its settings, when its module is imported. No torch.

A method lives under `trainers/`, in an installed package that names it in the entry-point group `opd.methods`, or in
any module, where the settings name it by its address.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import opd.trainers
from opd.addressing import installed, is_address, load
from opd.config import Strict
from opd.errors import ConfigError
from opd.losses import Losses
from opd.teachers.config import TeacherConfig
from opd.trainers.loop.method import Method
from opd.trainers.loop.stage import Inputs, Stage

logger = logging.getLogger(__name__)

_SHARED = ("loop", "parts")
METHODS = tuple(sorted({module.name for module in pkgutil.iter_modules(opd.trainers.__path__)}.difference(_SHARED)))
"""The modules and packages under `trainers/` that are a method: each registers one of the same name."""

M = TypeVar("M", bound="type[Method]")


@dataclass(frozen=True, slots=True)
class MethodSpec:
    """A registered method: its name in YAML, its settings, and its class."""

    name: str
    config: type[Strict]
    cls: type[Method]
    summary: str

    @property
    def address(self) -> str:
        """The address of the class, `module:Class`."""
        return f"{self.cls.__module__}:{self.cls.__qualname__}"

    def stages(self, config: Any) -> Sequence[Stage]:
        """The method's stages under these settings of its own.

        Raises ConfigError, with the method's address, where the class cannot tell them.
        """
        stages = self._ask("stages", self.cls.stages, config)
        if not (isinstance(stages, list | tuple) and stages and all(isinstance(stage, Stage) for stage in stages)):
            found = f"{type(stages).__name__} of {len(stages)}" if isinstance(stages, list | tuple) else repr(stages)
            raise ConfigError(
                f"the method {self.name} ({self.address}): stages must return one Stage or more, in a list or a tuple; "
                f"it returned {found}"
            )
        for stage in stages:
            if not isinstance(stage.losses, Losses) or not isinstance(stage.teacher, TeacherConfig):
                raise ConfigError(
                    f"the method {self.name} ({self.address}): losses must return Losses and teacher a TeacherConfig, "
                    f"not {type(stage.losses).__name__} and {type(stage.teacher).__name__}"
                )
        return stages

    def inputs(self, config: Any) -> Inputs:
        """Name what the method reads ahead of training under these settings of its own.

        Raises ConfigError, with the method's address, where the class cannot tell it.
        """
        found = self._ask("inputs", self.cls.inputs, config)
        if not isinstance(found, Inputs):
            raise ConfigError(f"the method {self.name} ({self.address}): inputs must return Inputs, not {found!r}")
        return found

    def _ask(self, what: str, hook: Callable[[Any], Any], config: Any) -> Any:
        """What a hook of the class answers. Raises ConfigError where it raises anything."""
        try:
            return hook(config)
        except ConfigError:
            raise
        except Exception as error:  # a stranger's class may do anything
            text = f"{type(error).__name__}: {error}".rstrip(": ")
            raise ConfigError(
                f"the method {self.name} ({self.address}) cannot say its {what}: {text}. losses and teacher are static "
                "methods of the settings, as opd/trainers/loop/method.py has them"
            ) from error


_registry: dict[str, MethodSpec] = {}
_warned = set[str]()
_TAKEN = (
    *("method", "section", "seed", "out", "model", "chat", "env", "rollout", "train", "weighting", "eval"),
    *("tracking", "backend", "deepspeed"),
)
"""Keys at the top of a run's file that are not a method's section; `opd.launch.settings.config.Config` has them."""


def register(name: str, config: type[Strict]) -> Callable[[M], M]:
    """Class decorator: make a method known under `name`, with its own section of that name.

    Raises ConfigError where the name is another method's, or no name of a section.
    """

    def add(cls: M) -> M:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise ConfigError(f"the method {name!r} is {cls!r}: it must be a subclass of opd.trainers.Method")
        if not (isinstance(config, type) and issubclass(config, Strict)):
            raise ConfigError(
                f"the method {name!r} has the settings {config!r}: they must be a subclass of opd.config.Strict"
            )
        if vars(cls).get("name", name) != name:
            raise ConfigError(f"{cls.__name__} is the method {cls.name!r} already; register a subclass as {name!r}")
        summary = (cls.__doc__ or "").strip().split("\n")[0]
        spec = MethodSpec(name=name, config=config, cls=cls, summary=summary)
        known = _registry.get(name)
        if known is not None and known.address != spec.address:  # the same place: its module is imported anew
            raise ConfigError(f"there is a method {name!r} already, {known.address}; rename {spec.address}")
        if not name.isidentifier() or name in _TAKEN:
            raise ConfigError(f"a method cannot be called {name!r}: its settings stand under that key. Rename it")
        _registry[name] = spec
        cls.name = name
        return cls

    return add


def methods() -> dict[str, MethodSpec]:
    """Return every method that is known by name: those of `METHODS` in that order, then those of installed packages and
    of modules that were imported. A package whose method cannot be imported is left out, with a warning."""
    for name in METHODS:
        importlib.import_module(f"opd.trainers.{name}")
    for name, address in installed("opd.methods").items():
        if name in _warned:  # it is not imported anew at each look
            continue
        try:
            _method_at(address)
        except ConfigError as error:
            logger.warning("the method %s of an installed package is left out: %s", name, error)
            _warned.add(name)
    return {name: _registry[name] for name in METHODS} | _registry


def find_method(name: str) -> MethodSpec:
    """Return the method of that name, or the one at an address `my_package.my_module:MyMethod`.

    Raises ConfigError where there is none, or where what stands there is no registered method.
    """
    if is_address(name):
        return _method_at(name)
    if (known := methods().get(name)) is not None:
        return known
    if name in installed("opd.methods"):  # the package gives it another name than it is registered under
        return _method_at(installed("opd.methods")[name])
    raise ConfigError(f"method = {name!r} is unknown. Allowed: {', '.join(methods())}")


def _method_at(address: str) -> MethodSpec:
    name, cls = address, load(address, setting="method")
    spec = next((spec for spec in _registry.values() if spec.cls is cls), None)
    if spec is None:
        what = f"the class {cls.__name__}" if isinstance(cls, type) else f"a {type(cls).__name__}"
        raise ConfigError(
            f"method: {name!r} is {what} and no registered method. Decorate its class, a subclass of "
            "opd.trainers.Method, with @opd.trainers.register(NAME, CONFIG)"
        )
    return spec
