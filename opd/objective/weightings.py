"""Weightings of one's own: functions that say by how much each token of a step's samples counts. No torch.

    @weighting(streams=("distill_weight",))
    def fade(samples, *, half_life=4.0):
        '''Count the tokens of later turns for less.'''
        return [[0.5 ** (turn / half_life) for turn in sample.turn] for sample in samples]

A run's file names it, `weighting: {functions: [{name: my_package.my_module:fade, kwargs: {half_life: 2}}]}`, and
`opd.trainers.loop.weighting` lays its factors over the samples' weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from opd.addressing import installed, load
from opd.errors import ConfigError, DataError
from opd.types import WEIGHTS, Sample

Function = Callable[..., Sequence[Sequence[float]]]
SETTING = "weighting.functions.name"


@dataclass(frozen=True, slots=True)
class Weighting:
    """A registered function, and what the loop must know of it."""

    function: Function
    """(samples, **kwargs) -> factors, [T] a sample: of this rank's samples of one step, in their order. Each is a
    finite number of at least 0, and multiplies the weight of its token. It has no gradient."""
    streams: tuple[str, ...]
    """The weight streams that it multiplies (`opd.types.WEIGHTS`)."""
    needs_scores: bool
    """True: it reads `teacher_logprobs` and `teacher_entropy`, so the teacher is asked before the updates."""

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Raise ConfigError for an argument that the function does not take, or lacks."""
        try:
            inspect.signature(self.function).bind([], **kwargs)
        except TypeError as error:
            raise ConfigError(f"weighting.functions.kwargs: {self.function.__name__}: {error}") from None

    def factors(self, samples: Sequence[Sample], kwargs: Mapping[str, Any]) -> list[list[float]]:
        """Return the factors, [T] a sample. Raises DataError where the function gives anything else.

        The function is handed copies: what it writes into a sample trains nothing.
        """
        name = f"{self.function.__module__}:{self.function.__qualname__}"
        try:
            found = [[float(value) for value in row] for row in self.function([*map(_copied, samples)], **kwargs)]
        except Exception as error:  # a stranger's function may do anything
            raise DataError(f"weighting.functions: {name} failed: {type(error).__name__}: {error}") from error
        if [len(row) for row in found] != [len(sample.token_ids) for sample in samples]:
            sizes = [len(row) for row in found], [len(sample.token_ids) for sample in samples]
            raise DataError(f"weighting.functions: {name} gave {sizes[0]} factors for samples of {sizes[1]} tokens")
        if bad := [value for row in found for value in row if not 0 <= value < float("inf")]:
            raise DataError(f"weighting.functions: {name} gave the factor {bad[0]}: it must be a number of at least 0")
        return found


def _copied(sample: Sample) -> Sample:
    """A sample that shares no list with the given one."""
    lists: dict[str, Any] = {
        field.name: [list(row) if isinstance(row, list) else row for row in value]
        for field in fields(sample)
        if isinstance(value := getattr(sample, field.name), list)
    }
    view = sample.teacher_view
    own = None if view is None else replace(view, token_ids=list(view.token_ids), rows=list(view.rows))
    return replace(sample, **lists, teacher_view=own)


def weighting(
    *, streams: Sequence[str] = ("distill_weight",), needs_scores: bool = False
) -> Callable[[Function], Weighting]:
    """Make a weighting of a function (see `Weighting`). Raises ConfigError for an unknown stream."""
    if isinstance(streams, str):
        raise ConfigError(f"streams = {streams!r} is a text; write streams=({streams!r},)")
    if unknown := [name for name in streams if name not in WEIGHTS]:
        raise ConfigError(f"a weighting of {unknown[0]!r} is unknown. Allowed streams: {', '.join(WEIGHTS)}")
    return lambda function: Weighting(function, tuple(streams), needs_scores)


def find_weighting(name: str) -> Weighting:
    """Return the weighting at an address, or the one that an installed package offers under that name in the group
    `opd.weightings`. Raises ConfigError where there is none."""
    address = installed("opd.weightings").get(name, name)
    found = load(address, setting=SETTING)
    if not isinstance(found, Weighting):
        raise ConfigError(
            f"{SETTING}: {name!r} is a {type(found).__name__} and no weighting. Decorate the function with "
            "@opd.objective.weightings.weighting()"
        )
    return found
