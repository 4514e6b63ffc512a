"""Calls named, weighted reward functions, batch by batch. The sum follows TRL's: None abstains."""

from __future__ import annotations

import inspect
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

from opd.background import Background, call_within
from opd.errors import ConfigError, EnvError
from opd.grading import grading
from opd.rewards.code import CodeTests
from opd.rewards.functions import Completion, contains_answer, exact_match, f1, normalized_match, number_match
from opd.rewards.isolated import Isolated, is_third_party
from opd.rewards.mathematics import MathVerify
from opd.rewards.shape import Length, Matches, SoftOverlong, Tags
from opd.rewards.trainer import IDS, OF_THE_TRAINER, Log, TrainerState
from opd.types import Message

RewardFunction = Callable[..., Any]
"""Called as TRL does; returns a list with a number or None for each completion, or is async and does so later."""
Reward = str | RewardFunction


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Describes one part of a rubric, where a weight alone does not say enough.

    In YAML it is a mapping with these keys.
    """

    reward: Reward | None = None
    """A function, built-in name or import path; by default the name of the part is that too."""
    weight: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of what makes the function: a class, or a function that returns one (`trl.rewards:get_...`)."""
    isolated: bool | None = None
    """True if the function is called in a locked process of its own (`opd.rewards.isolated`); None: where it is
    TRL's or another library's."""
    time_limit: float | None = None
    """Seconds that an isolated function may take for one completion; by default 10."""
    group: bool | None = None
    """True if the function compares the completions of a group: a trainer has it called once for each group, when its
    last episode has ended. None: for what takes `completion_ids`, and where the rubric says so of all its parts."""


Rewards = Reward | Iterable[Reward] | Mapping[Reward, float | Part | Mapping[str, Any]]
"""One reward, several that weigh 1 each, or several with their weights or whole parts."""

BUILT_IN: dict[str, Callable[..., Any]] = {
    **{f.__name__: f for f in (exact_match, normalized_match, f1, contains_answer, number_match)},
    "math_verify": MathVerify,
    "code_tests": CodeTests,
    "matches": Matches,
    "tags": Tags,
    "length": Length,
    "soft_overlong": SoftOverlong,
}
"""Functions, and classes that make one from settings."""


def resolve(spec: Reward, settings: Mapping[str, Any] | None = None) -> RewardFunction:
    """Return the function that a built-in name or an import path `package.module:function` stands for.

    With `settings`, and for a class, what the name stands for is called with them and returns the function. Raises
    ConfigError when there is none such, naming the nearest built-in, or when the settings do not fit.
    """
    function = _load(spec) if isinstance(spec, str) else spec
    if not callable(function):
        raise ConfigError(f"reward {spec!r} is {type(function).__name__}, not a function")
    if settings or inspect.isclass(function):
        function = _make(spec, function, dict(settings or {}))
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


def _make(spec: Reward, maker: Callable[..., Any], settings: dict[str, Any]) -> RewardFunction:
    name = spec if isinstance(spec, str) else _name(spec)
    signature = inspect.signature(maker)
    try:
        signature.bind(**settings)
    except TypeError as error:
        raise ConfigError(
            f"reward {name}: {error}. Its settings: {', '.join(signature.parameters) or 'none'}"
        ) from None
    made: RewardFunction = maker(**settings)
    if not callable(made):
        raise ConfigError(f"reward {name} takes no settings: called with them it returns no function")
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Holds what a rubric makes of one completion."""

    total: float
    """The weighted sum of what its parts gave; 0 where all of them abstained."""
    parts: dict[str, float | None]
    """Each part's own number, before its weight; None where it abstained."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the functions gave to `log_metric`, each a mean."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What they gave to `log_extra` for this completion."""

    @property
    def unscored(self) -> bool:
        """True if nobody could tell: every part abstained."""
        return all(value is None for value in self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    """Holds a part that can be called."""

    name: str
    function: RewardFunction
    weight: float
    is_async: bool
    group: bool


When = Literal["all", "episode", "group"]
"""Which parts are called: all of them, those of a single episode, or those that see its whole group."""


class Rubric:
    """Weighs reward functions and adds them up.

    Args:
        rewards: a function, built-in name or import path; a list of them, which weighs each 1; or a mapping from
            them to their weights. In a mapping a `Part` (or a dict with its keys) may stand for a weight, and
            then the key may be any name.
        time_limit: seconds that a call of one function may take.
        group: what a part's `group` is where it does not say (isolated functions of other libraries compare nothing).

    A part that raises, takes longer than the limit, or returns nan, inf, or not one number for each completion
    breaks the score (EnvError): the episode counts as failed and is never trained. A part that cannot tell says so
    with None; it is counted (`reward/abstained/<name>`), and its weight adds nothing. Where every part says so the
    completion is `unscored`.
    """

    def __init__(self, rewards: Rewards, *, time_limit: float = 60.0, group: bool = False) -> None:
        if isinstance(rewards, str) or callable(rewards):
            rewards = [rewards]
        parts = dict(rewards) if isinstance(rewards, Mapping) else dict.fromkeys(rewards, 1.0)
        if not parts:
            raise ConfigError("rewards is empty; name at least one reward function")
        self.parts = [_make_part(key, value, group) for key, value in parts.items()]
        self.names = [part.name for part in self.parts]
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"two reward functions have the same name: {', '.join(self.names)}; rename one")
        if wrong := [name for name in self.names if not name.isprintable() or not 0 < len(name) <= 100]:
            raise ConfigError(f"rewards: the name {wrong[0]!r:.120} must be 1 to 100 printable characters")
        if not time_limit > 0:
            raise ConfigError(f"time_limit = {time_limit!r} of the rewards must be more than 0 (seconds)")
        self.time_limit = time_limit
        self._background = Background()

    def require(self, columns: Iterable[str], *, table: str | None = None) -> None:
        """Raise ConfigError when a function needs an argument that is none of these columns, naming their table."""
        columns, where = list(columns), f"{table}: " if table else ""
        offered = {"prompts", "completions", *columns, *OF_THE_TRAINER, IDS}
        for part in self.parts:
            needed = [p.name for p in _parameters(part.function) if p.default is p.empty and p.kind in _BY_NAME]
            missing = [parameter for parameter in needed if parameter not in offered]
            if missing:
                columns_text = ", ".join(c if c.isprintable() and c == c.strip() else repr(c) for c in sorted(columns))
                near = get_close_matches(missing[0], offered, n=1)
                hint = f' Did you mean "{near[0]}"?' if near else ""
                raise ConfigError(
                    f"{where}reward {part.name} needs the column {missing[0]!r}. There are: {columns_text:.500}.{hint}"
                )

    @property
    def compares(self) -> bool:
        """True if a part sees a whole group."""
        return any(part.group for part in self.parts)

    def wanting(self, column: str) -> str | None:
        """Return the name of a part that compares and requires this argument; None where there is none."""
        parts = (part for part in self.parts if part.group)
        required = (part for part in parts for p in _parameters(part.function) if p.name == column)
        return next((part.name for part in required), None)

    @grading()
    def score(
        self,
        prompt: str | list[Message],
        completion: Completion,
        columns: Mapping[str, Any],
        *,
        when: When = "all",
        state: TrainerState | None = None,
    ) -> Score:
        """Score one completion: `score_batch` of one."""
        lists = {name: [value] for name, value in columns.items()}
        [score] = self.score_batch([prompt], [completion], lists, when=when, state=state)
        return score

    def score_batch(
        self,
        prompts: Sequence[str | list[Message]],
        completions: Sequence[Completion],
        columns: Mapping[str, Sequence[Any]],
        *,
        when: When = "all",
        state: TrainerState | None = None,
    ) -> list[Score]:
        """Score completions, each function called once with all of them: plain ones in order, async ones together.

        `when` says which functions. Raises EnvError when one fails (see the class), or needs `completion_ids` and they
        are not among the columns.
        """
        parts = [part for part in self.parts if when == "all" or part.group == (when == "group")]
        log = Log(size=len(completions))
        offered = log.arguments(state or TrainerState())
        offered |= {"prompts": list(prompts), "completions": list(completions)}
        offered |= {name: list(values) for name, values in columns.items()}
        calls = {part.name: partial(part.function, **_accepted_arguments(part, offered)) for part in parts}
        outcomes: dict[str, Any] = {part.name: self._call(calls[part.name]) for part in parts if not part.is_async}
        if together := [part.name for part in parts if part.is_async]:
            results = self._background.run([calls[name] for name in together], time_limit=self.time_limit)
            outcomes |= dict(zip(together, results, strict=True))
        numbers = [_read_numbers(part.name, outcomes[part.name], completions) for part in parts]
        return [_sum(parts, values, log, row) for row, values in enumerate(_rows(numbers, len(completions)))]

    def close(self) -> None:
        """End what async functions left running."""
        self._background.close()

    def _call(self, call: Callable[[], Any]) -> Any:
        """Call a plain function within the time limit; return its result or the exception that it raised."""
        try:
            return call_within(self.time_limit, call)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit() in a reward function must not end the run
            return error


def _rows(columns: Sequence[list[float | None]], size: int) -> list[list[float | None]]:
    return [[column[row] for column in columns] for row in range(size)]


def _sum(parts: Sequence[_Ready], values: Sequence[float | None], log: Log, row: int) -> Score:
    terms = [part.weight * value for part, value in zip(parts, values, strict=True) if value is not None]
    named = dict(zip([part.name for part in parts], values, strict=True))
    return Score(total=math.fsum(terms), parts=named, metrics=log.means(), notes=log.row(row))


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _make_part(key: Reward, value: float | Part | Mapping[str, Any], group: bool, /) -> _Ready:
    """Make the part that an entry of the mapping describes. Raises ConfigError."""
    name = key if isinstance(key, str) else _name(key)
    if isinstance(value, Mapping):
        known = [one.name for one in fields(Part)]
        if unknown := [word for word in value if word not in known]:
            near = get_close_matches(str(unknown[0]), known, n=1)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise ConfigError(f"reward {name} has no {unknown[0]!r}. Allowed: {', '.join(known)}.{hint}")
        value = Part(**value)
    part = value if isinstance(value, Part) else Part(weight=value)
    if isinstance(part.weight, bool) or not isinstance(part.weight, int | float) or not math.isfinite(part.weight):
        raise ConfigError(f"rewards: the weight {part.weight!r} of {name} must be a finite number")
    function = resolve(key if part.reward is None else part.reward, part.settings)
    is_async = _is_async(function)
    if part.isolated and is_async:
        raise ConfigError(f"reward {name}: an async function cannot be isolated; leave out isolated: true")
    for name_of, given in (("group", part.group), ("isolated", part.isolated)):
        if not isinstance(given, bool | None):
            raise ConfigError(f"reward {name}: {name_of} = {given!r} must be true or false")
    needs_ids = any(p.name == IDS and p.default is p.empty for p in _parameters(function))
    if part.group is False and needs_ids:
        raise ConfigError(f"reward {name}: it takes {IDS}, which only a trainer has; leave out group: false")
    compares = needs_ids or bool(part.group)
    if part.isolated or (part.isolated is None and is_third_party(function) and not is_async):
        limit = 10.0 if part.time_limit is None else part.time_limit
        function = Isolated(function, name=name, time_limit=limit, together=compares)
    elif part.group is None:
        compares = compares or group
    if part.time_limit is not None and not isinstance(function, Isolated):
        raise ConfigError(
            f"reward {name}: time_limit = {part.time_limit!r} is for isolated functions; set isolated: true, or leave "
            "it out: the time limit of the rewards holds"
        )
    return _Ready(name=name, function=function, weight=part.weight, is_async=is_async, group=compares)


def _is_async(function: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _parameters(function: RewardFunction) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _accepted_arguments(part: _Ready, offered: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that a function takes: all of them if it says `**kwargs`, else those that it names.

    Raises EnvError where it needs `completion_ids`, and no trainer plays.
    """
    parameters = _parameters(part.function)
    if IDS not in offered and any(p.name == IDS and p.default is p.empty for p in parameters):
        raise EnvError(f"reward {part.name} takes {IDS}, which only a trainer has: it cannot score by itself")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    return {p.name: offered[p.name] for p in parameters if p.name in offered}


def _read_numbers(name: str, outcome: Any, completions: Sequence[Completion]) -> list[float | None]:
    """Read what a function returned as one finite number or None for each completion. Raises EnvError."""
    form = type(completions[0]).__name__ if completions else "str"
    if isinstance(outcome, BaseException):
        raise EnvError(
            f"reward {name} raised {type(outcome).__name__}: {outcome} (a completion was given as {form})"
        ) from outcome
    try:
        values = [None if value is None else float(value) for value in outcome]
    except Exception as error:
        raise EnvError(f"reward {name} returned {outcome!r:.200}; it must return a list of numbers or None") from error
    if len(values) != len(completions):
        raise EnvError(f"reward {name} returned {len(values)} numbers for {len(completions)} completions")
    if wrong := [value for value in values if value is not None and not math.isfinite(value)]:
        raise EnvError(f"reward {name} returned {wrong[0]}; a reward must be finite, or None to abstain")
    return values


def _name(function: RewardFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)
