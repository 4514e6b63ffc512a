"""Holds what several adapters need: tasks drawn into splits, imports by path, a private stream of `random`."""

from __future__ import annotations

import pkgutil
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from opd.envs.text_env import task_split
from opd.errors import ConfigError, EnvError
from opd.sandbox import GraderSession, Ungraded

T = TypeVar("T")

_DRAWS = 1_000
ALL_SPLITS: Mapping[str, None] = {"train": None, "eval": None, "warm": None}
"""`metadata["tasks"]` of an environment that can draw any number of tasks of each split."""


def draw(begin: Callable[[int], T], key: Callable[[T], object], rng: np.random.Generator, split: str | None) -> T:
    """Begin tasks with seeds from `rng` until one belongs to `split`. `key` returns what identifies a task.

    With `split` None the first one is taken. Raises EnvError after many draws: the source has too few tasks.
    """
    for _ in range(_DRAWS):
        drawn = begin(int(rng.integers(2**31)))
        if split is None or task_split(key(drawn)) == split:
            return drawn
    raise EnvError(f"none of {_DRAWS} tasks is in split {split!r}: the environment has too few different ones")


def resolve(given: Callable[..., Any] | str, *, setting: str) -> Callable[..., Any]:
    """Return the function as given, or import it from `package.module:name`. Raises ConfigError, naming the setting."""
    if callable(given):
        return given
    try:
        found = pkgutil.resolve_name(given)
    except (AttributeError, ImportError, ValueError) as error:
        raise ConfigError(f"env.kwargs.{setting}: {given!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"env.kwargs.{setting}: {given!r} is a {type(found).__name__}, which cannot be called")
    return found  # type: ignore[no-any-return]  # any callable


class Unprotected:
    """Calls an object in this process, as a `GraderSession` calls one in a process of its own.

    For code that must have what is refused there. `close` is the object's own.
    """

    def __init__(self, made: Any) -> None:
        self._made = made

    def call(self, method: str, **arguments: Any) -> Any:
        """Call the method and return its result. Raises Ungraded where the method raises."""
        try:
            return getattr(self._made, method)(**arguments)
        except Exception as error:  # code that met a text it was not made for
            raise Ungraded(f"it raised {type(error).__name__}: {error}") from error

    def close(self) -> None:
        self._made.close()


Session = GraderSession | Unprotected


class OwnRandom:
    """Gives each holder its own stream of Python's global `random`, whatever other threads do.

    Games that draw from the global generator would otherwise mix their draws, and a seed would decide nothing.
    """

    _lock = threading.RLock()

    def __init__(self) -> None:
        self._state: object = None

    @contextmanager
    def __call__(self, seed: int | None = None) -> Iterator[None]:
        """Let the code inside draw from this stream; a given `seed` starts the stream anew."""
        with self._lock:
            outer = random.getstate()
            try:
                if seed is not None:
                    random.seed(seed)
                elif self._state is not None:
                    random.setstate(self._state)  # type: ignore[arg-type]  # what getstate gave
                yield
            finally:
                self._state = random.getstate()
                random.setstate(outer)
