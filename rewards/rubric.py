"""Reward functions by name or import path, and their weighted sum. The sum follows TRL's: None abstains."""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from opd.errors import ConfigError, EnvError
from opd.grading import grading
from opd.rewards.code import code_tests, default_code_tests
from opd.rewards.functions import Completion, contains_answer, exact_match, number_match
from opd.types import Message

RewardFunction = Callable[..., Sequence[float | None]]
Reward = str | RewardFunction
Rewards = Reward | Iterable[Reward] | Mapping[Reward, float]
"""One reward, several that weigh 1 each, or several with their weights."""

BUILT_IN: dict[str, RewardFunction] = {f.__name__: f for f in (exact_match, contains_answer, number_match, code_tests)}


def resolve(spec: Reward) -> RewardFunction:
    """The function that a built-in name or an import path `package.module:function` stands for.

    Raises ConfigError when there is none such, naming the nearest built-in, and for an `async` function.
    """
    function = _load(spec) if isinstance(spec, str) else spec
    if function is code_tests:
        default_code_tests()  # a missing sandbox is found here, before anything is sampled
    if not callable(function):
        raise ConfigError(f"reward {spec!r} is {type(function).__name__}, not a function")
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"reward {spec!r} is an async function; pass a plain one")
    return function


def _load(spec: str) -> Any:
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    if ":" not in spec:
        near = get_close_matches(spec, BUILT_IN, n=1)
        hint = f' Did you mean "{near[0]}"?' if near else ""
        raise ConfigError(
            f"reward {spec!r} is unknown. Built in: {', '.join(BUILT_IN)}; others by import path, "
            f"package.module:function.{hint}"
        )
    try:
        return pkgutil.resolve_name(spec)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"reward {spec!r} cannot be imported: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a rubric makes of one completion."""

    total: float
    parts: dict[str, float | None]
    """Each function's own number, before its weight; None where it abstained."""


class Rubric:
    """Reward functions and their weights.

    Args:
        rewards: a function, built-in name or import path; a list of them, which weighs each 1; or a mapping from
            them to their weights.
    """

    def __init__(self, rewards: Rewards) -> None:
        if isinstance(rewards, str) or callable(rewards):
            rewards = [rewards]
        weights = dict(rewards) if isinstance(rewards, Mapping) else dict.fromkeys(rewards, 1.0)
        if not weights:
            raise ConfigError("rewards is empty; name at least one reward function")
        self.functions = [resolve(spec) for spec in weights]
        self.weights = list(weights.values())
        if wrong := [weight for weight in self.weights if not isinstance(weight, int | float)]:
            raise ConfigError(f"rewards: the weight {wrong[0]!r} must be a number")
        self.names = [spec if isinstance(spec, str) else _name(spec) for spec in weights]
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"two reward functions have the same name: {', '.join(self.names)}; rename one")

    def require(self, columns: Iterable[str]) -> None:
        """Raise ConfigError when a function needs an argument that is none of these columns."""
        offered = {"prompts", "completions", *columns}
        for name, function in zip(self.names, self.functions, strict=True):
            needed = [p.name for p in _parameters(function) if p.default is p.empty and p.kind in _BY_NAME]
            missing = [parameter for parameter in needed if parameter not in offered]
            if missing:
                columns_text = ", ".join(sorted(offered - {"prompts", "completions"}))
                near = get_close_matches(missing[0], offered, n=1)
                hint = f' Did you mean "{near[0]}"?' if near else ""
                raise ConfigError(f"reward {name} needs the column {missing[0]!r}. There are: {columns_text}.{hint}")

    @grading()
    def score(self, prompt: str | list[Message], completion: Completion, columns: Mapping[str, Any]) -> Score:
        """Score one completion. A function that returns None abstains, and its weight adds nothing.

        Raises EnvError when a function raises or returns no finite number, or all of them abstain.
        """
        offered = {"prompts": [prompt], "completions": [completion], **{k: [v] for k, v in columns.items()}}
        parts = {
            name: _call(name, function, offered) for name, function in zip(self.names, self.functions, strict=True)
        }
        terms = [w * part for w, part in zip(self.weights, parts.values(), strict=True) if part is not None]
        if not terms:
            raise EnvError(f"every reward function abstained (returned None): {', '.join(self.names)}")
        return Score(total=math.fsum(terms), parts=parts)


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _parameters(function: RewardFunction) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _call(name: str, function: RewardFunction, offered: dict[str, list[Any]]) -> float | None:
    parameters = _parameters(function)
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        accepted = {p.name for p in parameters}
        offered = {key: value for key, value in offered.items() if key in accepted}
    try:
        [value] = function(**offered)
        number = None if value is None else float(value)
    except Exception as error:
        form = type(offered.get("completions", [""])[0]).__name__
        raise EnvError(
            f"reward {name} raised {type(error).__name__}: {error} (a completion was given as {form})"
        ) from error
    if number is not None and not math.isfinite(number):
        raise EnvError(f"reward {name} returned {number}; a reward must be finite, or None to abstain")
    return number


def _name(function: RewardFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)
