"""Which methods there are. A method registers itself, with its settings, when its module is imported. No torch."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import opd.trainers
from opd.config import Strict
from opd.trainers.loop.method import Method
from opd.trainers.loop.stage import Inputs, Stage

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

    def stages(self, config: Any) -> Sequence[Stage]:
        """The method's stages under these settings of its own."""
        return self.cls.stages(config)

    def inputs(self, config: Any) -> Inputs:
        """What the method reads ahead of training under these settings of its own."""
        return self.cls.inputs(config)


_registry: dict[str, MethodSpec] = {}


def register(name: str, config: type[Strict]) -> Callable[[M], M]:
    """Class decorator: make a method known under `name`, with its own section of that name."""

    def add(cls: M) -> M:
        summary = (cls.__doc__ or "").strip().split("\n")[0]
        _registry[name] = MethodSpec(name=name, config=config, cls=cls, summary=summary)
        return cls

    return add


def methods() -> dict[str, MethodSpec]:
    """Every method by its name in YAML: those of `METHODS` in that order, whatever was imported first, then others."""
    for name in METHODS:
        importlib.import_module(f"opd.trainers.{name}")
    return {name: _registry[name] for name in METHODS} | _registry
