"""Holds rewards for the shape of a completion: its format and its length.

Each is made with its settings, then called.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import regex

from opd.errors import ConfigError
from opd.rewards.functions import Completion, text_of

logger = logging.getLogger(__name__)

Unit = Literal["characters", "words"]
_SECONDS = 2.0  # for one pattern and one text; it takes microseconds unless the two were made for each other


class Matches:
    """Scores 1 where a pattern matches the whole completion, else 0.

    Args:
        pattern: a regular expression; `.` matches line breaks too.

    The `regex` package matches, since it can be stopped: some patterns take years on some texts, and Python's own
    `re` lets no other thread run meanwhile. A text that takes too long does not match, and the log says so.
    """

    __name__ = "matches"

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = regex.compile(pattern, regex.DOTALL)
        except regex.error as error:
            raise ConfigError(f"matches: pattern = {pattern!r} is no regular expression: {error}") from error

    def __call__(self, completions: Sequence[Completion], **kwargs: Any) -> list[float]:
        return [float(self._matches(text_of(completion).strip())) for completion in completions]

    def _matches(self, text: str) -> bool:
        try:
            return self.pattern.fullmatch(text, timeout=_SECONDS, concurrent=True) is not None
        except TimeoutError:
            logger.warning(
                "matches: pattern = %r took more than %g s on the text %.200r, which scores 0; avoid repeats inside "
                "repeats, such as (a+)+",
                self.pattern.pattern,
                _SECONDS,
                text[:200],
            )
            return False


class Tags:
    """Scores 1 where each tag opens and closes exactly once, one pair after another in the order given, else 0.

    Args:
        tags: names such as `think` and `answer`, for `<think>...</think> <answer>...</answer>`.
    """

    __name__ = "tags"

    def __init__(self, tags: Iterable[str]) -> None:
        self.tags = [tags] if isinstance(tags, str) else list(tags)
        if not self.tags or not all(isinstance(tag, str) and tag for tag in self.tags):
            raise ConfigError(f"tags: tags = {self.tags!r} must name at least one tag, such as [think, answer]")

    def __call__(self, completions: Sequence[Completion], **kwargs: Any) -> list[float]:
        return [float(self._holds(text_of(completion))) for completion in completions]

    def _holds(self, text: str) -> bool:
        marks = [mark for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>")]
        places = [text.find(mark) for mark in marks]
        return min(places) >= 0 and places == sorted(places) and all(text.count(mark) == 1 for mark in marks)


class Length:
    """Scores 1 where the completion is at least `minimum` and at most `maximum` long, else 0.

    Args:
        minimum, maximum: both included; None is no bound.
        unit: characters or words. An environment sees text, not tokens.
    """

    __name__ = "length"

    def __init__(self, minimum: int = 0, maximum: int | None = None, unit: Unit = "characters") -> None:
        self.minimum, self.maximum = minimum, math.inf if maximum is None else maximum
        self.size = _measure("length", unit)
        if not 0 <= self.minimum <= self.maximum:
            raise ConfigError(f"length: minimum = {minimum} and maximum = {maximum} leave no length that is right")

    def __call__(self, completions: Sequence[Completion], **kwargs: Any) -> list[float]:
        return [float(self.minimum <= self.size(text_of(completion)) <= self.maximum) for completion in completions]


class SoftOverlong:
    """Scores 0 up to `maximum - cache`, from there falling evenly to -1 at `maximum`, and -1 beyond.

    Source: DAPO (arXiv 2503.14476), equation 13, which counts tokens.

    Args:
        maximum: the length from which on the penalty is whole.
        cache: over which length before that it grows.
        unit: characters or words.
    """

    __name__ = "soft_overlong"

    def __init__(self, maximum: int, cache: int, unit: Unit = "characters") -> None:
        if not 0 < cache <= maximum:
            raise ConfigError(f"soft_overlong: cache = {cache} must be more than 0 and at most maximum = {maximum}")
        self.maximum, self.cache = maximum, cache
        self.size = _measure("soft_overlong", unit)

    def __call__(self, completions: Sequence[Completion], **kwargs: Any) -> list[float]:
        over = [self.size(text_of(completion)) - (self.maximum - self.cache) for completion in completions]
        return [0.0 - min(max(length, 0) / self.cache, 1.0) for length in over]


def _measure(reward: str, unit: str) -> Callable[[str], int]:
    if unit not in get_args(Unit):
        raise ConfigError(f"{reward}: unit = {unit!r} is unknown. Allowed: {', '.join(get_args(Unit))}")
    return len if unit == "characters" else lambda text: len(text.split())
